"""Measure latency, throughput, training step and peak memory of whole backbones, ours and mmpretrain's, in one run.

    python tools/benchmark_model.py [--device cpu] [--sizes 224 512 1024] [--quick] [--json FILE]
    python tools/benchmark_model.py --dtype bfloat16 --sizes 224 --threads 1
    python tools/benchmark_model.py --device cuda --dtype bfloat16 --sizes 224 --batch 128
    python tools/benchmark_model.py --inference --sizes 224 512 1024 800x1333 --csv scaling.csv --plot scaling.png

With --dtype, all models run under autocast, and ours also in float32. --cpu-time measures the processor time of one
thread and takes the minimum of all calls; other jobs on the machine disturb it less. --csv extends a table of
inferences on single images, and --plot draws time and memory of that table against the number of pixels.

Weights are random, because speed does not depend on them. The other models come from mmpretrain, or without it from
timm; without both, only ours are measured. --training measures the training step alone, and --results writes every
measurement as a table. On a GPU with mamba_ssm, LocalVMamba-T is also measured with scans as in the authors' code:
permuted copies and mamba_ssm's operator.
"""
import argparse
import json
import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from benchmark_scan import DTYPES, describe_machine, measure, peak_memory, print_table
from records import processor, read_rows, write_rows

from mmlocalmamba import ops

OURS = ('LocalVMamba-T', 'LocalVMamba-S', 'LocalVim-T', 'LocalVim-S', 'LocalVMamba-T-v2', 'VMamba-T-v2')
FIELDS = ('model', 'height', 'width', 'dtype', 'threads', 'ms', 'spread_percent', 'peak_mb', 'machine', 'torch')


class WithBackend(torch.nn.Module):
    """A model whose scans use the named backend."""

    def __init__(self, model, backend):
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, images):
        with mock.patch.dict(os.environ, {ops.BACKEND_VARIABLE: self.backend}):
            return self.model(images)


def builders(device):
    """Return {name: function((height, width)) -> backbone}, ours first."""
    from mmlocalmamba.backbones import LocalVim, LocalVMamba
    found = {
        'LocalVMamba-T': lambda size: LocalVMamba('tiny', drop_path_rate=0.),
        'LocalVMamba-S': lambda size: LocalVMamba('small', drop_path_rate=0.),
        'LocalVim-T': lambda size: LocalVim('tiny', img_size=size, drop_path_rate=0.),
        'LocalVim-S': lambda size: LocalVim('small', img_size=size, drop_path_rate=0.),
        'LocalVMamba-T-v2': lambda size: LocalVMamba('tiny_v2', drop_path_rate=0.),
        'VMamba-T-v2': lambda size: LocalVMamba('tiny_v2', directions=['h', 'v', 'h_flip', 'v_flip'], scattn=False,
                                                drop_path_rate=0.),
    }
    if device == 'cuda' and ops.available_backends(torch.empty(0, device=device))['cuda'] is None:
        found['LocalVMamba-T, mamba_ssm'] = lambda size: WithBackend(LocalVMamba('tiny', drop_path_rate=0.), 'cuda')
    try:
        from mmpretrain.models.backbones import ConvNeXt, ResNet, SwinTransformer, VisionTransformer
    except ImportError as error:
        print(f'mmpretrain cannot be imported: {error}', file=sys.stderr)
        return {**found, **from_timm()}
    found.update({
        'Swin-T': lambda size: SwinTransformer('tiny', img_size=size, drop_path_rate=0.),
        'ConvNeXt-T': lambda size: ConvNeXt('tiny', drop_path_rate=0.),
        'DeiT-T': lambda size: VisionTransformer('deit-tiny', img_size=size),
        'ResNet-50': lambda size: ResNet(50),
    })
    return found


