"""Adapter to the CUDA kernel of an installed ``mamba_ssm``: where Triton cannot run, and as a peer in benchmarks.

It scans ready-made sequences (B, D, L), so tokens are gathered by the table first and outputs put back: the permuted
copies that :mod:`mmlocalmamba.ops.triton` does without. Its gradients of B and C are summed by atomics, hence differ in
the last bits from run to run.
"""
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import Backend, ScanInputs
from mmlocalmamba.ops.scan_order import from_scan_order, to_scan_order


@cache
def _import() -> tuple[Any, str | None]:
    """mamba_ssm's function, or None and the reason why it is not there."""
    try:
        function = import_module('mamba_ssm.ops.selective_scan_interface').selective_scan_fn
    except ModuleNotFoundError as error:
        return None, f'mamba_ssm is not installed ({error})'
    except Exception as error:  # a binary for another torch or CUDA fails in many ways
        return None, f'mamba_ssm is installed, but cannot be imported ({type(error).__name__}: {error})'
    if function.__module__ == 'mmlocalmamba.ops.mamba':  # would call this again
        return None, 'mmlocalmamba.ops.mamba stands in for mamba_ssm'
    return function, None


class _WithoutGradient(torch.autograd.Function):
    """mamba_ssm ignores gradients of the last state, which would be wrong in silence."""

    @staticmethod
    def forward(ctx, last, y):
        return last

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("mamba_ssm knows no gradient of the last state: use backend='triton' or 'chunked'")


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """See :func:`mmlocalmamba.ops.directional_scan`; returns y (B, K, L, D) and the last states (B, K, D, N)."""
    u, delta, A, B, C, D, src, inv, delta_bias, _, delta_softplus, in_scan_order = inputs
    if not in_scan_order:
        u, delta, B, C = (to_scan_order(x, src, inv) for x in (u, delta, B, C))
    batch, K, steps, width = u.shape

    def sequences(x: Tensor) -> Tensor:  # (B, K, T, D) -> (B, K * D, T)
        return x.transpose(2, 3).reshape(batch, K * width, steps)

    def parameters(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten(0, 1)

    # Directions are its groups: B and C (B, K, N, T) serve D channels each.
    y, last = _import()[0](sequences(u), sequences(delta), parameters(A), B.transpose(2, 3).contiguous(),
                           C.transpose(2, 3).contiguous(), parameters(D), None, parameters(delta_bias),
                           delta_softplus, True)
    y = y.view(batch, K, width, steps).transpose(2, 3)
    last = _WithoutGradient.apply(last, y).view(batch, K, width, -1)
    return (y if inv is None else from_scan_order(y, src, inv)), last


def unavailable(u: Tensor) -> str | None:
    if u.device.type != 'cuda':
        return 'it is for CUDA tensors'
    if u.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'it computes in float32, and does not take {u.dtype}'
    return _import()[1]


BACKEND = Backend('cuda', scan, unavailable, home='cuda', dtypes=(torch.float32, ))
