"""Checkpoints of the authors, given as ``load_from``."""
import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn

from mmlocalmamba.backbones.base import LocalMambaBackbone
from mmlocalmamba.compat import weights_only
from mmlocalmamba.registry import HOOKS
from mmlocalmamba.weights.contents import backbone_state_dict, find_state_dict
from mmlocalmamba.weights.loading import check_architecture
from mmlocalmamba.weights.names import from_official, is_official


def _find_backbone(model: nn.Module) -> tuple[str, LocalMambaBackbone | None]:
    """Name of our backbone in a (wrapped) model, as checkpoints know it, and the backbone."""
    while is_model_wrapper(model) or (hasattr(model, 'module') and not hasattr(model, 'backbone')):
        model = model.module
    for name, module in model.named_modules():
        if isinstance(module, LocalMambaBackbone):
            return name, module
    return '', None


@HOOKS.register_module()
class OfficialCheckpointHook(Hook):
    """Checkpoints given as ``load_from``, for resuming or testing: the authors' are converted on the fly, and one that
    does not fill the backbone is refused, where MMEngine would go on with random weights. Nothing is loaded that would
    execute code.

    Args:
        strict: False reports what is missing and goes on.
    """

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict

    def before_run(self, runner: Any) -> None:
        if runner._load_from is not None:
            runner._load_from = weights_only(runner._load_from)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Convert ``checkpoint`` in place.

        Raises:
            RuntimeError: the checkpoint is of the other backbone; with ``strict``, weights of the backbone are missing
                or have another shape.
        """
        prefix, backbone = _find_backbone(runner.model)
        if backbone is None:
            return
        weights = find_state_dict(checkpoint)
        if is_official(weights):
            converted, unmatched = from_official(weights)
            print_log(f"converted {len(converted)} weights of the authors' format"
                      + (f'; not understood: {", ".join(unmatched)}' if unmatched else ''), logger='current')
            weights = {**converted, **{name: weights[name] for name in unmatched}}
        check_architecture(backbone_state_dict(weights, prefix), backbone, 'the checkpoint')
        own = {f'{prefix}.{name}' if prefix else name: value for name, value in backbone.state_dict().items()
               if not backbone.is_new_for_task(name)}
        bad = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
        if bad:
            message = (f'{len(bad)} of {len(own)} weights of {type(backbone).__name__} are missing in the checkpoint '
                       f'or have another shape: {", ".join(bad[:8])}{", ..." if len(bad) > 8 else ""}')
            if self.strict:
                raise RuntimeError(f'{message}\nThe checkpoint is of another model. If a partial match is what you '
                                   "want, set strict=False on the OfficialCheckpointHook in custom_hooks.")
            print_log(message, logger='current', level=logging.WARNING)
        checkpoint['state_dict'] = weights
