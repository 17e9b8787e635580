"""Mixed precision without a loss scaler."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from mmlocalmamba.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper, with the forward pass under autocast to bfloat16, on a CPU as on a GPU.

    Weights, their gradients and the optimizer keep 32 bits. bfloat16 has the range of float32, so there is no loss to
    scale. MMEngine's AmpOptimWrapper always makes a loss scaler of CUDA, and refuses machines without a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
