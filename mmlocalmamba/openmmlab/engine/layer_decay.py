"""Layer-wise decay of learning rates."""
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmlocalmamba.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor with learning rates that decay from the backbone's output to its input.

    A backbone parameter at depth d of n gets ``lr * decay_rate ** (n - 1 - d)``; the backbone's ``get_layer_depth``
    returns d and n. All other parameters keep ``lr``. The other options of ``paramwise_cfg`` work as in MMEngine.

    Args:
        optim_wrapper_cfg: see DefaultOptimWrapperConstructor.
        paramwise_cfg: see DefaultOptimWrapperConstructor; ``decay_rate`` in (0, 1] is required.

    Raises:
        ValueError: if ``decay_rate`` is missing or out of range.
        TypeError: if the model has no backbone with ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('decay_rate')
        if rate is None or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg needs decay_rate in (0, 1], got {rate}')
        self.decay_rate = rate

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   is_dcn_module: int | float | None = None) -> None:
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        backbone = getattr(module, 'backbone', None)
        if backbone is None or not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(f'layer decay needs model.backbone.get_layer_depth; {type(module).__name__} has the '
                            f'backbone {type(backbone).__name__}')
        names = {parameter: name for name, parameter in backbone.named_parameters()}
        for group in params:
            name = names.get(group['params'][0])
            if name is not None:
                depth, count = backbone.get_layer_depth(name)
                group['lr_scale'] = self.decay_rate ** (count - 1 - depth)
                group['lr'] = group.get('lr', self.base_lr) * group['lr_scale']
