"""Measure the latency of models for frames that arrive at a fixed rate, and the share of frames that they miss.

    python research/latency.py model.onnx --source VIDEO_OR_FOLDER [--rate 25] [--threads 1 2]
    python research/latency.py LocalVim-T MobileNetV2 --sizes 128 224 512 --runtimes eager onnxruntime \\
        --source data/digits/coco/train --csv latency.csv --plot latency.png

A model is a file of tools/deployment/export.py, which has a fixed image size, or a name of the list below: a backbone
with random weights, which is as fast as a trained one. --rate frames arrive per second. Each must be answered within
--deadline (by default before the next frame), including its preparation. While the model is busy, only the newest frame
waits; older ones are dropped and count as missed. --rate 0 measures one image after the other instead.

Each case (model, size, threads, runtime) runs in its own process, and the script reports the peak memory of that
process. Cases that are in the table of --csv are not measured again. Runtimes with a precision: eager-bf16 (autocast),
onnxruntime-int8 (linear layers only, scans stay in float32), openvino-bf16.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
sys.path.insert(0, str(TOOLS))
from records import processor, read_rows, write_rows  # noqa: E402

RUNTIMES = ('eager', 'eager-bf16', 'compiled', 'aoti', 'onnxruntime', 'onnxruntime-int8', 'openvino', 'openvino-bf16')
FIELDS = ('model', 'size', 'runtime', 'threads', 'rate', 'frames', 'p50_ms', 'p95_ms', 'p99_ms', 'missed', 'peak_mb',
          'processor', 'torch')
PICTURES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')
MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])


# ----------------------------------------------------------------------------------------------------------------------
# Frames


def read_frames(source, limit=64):
    """Return at most ``limit`` RGB arrays of a video or a folder of images. Frames are repeated in a loop."""
    import cv2
    path, frames = Path(source), []
    if path.is_dir():
        files = sorted(file for file in path.rglob('*') if file.suffix.lower() in PICTURES)[:limit]
        frames = [frame for file in files if (frame := cv2.imread(str(file))) is not None]
    elif path.is_file():
        video = cv2.VideoCapture(str(path))
        while len(frames) < limit:
            well, frame = video.read()
            if not well:
                break
            frames.append(frame)
        video.release()
    else:
        raise SystemExit(f'--source {source}: no such file or folder')
    if not frames:
        raise SystemExit(f'--source {source}: OpenCV can read no frame (give a video, or a folder of '
                         f'{", ".join(PICTURES)})')
    return [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]


def prepared(frame, size):
    """Return a frame as a model's input (1, 3, size, size)."""
    import cv2

    from mmlocalmamba.deployment.runtimes import normalised
    return normalised(cv2.resize(frame, (size, size)), dict(channels='RGB', mean=MEAN, std=STD))


def play(run, frames, size, rate, seconds, deadline):
    """Return the latencies (s) of the answered frames, the number of frames, and the number of missed frames.

    Frames arrive by the clock, so a late answer does not delay the next frame.
    """
    latencies, late = [], 0
    start = time.perf_counter()
    count = max(1, round(rate * seconds))
    newest = -1
    while newest < count - 1:
        arrived = min(int((time.perf_counter() - start) * rate), count - 1)
        if arrived == newest:  # the next frame has not arrived yet
            time.sleep(max(0., start + (newest + 1) / rate - time.perf_counter()))
            continue
        newest = arrived
        run(prepared(frames[newest % len(frames)], size))
        latency = time.perf_counter() - start - newest / rate
        latencies.append(latency)
        late += latency > deadline
    return latencies, count, count - len(latencies) + late


def in_turn(run, frames, size, seconds):
    """Return the latencies (s) of images one after the other, without their preparation."""
    latencies, images = [], [prepared(frame, size) for frame in frames[:8]]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(latencies) < 5:
        begin = time.perf_counter()
        run(images[len(latencies) % len(images)])
        latencies.append(time.perf_counter() - begin)
    return latencies


# ----------------------------------------------------------------------------------------------------------------------
# Models


def builders():
    """Return {name: function(size) -> backbone}."""
    from benchmark_model import builders as of_benchmark

    from mmlocalmamba.backbones import LocalVim, LocalVMamba
    found = {
        'LocalVMamba-nano': lambda size: LocalVMamba('nano', drop_path_rate=0.),
        'LocalVim-nano': lambda size: LocalVim('nano', img_size=size, drop_path_rate=0.),
        **of_benchmark('cpu'),
    }
    try:
        from mmpretrain.models.backbones import MobileNetV2
    except ImportError:
        return found
    return {**found, 'MobileNetV2': lambda size: MobileNetV2()}


