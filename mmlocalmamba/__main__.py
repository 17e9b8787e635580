"""``python -m mmlocalmamba``: ``doctor`` tells what is installed, which backends can run, and whether they compute
rightly; ``tune`` times the Triton scan kernels on this GPU and keeps the fastest block sizes."""
import argparse
import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from statistics import geometric_mean, median

import torch

from mmlocalmamba import __version__, ops
from mmlocalmamba.ops import tuning
from mmlocalmamba.scans import ScanTables, scan_tables

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
# How far candidates may differ from each other: rounding of inputs and outputs, and the order of sums.
_AGREE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# A candidate has to be faster than those before it by so much, so that noise does not choose.
_GAIN = 0.02


def _installed(distributions: tuple[str, ...]) -> str:
    found = []
    for name in distributions:
        try:
            found.append(f'{version(name)} ({name})')
        except PackageNotFoundError:
            pass
    return ', '.join(found) or 'not installed'


def _inputs(H: int, W: int, width: int, N: int, device: str, batch: int = 1,
            rank: int | None = None) -> tuple[dict[str, torch.Tensor], ScanTables]:
    """Of a scan with incomplete windows, in float32."""
    tables = scan_tables(('h', 'v_flip', 'w2', 'w3_flip'), H, W, device=device)
    K, L = tables.inv.shape
    generator = torch.Generator(device).manual_seed(0)
    shapes = dict(u=(batch, L, width), delta=(batch, K, L, rank or width), A=(K, width, N), B=(batch, K, L, N),
                  C=(batch, K, L, N), D=(K, width), delta_bias=(K, width))
    if rank:
        shapes['dt_weight'] = (K, width, rank)
    inputs = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    # Memories and step sizes short enough for float16.
    inputs['A'] = -1 - inputs['A'].abs()
    if rank:
        inputs['dt_weight'] /= rank ** 0.5
    return inputs, tables


