"""Mixed precision in bfloat16, without a loss scaler."""
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmlocalmamba.registry import OPTIM_WRAPPERS


@cache
def _has_bfloat16() -> bool:
    """Return True if oneDNN has bfloat16 matrix products for this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper with the forward pass under autocast to bfloat16, on CPUs and GPUs.

    Weights, gradients and the optimizer stay in float32. bfloat16 has the range of float32, so the loss is not scaled.
    MMEngine's AmpOptimWrapper always creates a CUDA loss scaler and refuses machines without a GPU.

    Args:
        dtype: as in AmpOptimWrapper: 'bfloat16', torch.bfloat16 or None, which mean the same.
        **kwargs: arguments of OptimWrapper.

    Raises:
        ValueError: if ``dtype`` is another one.

    Warns once on a processor for which oneDNN has no bfloat16 matrix products (x86 without AVX-512): they are slower
    there than in float32.
    """

    _warned = False

    def __init__(self, dtype: str | torch.dtype | None = None, **kwargs: Any) -> None:
        if dtype not in (None, 'bfloat16', torch.bfloat16):
            raise ValueError(f"BFloat16OptimWrapper computes in bfloat16, got dtype={dtype!r}: remove dtype, or set "
                             "optim_wrapper.type='AmpOptimWrapper', which needs a GPU")
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        if device == 'cpu' and not self._warned and not _has_bfloat16():
            self._warned = True
            warnings.warn('this processor has no fast bfloat16 matrix products: training takes several times as long '
                          "as in float32 and only saves memory. Remove --amp, or set optim_wrapper.type='OptimWrapper'",
                          stacklevel=3)
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
