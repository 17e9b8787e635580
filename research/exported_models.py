"""Compare runtimes for exported backbones: processor time of an image, 224 x 224, one thread, in turns.

    python research/exported_models.py LocalVMamba-T Swin-T [--rounds 12] [--folder FILES]

The time is the process's own (user), the least of all rounds, so that other work on the machine counts little.
`kernel` is OpenVINO with our extension, which is compiled once. Models are those of latency.py. Errors are relative to
the largest value, against PyTorch.
"""
import argparse
import os
import resource
import tempfile

import latency
import numpy as np
import torch

from mmlocalmamba.deployment import openvino_kernel, runtimes

SIZE = 224


def by_kernel(path, library):
    import openvino
    model = openvino_kernel.with_kernel(path, library)
    compiled = openvino.Core().compile_model(model, 'CPU', dict(
        PERFORMANCE_HINT='LATENCY', INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=1))
    return lambda images: list(compiled([images]).values())


def functions(name, folder):
    """Yield (runtime, function images -> outputs) of a model."""
    model = latency.graph_of(name, SIZE)
    yield 'eager', lambda images: [value.numpy() for value in model(torch.from_numpy(images))]
    path = latency.exported(name, SIZE, 'onnxruntime', folder)
    for runtime in ('onnxruntime', 'openvino'):
        yield runtime, runtimes.open_file(path, runtime, 1).run
    if 'Mamba' in name or 'Vim' in name:
        library = os.path.join(folder, runtimes.LIBRARY)
        if not os.path.exists(library):
            openvino_kernel.build(library)
        yield 'kernel', by_kernel(path, library)


def user_seconds():
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


@torch.no_grad()
def measure(names, rounds, folder):
    torch.set_num_threads(1)
    images = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    cases = [(name, runtime, run, []) for name in names for runtime, run in functions(name, folder)]
    outputs = {(name, runtime): run(images)[-1] for name, runtime, run, _ in cases}
    for _ in range(rounds):
        for _, _, run, times in cases:
            start = user_seconds()
            run(images)
            times.append(user_seconds() - start)
    for name, runtime, _, times in cases:
        expected = outputs[name, 'eager']
        error = np.abs(outputs[name, runtime] - expected).max() / np.abs(expected).max()
        print(f'{name:18}{runtime:12}{1e3 * min(times):7.0f} ms, median {1e3 * np.median(times):.0f}, '
              f'error {error:.1e}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', help='names, see latency.py')
    parser.add_argument('--rounds', type=int, default=12, help='images of each case (default: 12)')
    parser.add_argument('--folder', help='folder of the exported files (default: a temporary folder)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.models, args.rounds, args.folder or temporary)


if __name__ == '__main__':
    main()