def graph_of(name, size):
    import torch

    from mmlocalmamba.deployment.graphs import Features

    class Backbone(Features):

        def forward(self, images):
            return tuple(self.model(images))

    torch.manual_seed(0)
    backbone = builders()[name](size)
    backbone.eval()  # MobileNetV2.eval() returns None, so calls cannot be chained
    with torch.no_grad():
        return Backbone(backbone, len(backbone(torch.zeros(1, 3, size, size)))).eval()


def exported(name, size, runtime, folder):
    """Return the file of a model for a runtime. It is exported once."""
    from mmlocalmamba.deployment import exporting
    shape, precision = (size, size), 'int8' if runtime.endswith('int8') else 'float32'
    path = os.path.join(folder, f'{name}_{size}' + ('_aoti.pt2' if runtime == 'aoti' else f'_{precision}.onnx'))
    if not os.path.exists(path):
        graph = graph_of(name, size)
        if runtime == 'aoti':
            exporting.write_checked(path, lambda beside: exporting.to_aoti(graph, shape, beside, {}), os.path.getsize)
        else:
            exporting.write_checked(path, lambda beside: exporting.to_onnx(graph, shape, beside, {}, False, precision),
                                    os.path.getsize)
    return path


def opened(case):
    """Return the function images -> outputs of a case."""
    runtime, _, precision = case['runtime'].partition('-')
    if runtime in ('eager', 'compiled'):
        import torch
        torch.set_num_threads(case['threads'])
        model = graph_of(case['model'], case['size'])
        if runtime == 'compiled':
            model = torch.compile(model)

        @torch.no_grad()
        def run(images):
            with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
                return model(torch.from_numpy(images))

        return run
    from mmlocalmamba.deployment import runtimes
    return runtimes.open_file(case['file'], runtime, case['threads'], 'bf16' if precision == 'bf16' else 'f32').run


def peak_megabytes():
    """Return the peak memory of this process. getrusage would give the parent's peak if that is larger."""
    with open('/proc/self/status') as file:
        return next(round(int(line.split()[1]) / 1024) for line in file if line.startswith('VmHWM'))


def worker(case):
    run = opened(case)
    frames = read_frames(case['source'])
    for _ in range(3):
        run(prepared(frames[0], case['size']))
    if case['rate']:
        latencies, count, missed = play(run, frames, case['size'], case['rate'], case['seconds'], case['deadline'])
        missed = missed / count
    else:
        latencies = in_turn(run, frames, case['size'], case['seconds'])
        count, missed = len(latencies), ''
    p50, p95, p99 = (round(1e3 * float(value), 4) for value in np.percentile(latencies, (50, 95, 99)))
    print(json.dumps(dict(frames=count, p50_ms=p50, p95_ms=p95, p99_ms=p99, missed=missed,
                          peak_mb=peak_megabytes(), torch=version('torch'))))


# ----------------------------------------------------------------------------------------------------------------------
# Cases


def cases_of(args):
    for model in args.models:
        is_file = model.endswith(('.onnx', '.pt2'))
        if not is_file and model not in builders():
            raise SystemExit(f'{model} is neither a file (.onnx, .pt2) nor one of {", ".join(builders())}')
        if is_file:
            from mmlocalmamba.deployment.runtimes import kind_of, open_file
            kind = kind_of(model)
            sizes = [int(open_file(model).metadata['height'])]
            able = [name for name in args.runtimes if name.split('-')[0] in (
                ('onnxruntime', 'openvino') if kind == 'onnx' else (kind, ))] or [
                    'onnxruntime' if kind == 'onnx' else kind]
        else:
            sizes, able = args.sizes, args.runtimes
        for size in sizes:
            for runtime in able:
                for threads in args.threads:
                    yield dict(model=model, size=size, runtime=runtime, threads=threads, rate=args.rate,
                               seconds=args.seconds, deadline=args.deadline or (1 / args.rate if args.rate else 0),
                               source=args.source, **dict(file=model) if is_file else {})