def from_timm():
    """Return {name: function((height, width)) -> feature maps} of timm's models, or none without timm."""
    try:
        import timm
    except ImportError as error:
        print(f'timm cannot be imported: {error}. Only our models are measured.', file=sys.stderr)
        return {}
    print(f'Swin-T, ConvNeXt-T and ResNet-50 are those of timm {timm.__version__}')
    return {
        'Swin-T': lambda size: timm.create_model('swin_tiny_patch4_window7_224', features_only=True, img_size=size),
        'ConvNeXt-T': lambda size: timm.create_model('convnext_tiny', features_only=True),
        'ResNet-50': lambda size: timm.create_model('resnet50', features_only=True),
    }


def autocast(images, dtype):
    return torch.autocast(images.device.type, dtype=DTYPES[dtype], enabled=dtype != 'float32')


@torch.no_grad()
def infer(model, images, dtype):
    with autocast(images, dtype):
        return model(images)


def train_step(model, images, dtype):
    for parameter in model.parameters():
        parameter.grad = None
    with autocast(images, dtype):
        loss = sum(out.float().square().mean() for out in model(images))
    loss.backward()


def compare(models, size, batch, training, args):
    images = torch.randn(batch, 3, *size, device=args.device)
    step = train_step if training else infer
    for model in models.values():
        model.train(training)
    cases = {name: partial(step, model, images, args.dtype) for name, model in models.items()}
    if args.dtype != 'float32':
        cases.update({f'{name}, float32': partial(step, models[name], images, 'float32') for name in OURS
                      if name in models})
    times, spreads = measure(cases, args.device, args.rounds, args.seconds, args.cpu_time)
    rows = []
    for name, case in cases.items():
        ms = times[name]
        row = dict(model=name, height=size[0], width=size[1], batch=batch,
                   what='training step' if training else 'inference', ms=ms)
        if not isinstance(ms, str):
            row['+- %'] = spreads.get(name)
            row['images / s'] = 1e3 * batch / ms
            row['ns / pixel'] = 1e6 * ms / (batch * size[0] * size[1])
            for peer in ('Swin-T', 'DeiT-T'):
                if isinstance(times.get(peer), float) and not name.endswith(', float32'):
                    row[f'times {peer}'] = ms / times[peer]
            if isinstance(times.get(f'{name}, float32'), float):
                row['times own float32'] = ms / times[f'{name}, float32']
            row['peak MB'] = peak_memory(case, args.device)
        rows.append(row)
    columns = ['model', 'ms', '+- %', 'images / s', 'ns / pixel', 'times Swin-T', 'times DeiT-T', 'peak MB']
    if args.dtype != 'float32':
        columns.insert(-1, 'times own float32')
    print(f'### {rows[0]["what"]}, {size[0]} x {size[1]}, batch {batch}\n')
    print_table(columns, [[row.get(column) for column in columns] for row in rows])
    return rows


def image_size(text):
    """Return (height, width) of '224' or '800x1333'."""
    height, _, width = text.partition('x')
    return int(height), int(width or height)


def record(results, args):
    """Write inferences on single images into the table. They replace rows of the same case."""
    own = dict(dtype=args.dtype, threads=torch.get_num_threads() if args.device == 'cpu' else '',
               machine=processor() if args.device == 'cpu' else torch.cuda.get_device_name(),
               torch=version('torch'))
    rows = [dict(model=row['model'], height=row['height'], width=row['width'], ms=f'{row["ms"]:.2f}',
                 spread_percent=f'{row["+- %"]:.1f}' if row['+- %'] is not None else '',
                 peak_mb=f'{row["peak MB"]:.1f}' if row['peak MB'] is not None else '', **own)
            for row in results if row['what'] == 'inference' and row['batch'] == 1 and not isinstance(row['ms'], str)]

    def case(row):
        return tuple(str(row[key]) for key in FIELDS if key not in ('ms', 'spread_percent', 'peak_mb'))

    new = {case(row) for row in rows}
    write_rows(args.csv, FIELDS, [*(row for row in read_rows(args.csv) if case(row) not in new), *rows])


def slope(pixels, values):
    """Return the exponent of the power law that fits: 1 is linear in the number of pixels, 2 is quadratic."""
    return float(np.polyfit(np.log(pixels), np.log(values), 1)[0])


