"""The native CPU kernels (csrc/): vectorised over channels, parallel over sequences and channels, forward and backward.

The extension is optional: without it the backend says why it is unavailable, and a PyTorch backend runs. The
environment variable ``MMLOCALMAMBA_CPU_ISA`` (avx512, avx512_scaled, avx2 or portable) sets the instruction set.
The two with AVX-512 compute the exponentials of the forward scan in different ways: avx512_scaled is Intel's default.
"""
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmlocalmamba.directions import ScanTables
from mmlocalmamba.ops import library
from mmlocalmamba.ops.dispatch import Backend, ScanInputs


def _version(name: str) -> list[str]:
    return re.findall(r'\d+', name)[:2]


def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension and None, or None and the reason why it cannot be used.

    torch's C++ interface changes with its minor version, so only that is compared: nightly and vendors' builds add
    suffixes to it. A first call detects other incompatibilities of such a build.
    """
    again = 'install the package again, from its sources and with --no-build-isolation'
    try:
        extension = import_module('mmlocalmamba.ops._cpu')
    except ModuleNotFoundError:
        return None, f'the extension is not built: {again} where torch and a C++ compiler are installed'
    except ImportError as error:
        return None, f'the extension cannot be loaded: {again} ({error})'
    if _version(extension.TORCH_VERSION) != _version(torch.__version__):
        return None, (f'the extension was built for torch {extension.TORCH_VERSION}, this is {torch.__version__}: '
                      f'{again}')
    try:
        x = torch.tensor([[3., 4.]], dtype=torch.float32, device='cpu')
        out, _ = torch.ops.mmlocalmamba.add_rms_norm(x[None], None, torch.ones_like(x[0]), 0., None, None)
        right = torch.allclose(out[0] * 12.5 ** .5, x)
    except RuntimeError as error:
        return None, f'the extension does not run: {again} ({type(error).__name__}: {error})'
    return (extension, None) if right else (None, f'the extension computes wrongly: {again}')


def instruction_sets() -> list[str]:
    """Return the instruction sets that this machine can run, the best first; empty without the extension."""
    return [] if _EXTENSION is None else _EXTENSION.instruction_sets()


class CpuBackend(Backend):
    name = 'cpu'
    device_type = 'cpu'
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    low_rank_steps = True

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        return library.run_scan(inputs)

    def unavailable(self, u: Tensor) -> str | None:
        return 'it is for CPU tensors' if u.device.type != 'cpu' else _MISSING

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return library.call('linear', x, weight, bias)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return library.run_linear_gelu(x, weight, bias)

    def conv2d_silu(self, x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
        return library.call('conv2d_silu', x, weight, bias, *size)

    def norm_gate(self, *args: Any) -> Tensor:
        return library.call('norm_gate', *args)

    def directional_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, tables: ScanTables) -> Tensor:
        return library.call('directional_conv', x, weight, bias, tables.src, tables.inv)

    def scattn_sum(self, *args: Any) -> Tensor:
        return library.call('scattn_sum', *args)[0]

    def add_rms_norm(self, *args: Any) -> tuple[Tensor, Tensor]:
        return library.call('add_rms_norm', *args)


_EXTENSION, _MISSING = _load()
BACKEND = CpuBackend()