def _run(backend: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Output and gradients of a small scan."""
    inputs, tables = _inputs(5, 7, 8, 4, device)
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    y = ops.directional_scan(**inputs, tables=tables, delta_softplus=True, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(inputs.values()))]


def _difference(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest relative difference; NaN if there is one."""
    errors = [((x.float() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(ours, exact, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def self_test(backend: str, device: str) -> tuple[float, float]:
    """Largest relative error of a small scan and its gradients, and the seconds that a second run takes."""
    exact = _run('reference', torch.float64, device)
    _run(backend, torch.float32, device)  # kernels are compiled or loaded now
    start = time.perf_counter()
    ours = [x.cpu() for x in _run(backend, torch.float32, device)]
    seconds = time.perf_counter() - start
    return _difference(ours, [y.cpu() for y in exact]), seconds


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
        if ops.triton.unavailable(torch.empty(0, device=device)) is None:
            print('\nBlock sizes of the Triton scan kernels:')
            for line in tuning.in_force(torch.device(device)):
                print(f'  {line}')
    if ops.cpu.instruction_sets():
        print(f'\nInstruction sets of the CPU kernels: {", ".join(ops.cpu.instruction_sets())}')
    return well


def _gpu_timer(function: Callable[[], object]) -> float:
    """Median milliseconds of calls, each with a cold cache."""
    from triton.testing import do_bench
    return do_bench(function, return_mode='median')


def tuning_shapes(quick: bool) -> list[dict[str, int]]:
    """Scans of LocalVMamba-T: many programs (224x224, batch 64), and few (800x1333, batch 2)."""
    return [dict(batch=batch, H=height // 4 >> stage, W=width // 4 >> stage, width=192 << stage, rank=6 << stage)
            for batch, height, width in ((64, 224, 224), (2, 800, 1333)) for stage in range(1 if quick else 4)]


def _measure(key: tuning.Key, shape: dict[str, int], device: str, rounds: int,
             timer: Callable[[Callable[[], object]], float]) -> dict[tuning.Choice, float]:
    """Milliseconds of each candidate, which take turns; infinite if it fails or computes something else."""
    dtype = getattr(torch, key.dtype)
    inputs, tables = _inputs(N=key.d_state, device=device, **shape)
    # Activations in 16 bits and parameters in 32, as under autocast.
    leaves = {name: x.to(dtype if name in ('u', 'delta', 'B', 'C') else torch.float32).requires_grad_()
              for name, x in inputs.items()}

    def forward():
        return (ops.directional_scan(**leaves, tables=tables, delta_softplus=True, backend='triton'), )

    def backward():
        return torch.autograd.grad(y, list(leaves.values()), grad_y, retain_graph=True)

    run, expected = forward, None
    if key.kernel == 'backward':
        run, (y, ) = backward, forward()
        grad_y = torch.ones_like(y)
    samples = {choice: [] for choice in tuning.CANDIDATES[key.kernel]}
    for _ in range(rounds):
        for choice, times in samples.items():
            if math.inf in times:
                continue
            with tuning.forced(key.kernel, choice):
                try:
                    if not times:  # kernels are compiled now
                        results = [x.detach() for x in run()]
                        expected = expected or [x.float() for x in results]
                        difference = _difference(results, expected)
                        del results
                        if not difference <= _AGREE[dtype]:
                            raise ArithmeticError(f'results differ by {difference:.1e}')
                    times.append(timer(run))
                except Exception as error:
                    # Where the built-in sizes fail, something else is wrong.
                    if choice == tuning.CANDIDATES[key.kernel][0]:
                        raise
                    print(f'  {choice} is left out: {type(error).__name__}: {error}')
                    times.append(math.inf)
    return {choice: math.inf if math.inf in times else median(times) for choice, times in samples.items()}


def _fastest(times: dict[tuning.Choice, list[float]]) -> tuning.Choice:
    """By the mean over shapes of how many times as fast it is; the first of those that are about as fast."""
    best, least = None, math.inf
    for choice, values in times.items():
        mean = geometric_mean(values)
        if best is None or mean < (1 - _GAIN) * least:
            best, least = choice, mean
    return best


def _tune(key: tuning.Key, shapes: list[dict[str, int]], *how) -> tuning.Choice | None:
    """Measure and print; None if there is not enough memory for any shape."""
    print(f'\n{key}')
    measured = {}
    for shape in shapes:
        name = '{batch}x{H}x{W}x{width}'.format(**shape)
        try:
            measured[name] = _measure(key, shape, *how)
        except torch.OutOfMemoryError:
            print(f'  {name} is left out: not enough memory')
    if not measured:
        return None
    candidates = tuning.CANDIDATES[key.kernel]
    times = {choice: [column[choice] for column in measured.values()] for choice in candidates}
    chosen = _fastest(times)
    margin = max(len(str(choice)) for choice in candidates)
    print(f'  {"":{margin}}' + ''.join(f'{name:>18}' for name in measured))
    for choice, values in times.items():
        print(f'  {choice!s:{margin}}' + ''.join(f'{ms:18.3f}' for ms in values)
              + '  built in' * (choice == candidates[0]) + '  chosen' * (choice == chosen), flush=True)
    return chosen


def tune(dtypes: list[str], states: list[int], quick: bool = False, device: str = 'cuda',
         shapes: list[dict[str, int]] | None = None,
         timer: Callable[[Callable[[], object]], float] = _gpu_timer) -> bool:
    """Time the candidates, print them, and write the fastest of each kernel, d_state and dtype to the file.

    Args:
        shapes: default :func:`tuning_shapes`.
        timer: milliseconds of a function.

    Returns:
        False if nothing could be timed; the file is then as it was.
    """
    gpu = tuning.gpu(torch.device(device))
    print(f'{gpu}; milliseconds for batch x height x width x channels')
    chosen = {}
    for dtype, N, kernel in product(dtypes, sorted({1 << (N - 1).bit_length() for N in states}), tuning.CANDIDATES):
        key = tuning.Key(gpu, kernel, N, dtype)
        chosen[key] = _tune(key, shapes or tuning_shapes(quick), device, 1 if quick else 3, timer)
    chosen = {key: choice for key, choice in chosen.items() if choice is not None}
    if chosen:
        tuning.save(chosen)
        print(f'\nWritten to {tuning.path()}')
    return bool(chosen)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


_positive.__name__ = 'positive integer'  # argparse names it in its message


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m mmlocalmamba', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('doctor', help='versions, backends, and a self-test of each')
    command = commands.add_parser('tune', help='choose block sizes of the Triton scan kernels for this GPU',
                                  description='The choice goes to ~/.cache/mmlocalmamba/tuning.json (or under '
                                              f'$XDG_CACHE_HOME), or to the file that ${tuning.CACHE_VARIABLE} names.')
    command.add_argument('--dtypes', nargs='+', choices=[str(dtype).removeprefix('torch.') for dtype in _AGREE],
                         default=['bfloat16', 'float32'], help='of the activations (default: %(default)s)')
    command.add_argument('--states', nargs='+', type=_positive, default=[16, 1],
                         help='d_state of the models (default: %(default)s)')
    command.add_argument('--quick', action='store_true', help='two shapes, once, instead of eight, three times')
    args = parser.parse_args()
    if args.command == 'doctor':
        raise SystemExit(0 if doctor() else 1)
    if not torch.cuda.is_available():
        raise SystemExit('There is no GPU: nothing to tune.')
    reason = ops.triton.unavailable(torch.empty(0, device='cuda'))
    if reason is not None:
        raise SystemExit(f'The Triton kernels cannot run here: {reason}.')
    raise SystemExit(0 if tune(args.dtypes, args.states, args.quick) else 1)


if __name__ == '__main__':
    main()