def draw(rows, path):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout='constrained')
    names = list(dict.fromkeys(row['model'] for row in rows))
    for panel, (key, label) in zip(panels, dict(ms='ms for an image', peak_mb='MB beyond model and image').items()):
        for index, name in enumerate(names):
            points = sorted((int(row['height']) * int(row['width']), float(row[key])) for row in rows
                            if row['model'] == name and row[key] and float(row[key]) > 0)
            if len(points) < 2:
                continue
            panel.plot(*zip(*points), '-' if name in OURS else '--', marker='o', markersize=4, color=f'C{index}',
                       label=f'{name}: {slope(*zip(*points)):.2f}')
        panel.set(xscale='log', yscale='log', xlabel='pixels', ylabel=label)
        panel.grid(which='both', alpha=0.25)
        panel.legend(title='exponent of growth', fontsize=8)
    one = rows[0]
    figure.suptitle(f'{one["machine"]}, {one["dtype"]}, torch {one["torch"]}'
                    + (f', {one["threads"]} threads' if one['threads'] else ''))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--sizes', type=image_size, nargs='+', metavar='SIZE', help='224 or 800x1333',
                        default=[(side, side) for side in (224, 384, 512, 768, 1024)])
    parser.add_argument('--batch', type=int, default=8,
                        help='batch size of throughput and training, at the first size (default: 8)')
    parser.add_argument('--dtype', choices=DTYPES, default='float32',
                        help='dtype of autocast (default: float32, without autocast)')
    parser.add_argument('--threads', type=int, help='number of threads on a CPU')
    parser.add_argument('--cpu-time', action='store_true',
                        help='measure the processor time of the calling thread; needs --threads 1')
    parser.add_argument('--inference', action='store_true', help='only measure inference on single images')
    parser.add_argument('--training', action='store_true', help='only measure the training step, at the first size')
    parser.add_argument('--models', nargs='+', help='names of models (default: all)')
    parser.add_argument('--rounds', type=int, default=5, help='number of rounds; models take turns (default: 5)')
    parser.add_argument('--seconds', type=float, default=0.5,
                        help='seconds for each model in each round (default: 0.5)')
    parser.add_argument('--quick', action='store_true', help='only the first size, in one round')
    parser.add_argument('--json', help='file for the measurements')
    parser.add_argument('--results', type=Path, help='table of all measurements; it is written anew after each size')
    parser.add_argument('--csv', type=Path, help='table of inferences on single images to extend')
    parser.add_argument('--plot', help='draw the table of --csv')
    args = parser.parse_args()
    if args.plot and not args.csv:
        parser.error('--plot draws a table: add --csv')
    if args.training and args.inference:
        parser.error('--training and --inference exclude each other')
    if args.cpu_time and args.threads != 1:
        parser.error('--cpu-time is the time of one thread: add --threads 1')
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.sizes, args.rounds, args.seconds = args.sizes[:1], 1, 0.1

    machine = describe_machine(args.device)
    print(f'{machine}\nbackbones, {args.dtype}; peak memory: beyond the model and its input\n')
    chosen = {name: build for name, build in builders(args.device).items() if not args.models or name in args.models}
    results = []
    for size in args.sizes[:1] if args.training else args.sizes:
        models = {name: build(size).to(args.device) for name, build in chosen.items()}
        plan = [] if args.training else [(1, False)]
        if size == args.sizes[0] and not args.inference:
            plan += [(args.batch, True)] if args.training else [(args.batch, False), (args.batch, True)]
        for batch, training in plan:
            results += compare(models, size, batch, training, args)
            if args.results:
                write_rows(args.results, list(dict.fromkeys(key for row in results for key in row)), results)
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(dict(machine=machine, dtype=args.dtype, results=results), file, indent=1)
    if args.csv:
        record(results, args)
    if args.plot:
        draw(read_rows(args.csv), args.plot)


if __name__ == '__main__':
    main()
