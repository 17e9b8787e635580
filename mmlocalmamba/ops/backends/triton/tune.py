"""``python -m mmlocalmamba tune``: time the Triton scan kernels on this GPU and save the fastest block sizes."""
import math
from collections.abc import Callable
from itertools import product
from statistics import geometric_mean, median

import torch

from mmlocalmamba import ops
from mmlocalmamba.ops.backends.triton import tuning
from mmlocalmamba.ops.self_test import relative_difference, scan_inputs

# Relative differences that candidates may have: from rounding of inputs and outputs, and from the order of sums.
AGREE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# A candidate has to be faster than those before it by this fraction, so that noise does not decide.
_GAIN = 0.02


def _gpu_timer(function: Callable[[], object]) -> float:
    """Return the median milliseconds of a call with a cold cache."""
    from triton.testing import do_bench
    return do_bench(function, return_mode='median')


def tuning_shapes(quick: bool) -> list[dict[str, int]]:
    """Return scans of LocalVMamba-T with many programs (224x224, batch 64) and with few (800x1333, batch 2)."""
    return [dict(batch=batch, H=height // 4 >> stage, W=width // 4 >> stage, width=192 << stage, rank=6 << stage)
            for batch, height, width in ((64, 224, 224), (2, 800, 1333)) for stage in range(1 if quick else 4)]


def _measure(key: tuning.Key, shape: dict[str, int], device: str, rounds: int,
             timer: Callable[[Callable[[], object]], float]) -> dict[tuning.Choice, float]:
    """Return the milliseconds of each candidate; infinite if it fails or its results differ. Candidates take turns."""
    dtype = getattr(torch, key.dtype)
    inputs, tables = scan_inputs(N=key.d_state, device=device, **shape)
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
    samples: dict[tuning.Choice, list[float]] = {choice: [] for choice in tuning.CANDIDATES[key.kernel]}
    for _ in range(rounds):
        for choice, times in samples.items():
            if math.inf in times:
                continue
            with tuning.forced(key.kernel, choice):
                try:
                    if not times:  # kernels are compiled now
                        results = [x.detach() for x in run()]
                        expected = expected or [x.float() for x in results]
                        difference = relative_difference(results, expected)
                        del results
                        if not difference <= AGREE[dtype]:
                            raise ArithmeticError(f'results differ by {difference:.1e}')
                    times.append(timer(run))
                except Exception as error:
                    # If the built-in sizes fail, the cause is not the choice of block sizes.
                    if choice == tuning.CANDIDATES[key.kernel][0]:
                        raise
                    print(f'  {choice} is left out: {type(error).__name__}: {error}')
                    times.append(math.inf)
    return {choice: math.inf if math.inf in times else median(times) for choice, times in samples.items()}


def _fastest(times: dict[tuning.Choice, list[float]]) -> tuning.Choice:
    """Return the candidate with the smallest geometric mean over shapes; of nearly equal ones, the first."""
    best, least = next(iter(times)), math.inf
    for choice, values in times.items():
        mean = geometric_mean(values)
        if mean < (1 - _GAIN) * least:
            best, least = choice, mean
    return best


def _tune(key: tuning.Key, shapes: list[dict[str, int]], *how) -> tuning.Choice | None:
    """Measure and print. Returns the fastest candidate, or None if the memory is too small for all shapes."""
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
    """Time the candidates, print them, and save the fastest of each kernel, d_state and dtype.

    Args:
        dtypes: Names of dtypes of the activations, such as 'bfloat16'.
        states: Values of d_state; they are rounded up to powers of two.
        quick: If True, measure one stage and one round.
        device: Device of the measurement.
        shapes: Arguments of the scans; default: :func:`tuning_shapes`.
        timer: Returns the milliseconds of a function.

    Returns:
        False if nothing could be timed. The file is then not changed.

    Raises:
        Exception: The first error of the built-in block sizes.
    """
    gpu = tuning.gpu(torch.device(device))
    print(f'{gpu}; milliseconds for batch x height x width x channels')
    chosen = {}
    for dtype, N, kernel in product(dtypes, sorted({1 << (N - 1).bit_length() for N in states}), tuning.CANDIDATES):
        key = tuning.Key(gpu, kernel, N, dtype)
        choice = _tune(key, shapes or tuning_shapes(quick), device, 1 if quick else 3, timer)
        if choice is not None:
            chosen[key] = choice
    if chosen:
        tuning.save(chosen)
        print(f'\nWritten to {tuning.path()}')
    return bool(chosen)
