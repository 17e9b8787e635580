"""The backend ``cuda``: an adapter to the CUDA kernel of an installed ``mamba_ssm``.

It runs where Triton cannot, and as a peer in benchmarks. The kernel scans sequences (B, D, L), so this module gathers
the tokens by the table first and puts the outputs back: permuted copies that :mod:`mmlocalmamba.ops.backends.triton`
does without. The kernel sums the gradients of B and C by atomics, so their last bits differ from run to run.
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
    """Return mamba_ssm's function and None, or None and the reason why it cannot be used."""
    try:
        interface = import_module('mamba_ssm.ops.selective_scan_interface')
        function = interface.selective_scan_fn
    except ModuleNotFoundError as error:
        return None, f'mamba_ssm is not installed ({error})'
    except Exception as error:  # a binary for another torch or CUDA fails in many ways
        return None, f'mamba_ssm is installed, but cannot be imported ({type(error).__name__}: {error})'
    # Versions after 2.3.2 import without the extension, and raise an error when the function is called.
    extension = getattr(interface, 'selective_scan_cuda', function)
    if extension is None:
        return None, 'mamba_ssm is installed without its extension selective_scan_cuda'
    for found in (function, getattr(extension, 'fwd', function)):
        if (found.__module__ or '').startswith('mmlocalmamba.ops.stand_ins'):  # it would call this backend again
            return None, 'mmlocalmamba.ops.stand_ins stands in for mamba_ssm or its extension'
    return function, None


class _WithoutGradient(torch.autograd.Function):
    """Refuse gradients of the last state. mamba_ssm ignores them, so the others would silently be wrong."""

    @staticmethod
    def forward(ctx, last, y):
        return last

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("mamba_ssm has no gradient of the last state: use backend='triton' or 'chunked'")


class MambaSsmBackend(Backend):
    name = 'cuda'
    device_type = 'cuda'
    dtypes = (torch.float32, )

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        u, delta, B, C = inputs.u, inputs.delta, inputs.B, inputs.C
        if not inputs.in_scan_order:
            u, delta, B, C = (to_scan_order(x, inputs.src, inputs.inv) for x in (u, delta, B, C))
        batch, K, steps, width = u.shape

        def sequences(x: Tensor) -> Tensor:  # (B, K, T, D) -> (B, K * D, T)
            return x.transpose(2, 3).reshape(batch, K * width, steps)

        def parameters(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten(0, 1)

        # Directions are its groups: B and C (B, K, N, T) serve D channels each.
        function, _ = _import()
        y, last = function(sequences(u), sequences(delta), parameters(inputs.A), B.transpose(2, 3).contiguous(),
                           C.transpose(2, 3).contiguous(), D=parameters(inputs.D), z=None,
                           delta_bias=parameters(inputs.delta_bias), delta_softplus=inputs.delta_softplus,
                           return_last_state=True)
        y = y.view(batch, K, width, steps).transpose(2, 3)
        last = _WithoutGradient.apply(last, y).view(batch, K, width, -1)
        return (y if inputs.inv is None else from_scan_order(y, inputs.src, inputs.inv)), last

    def unavailable(self, u: Tensor) -> str | None:
        if u.device.type != 'cuda':
            return 'it is for CUDA tensors'
        if u.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f'it computes in float32, and does not take {u.dtype}'
        return _import()[1]


BACKEND = MambaSsmBackend()
