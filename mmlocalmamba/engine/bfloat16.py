"""Mixed precision without a loss scaler."""
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmlocalmamba.registry import OPTIM_WRAPPERS


@cache
def _has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper, with the forward pass under autocast to bfloat16, on a CPU as on a GPU.

    Weights, their gradients and the optimizer keep 32 bits. bfloat16 has the range of float32, so there is no loss to
    scale. MMEngine's AmpOptimWrapper always makes a loss scaler of CUDA, and refuses machines without a GPU.

    On a processor for which oneDNN has no products in bfloat16 (x86 without AVX-512) it warns once: they are computed
    by slower means than those in float32.
    """

    _warned = False

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        if device == 'cpu' and not self._warned and not _has_bfloat16():
            self._warned = True
            warnings.warn('this processor has no fast products in bfloat16: training takes several times as long as in '
                          "float32, and saves nothing but memory. Leave --amp away, or take optim_wrapper.type="
                          "'OptimWrapper'", stacklevel=3)
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
