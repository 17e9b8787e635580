"""The native CPU kernels (csrc/): vectorised over channels, parallel over sequences and channels, with own backwards.

The extension is optional: without it :func:`unavailable` says why, and the PyTorch backends do the work. The
environment variable ``MMLOCALMAMBA_CPU_ISA`` (avx512, avx2 or portable) overrules the choice of the instruction set.
"""
import re
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from mmlocalmamba.ops import library
from mmlocalmamba.ops.dispatch import Backend


def _version(name: str) -> list[str]:
    return re.findall(r'\d+', name)[:2]


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or the reason why it cannot be used.

    torch's C++ interface changes with its minor version, whatever stands behind it in the names of nightly and vendors'
    builds. What such a build may have changed besides, a first call shows.
    """
    again = 'install the package again'
    try:
        extension = import_module('mmlocalmamba.ops._cpu')
    except ModuleNotFoundError:
        return None, f'the extension is not built: {again}, with torch and a C++ compiler at hand'
    except ImportError as error:
        return None, f'the extension cannot be loaded, {again} ({error})'
    if _version(extension.TORCH_VERSION) != _version(torch.__version__):
        return None, (f'the extension was built for torch {extension.TORCH_VERSION}, this is {torch.__version__}: '
                      f'{again}')
    try:
        x = torch.tensor([[3., 4.]], dtype=torch.float32, device='cpu')
        out, _ = torch.ops.mmlocalmamba.add_rms_norm(x[None], None, torch.ones_like(x[0]), 0., None, None)
        right = torch.allclose(out[0] * 12.5 ** .5, x)
    except RuntimeError as error:
        return None, f'the extension does not run, {again} ({type(error).__name__}: {error})'
    return (extension, None) if right else (None, f'the extension computes wrongly: {again}')


def unavailable(u: Tensor) -> str | None:
    return 'it is for CPU tensors' if u.device.type != 'cpu' else _MISSING


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty without the extension."""
    return [] if _EXTENSION is None else _EXTENSION.instruction_sets()


_EXTENSION, _MISSING = _load()
BACKEND = Backend(
    'cpu',
    library.run_scan,
    unavailable,
    home='cpu',
    dtypes=(torch.float32, torch.float64, torch.bfloat16),
    low_rank_steps=True,
    linear=lambda *args: library.call('linear', *args),
    directional_conv=lambda x, weight, bias, tables: library.call('directional_conv', x, weight, bias, *tables),
    scattn_sum=lambda *args: library.call('scattn_sum', *args)[0],
    add_rms_norm=lambda *args: library.call('add_rms_norm', *args))