def measure(case, folder):
    if 'file' not in case and case['runtime'].split('-')[0] not in ('eager', 'compiled'):
        # openvino-bf16 takes the float32 file.
        case = dict(case, file=exported(case['model'], case['size'], case['runtime'], folder))
    # Threads that spin while they wait would slow down the preparation of the next frame.
    environment = dict(os.environ, OMP_NUM_THREADS=str(case['threads']), OMP_WAIT_POLICY='PASSIVE')
    done = subprocess.run([sys.executable, __file__, '--worker', json.dumps(case)], env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{case["model"]}, {case["size"]}, {case["runtime"]}: {done.stderr.strip().splitlines()[-1]}')
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**{key: case[key] for key in FIELDS if key in case}, 'processor': processor(), **found}


def key_of(row):
    return tuple(str(row[key]) for key in FIELDS[:5])


def draw(rows, path):
    """Draw the latency of 95 % of the frames by size: a line per model, a panel per runtime and number of threads."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    panels = sorted({(row['runtime'], int(row['threads'])) for row in rows})
    models = list(dict.fromkeys(row['model'] for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 3.6 * len(panels), 4.2), sharey=True, squeeze=False)
    rate = max(float(row['rate']) for row in rows)
    for panel, (runtime, threads) in zip(axes[0], panels):
        for index, model in enumerate(models):
            points = sorted((int(row['size']), float(row['p95_ms'])) for row in rows if row['model'] == model
                            and (row['runtime'], int(row['threads'])) == (runtime, threads))
            own = model.startswith('Local')
            panel.plot(*zip(*points), marker='o', color=f'C{index}', linewidth=2.2 if own else 1.2,
                       linestyle='-' if own else '--', label=model) if points else None
        if rate:
            panel.axhline(1e3 / rate, color='0.4', linewidth=1, linestyle=':')
            panel.annotate(f'{rate:g} per second', (0.02, 1e3 / rate), xycoords=('axes fraction', 'data'), fontsize=8,
                           color='0.3', verticalalignment='bottom')
        panel.set(title=f'{runtime}, {threads} thread{"s" * (threads > 1)}', xlabel='side of the image (pixels)',
                  yscale='log')
        panel.set_xticks(sorted({int(row['size']) for row in rows}))
        panel.grid(alpha=0.3, which='both')
    axes[0, 0].set_ylabel('latency of 95 % of the frames (ms)')
    axes[0, -1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', help='files (.onnx, .pt2), or names: LocalVMamba-nano, LocalVMamba-T, '
                        'LocalVim-nano, LocalVim-T, Swin-T, ConvNeXt-T, DeiT-T, ResNet-50, MobileNetV2')
    parser.add_argument('--source', required=True, help='a video, or a folder of images')
    parser.add_argument('--rate', type=float, default=25.,
                        help='frames per second; 0: one after the other (default: 25)')
    parser.add_argument('--deadline', type=float, help='seconds for an answer (default: until the next frame)')
    parser.add_argument('--seconds', type=float, default=8, help='seconds for each case (default: 8)')
    parser.add_argument('--sizes', type=int, nargs='+', default=[224],
                        help='image sizes for named models (default: 224)')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=['onnxruntime'])
    parser.add_argument('--csv', type=Path, help='table to read and extend')
    parser.add_argument('--plot', type=Path, help='draw the table')
    parser.add_argument('--folder', help='folder of exported files of named models (default: a temporary folder)')
    args = parser.parse_args()
    read_frames(args.source, 1)
    rows = read_rows(args.csv) if args.csv else []
    known = {key_of(row) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        os.makedirs(folder, exist_ok=True)
        for case in cases_of(args):
            if key_of(case) in known:
                continue
            row = measure(case, folder)
            rows.append(row)
            missed = '' if row['missed'] == '' else f', {row["missed"]:.1%} missed'
            print(f'{row["model"]:18} {row["size"]:4} {row["runtime"]:16} {row["threads"]} threads: p50 '
                  f'{row["p50_ms"]:7.1f} ms, p95 {row["p95_ms"]:7.1f}, p99 {row["p99_ms"]:7.1f}{missed}, '
                  f'{row["peak_mb"]} MB', flush=True)
            if args.csv:
                write_rows(args.csv, FIELDS, rows)
    if args.plot:
        draw(rows, args.plot)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        worker(json.loads(sys.argv[2]))
    else:
        main()
