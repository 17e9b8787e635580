"""The native CPU kernels (csrc/): vectorised over channels, parallel over sequences and channels, with own backwards.

The extension is optional: without it :func:`unavailable` says why, and the PyTorch backends do the work. The
environment variable ``MMLOCALMAMBA_CPU_ISA`` (avx512, avx2 or portable) overrules the choice of the instruction set.
"""
from importlib import import_module

import torch
from torch import Tensor

from mmlocalmamba.ops import library

# Why the extension cannot be used, or None.
_missing: str | None = None
try:
    _cpu = import_module('mmlocalmamba.ops._cpu')
    if _cpu.TORCH_VERSION != torch.__version__.split('+')[0]:
        _missing = (f'the extension was built for torch {_cpu.TORCH_VERSION}, this is {torch.__version__}: '
                    'install the package again')
except ModuleNotFoundError:
    _missing = 'the extension is not built: install the package again, with torch and a C++ compiler at hand'
except ImportError as error:
    _missing = f'the extension cannot be loaded, install the package again ({error})'

OPERATORS = torch.ops.mmlocalmamba


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return OPERATORS.linear(x, weight, bias)


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor | None, src: Tensor | None) -> Tensor:
    return OPERATORS.directional_conv(x, weight, bias, src)


def scattn_sum(y: Tensor, z: Tensor | None, *weights) -> Tensor:
    return OPERATORS.scattn_sum(y, z, *weights)[0]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cos: Tensor | None,
                 sin: Tensor | None) -> tuple[Tensor, Tensor]:
    return OPERATORS.add_rms_norm(x, residual, weight, eps, cos, sin)


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, src: Tensor | None,
         inv: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
         in_scan_order: bool, dt_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`mmlocalmamba.ops.directional_scan`; returns y (B, K, L, D) and the last states (B, K, D, N)."""
    return library.run_scan(OPERATORS.directional_scan, u, delta, A, B, C, D, src, inv, delta_bias, delta_softplus,
                            in_scan_order, dt_weight)


def unavailable(u: Tensor) -> str | None:
    return 'it is for CPU tensors' if u.device.type != 'cpu' else _missing


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty without the extension."""
    return [] if _missing else _cpu.instruction_sets()
