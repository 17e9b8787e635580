"""``python -m mmlocalmamba doctor``: what is installed, which backends can run, and whether they compute rightly."""
import argparse
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from mmlocalmamba import __version__, ops
from mmlocalmamba.scans import scan_tables

# What is imported, and the distributions that may bring it.
_STACK = {
    'torch': ('torch', ),
    'triton': ('triton', ),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv', 'mmcv-lite'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mamba_ssm': ('mamba-ssm', ),
}
# Relative errors beyond which a backend is called wrong: float32 arithmetic stays far below.
_LIMIT = 1e-4


def _installed(distributions: tuple[str, ...]) -> str:
    found = []
    for name in distributions:
        try:
            found.append(f'{version(name)} ({name})')
        except PackageNotFoundError:
            pass
    return ', '.join(found) or 'not installed'


def _run(backend: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Output and gradients of a small scan with incomplete windows."""
    tables = scan_tables(('h', 'v_flip', 'w2', 'w3_flip'), 5, 7, device=device)
    K, L, D, N = 4, 35, 8, 4
    generator = torch.Generator().manual_seed(0)
    shapes = dict(u=(1, L, D), delta=(1, K, L, D), A=(K, D, N), B=(1, K, L, N), C=(1, K, L, N), D=(K, D),
                  delta_bias=(K, D))
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs['A'] = -inputs['A'].abs()
    inputs = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    y = ops.directional_scan(**inputs, tables=tables, delta_softplus=True, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(inputs.values()))]


def self_test(backend: str, device: str) -> tuple[float, float]:
    """Largest relative error of a small scan and its gradients, and the seconds that a second run takes."""
    exact = _run('reference', torch.float64, device)
    _run(backend, torch.float32, device)  # kernels are compiled or loaded now
    start = time.perf_counter()
    ours = [x.cpu() for x in _run(backend, torch.float32, device)]
    seconds = time.perf_counter() - start
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(ours, (y.cpu() for y in exact))), seconds


def doctor() -> bool:
    """Print the report; False if a backend computes wrongly or fails."""
    print(f'mmlocalmamba {__version__}, Python {platform.python_version()}, {platform.platform()}')
    for name, distributions in _STACK.items():
        print(f'  {name:12}{_installed(distributions)}')
    devices = ['cpu']
    if torch.cuda.is_available():
        devices.append('cuda')
        print(f'  {"GPU":12}{torch.cuda.get_device_name()}, CUDA {torch.version.cuda or torch.version.hip}')
    well = True
    for device in devices:
        print(f'\nBackends for {device} tensors, in the order of preference:')
        for name, reason in ops.available_backends(torch.empty(0, device=device)).items():
            if reason is not None:
                print(f'  {name:12}no: {reason}')
                continue
            try:
                error, seconds = self_test(name, device)
            except Exception as problem:  # the very thing a doctor is asked about
                print(f'  {name:12}FAILS: {type(problem).__name__}: {problem}')
                well = False
                continue
            right = error <= _LIMIT  # NaN is not
            well &= right
            print(f'  {name:12}{"yes" if right else "WRONG"}: relative error {error:.1e}, '
                  f'{1e3 * seconds:.1f} ms for a small scan and its gradients')
    if ops.cpu.instruction_sets():
        print(f'\nInstruction sets of the CPU kernels: {", ".join(ops.cpu.instruction_sets())}')
    return well


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m mmlocalmamba', description=__doc__.splitlines()[0])
    parser.add_argument('command', choices=['doctor'])
    parser.parse_args()
    raise SystemExit(0 if doctor() else 1)


if __name__ == '__main__':
    main()
