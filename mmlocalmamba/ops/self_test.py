"""Tests of this machine: a small scan and its gradients on one backend against the reference, and torch's convolutions.

Some versions of torch convolve wrongly in bfloat16 on some CPUs.
"""
import math
import time
from typing import Any

import torch
import torch.nn.functional as F

from mmlocalmamba import ops
from mmlocalmamba.directions import ScanTables, scan_tables

# A backend with a larger relative error is wrong. The errors of float32 arithmetic are far smaller.
LIMIT = 1e-4
# For one operation in bfloat16, whose rounding error is 0.003.
LIMIT_BFLOAT16 = 0.02


def scan_inputs(H: int, W: int, width: int, N: int, device: str, batch: int = 1,
                rank: int | None = None) -> tuple[dict[str, torch.Tensor], ScanTables]:
    """Return random inputs (float32) and tables of a scan with incomplete windows.

    Args:
        H, W: Rows and columns of the token grid.
        width, N: Channels and states.
        device: Device of the tensors.
        batch: Images.
        rank: Rank of the step sizes; None: delta (B, K, L, D) and no ``dt_weight``.
    """
    tables = scan_tables(('h', 'v_flip', 'w2', 'w3_flip'), H, W, device=device)
    K, L = tables.inv.shape
    generator = torch.Generator(device).manual_seed(0)
    shapes = dict(u=(batch, L, width), delta=(batch, K, L, rank or width), A=(K, width, N), B=(batch, K, L, N),
                  C=(batch, K, L, N), D=(K, width), delta_bias=(K, width))
    if rank:
        shapes['dt_weight'] = (K, width, rank)
    inputs = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    # Decays and step sizes that float16 can represent.
    inputs['A'] = -1 - inputs['A'].abs()
    if rank:
        inputs['dt_weight'] /= rank ** 0.5
    return inputs, tables


def _run(backend: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return the output and the gradients of a small scan."""
    inputs, tables = scan_inputs(5, 7, 8, 4, device)
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    y: Any = ops.directional_scan(**inputs, tables=tables, delta_softplus=True, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(inputs.values()))]


def relative_difference(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return the largest relative difference of two lists of tensors, or NaN if any is NaN."""
    errors = [((x.float() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(ours, exact, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def self_test(backend: str, device: str) -> tuple[float, float]:
    """Return the largest relative error of a small scan and its gradients, and the seconds of a second run."""
    exact = _run('reference', torch.float64, device)
    _run(backend, torch.float32, device)  # kernels are compiled or loaded now
    start = time.perf_counter()
    ours = [x.cpu() for x in _run(backend, torch.float32, device)]
    seconds = time.perf_counter() - start
    return relative_difference(ours, [y.cpu() for y in exact]), seconds


# Channels, kernel, stride, padding, size of the output. oneDNN 3.10 with AMX computes all of these wrongly.
_CONVOLUTIONS = ((4, 16, 16, 0, (2, 7)), (3, 2, 2, 0, (9, 1)), (256, 3, 2, 1, (4, 1)))


def convolution_error() -> float:
    """Return the largest relative error of torch's convolutions in bfloat16 on the CPU."""
    ours, exact = [], []
    for channels, kernel, stride, padding, size in _CONVOLUTIONS:
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, channels, *((count - 1) * stride + kernel - 2 * padding for count in size),
                            generator=generator).bfloat16()
        weight = torch.randn(64, channels, kernel, kernel, generator=generator).bfloat16()
        ours.append(F.conv2d(image, weight, stride=stride, padding=padding))
        exact.append(F.conv2d(image.float(), weight.float(), stride=stride, padding=padding))
    return relative_difference(ours, exact)
