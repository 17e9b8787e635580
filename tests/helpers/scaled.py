"""AmpOptimWrapper on a CPU, for tests: MMEngine's asks for a GPU before it does anything."""
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module(force=True)
class ScaledOptimWrapper(AmpOptimWrapper):
    """Autocast to bfloat16, and torch's own loss scaler.

    Args:
        scaler: options of torch's GradScaler.
        static: a scale that stays, as ``loss_scale=512.``.
    """

    def __init__(self, scaler=None, static=None, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', **(scaler or {}))
        self._scale_update_param = static
        self.cast_dtype = torch.bfloat16
