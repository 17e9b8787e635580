"""The native CPU kernels (csrc/): vectorised over channels, parallel over sequences and channels, with own backwards.

The extension is optional: without it :func:`unavailable` says why, and the PyTorch backends do the work. The
environment variable ``MMLOCALMAMBA_CPU_ISA`` (avx512, avx2 or portable) overrules the choice of the instruction set.
"""
from importlib import import_module

import torch
from torch import Tensor

from mmlocalmamba.ops import library
from mmlocalmamba.ops.dispatch import Backend

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

def unavailable(u: Tensor) -> str | None:
    return 'it is for CPU tensors' if u.device.type != 'cpu' else _missing


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty without the extension."""
    return [] if _missing else _cpu.instruction_sets()


OPERATORS = torch.ops.mmlocalmamba
BACKEND = Backend(
    'cpu',
    lambda inputs: library.run_scan(OPERATORS.directional_scan, inputs),
    unavailable,
    home='cpu',
    low_rank_steps=True,
    linear=OPERATORS.linear,
    directional_conv=lambda x, weight, bias, tables: OPERATORS.directional_conv(x, weight, bias, tables.src),
    scattn_sum=lambda *args: OPERATORS.scattn_sum(*args)[0],
    add_rms_norm=OPERATORS.add_rms_norm)
