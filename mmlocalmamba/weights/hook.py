"""Whole checkpoints: given as ``load_from``, to resume, to test."""
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop
from torch import nn

from mmlocalmamba.backbones.base import FACTS, find_backbone
from mmlocalmamba.compat import weights_only
from mmlocalmamba.registry import HOOKS
from mmlocalmamba.weights.contents import read
from mmlocalmamba.weights.loading import adapted, fit, grouped


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or (hasattr(model, 'module') and not hasattr(model, 'backbone')):
        model = model.module
    return model


@HOOKS.register_module()
class OfficialCheckpointHook(Hook):
    """Checkpoints given as ``load_from``, for resuming or testing: the authors' are converted on the fly, and one that
    does not fill the backbone, or, in a test, the model, is refused, where MMEngine would go on with random weights.
    Nothing is loaded that would execute code.

    It comes before all other hooks: EMAHook loads what it finds in the checkpoint.

    Args:
        strict: False reports what is missing and goes on.
        key: entry of the checkpoint that holds the weights; None for the first of STATE_DICT_KEYS.
        allow: what may differ from what the weights need: 'directions', 'stride', 'rope'.
    """
    priority = 'HIGHEST'

    def __init__(self, strict: bool = True, key: str | None = None, allow: Sequence[str] = ()) -> None:
        self.strict, self.key, self.allow = strict, key, allow

    def before_run(self, runner: Any) -> None:
        if runner._load_from is not None:
            runner._load_from = weights_only(runner._load_from)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Convert ``checkpoint`` in place; one of ours stays as it is.

        Raises:
            RuntimeError: the checkpoint is of the other backbone, or for other scan directions; it is the authors', or
                weights alone, and a training shall resume from it; with ``strict``, weights of the backbone (in a test,
                of the model) are missing or have another shape.
            ValueError: there are no weights in it, or of a model that has no counterpart here.
        """
        model = _unwrapped(runner.model)
        prefix, backbone = find_backbone(model)
        if backbone is None:
            return
        contents = read(checkpoint, self.key, prefix)
        # MMEngine would miss one entry after the other.
        if runner._resume and (contents.family is not None or 'message_hub' not in checkpoint):
            what = 'has weights alone, no state of a training' if contents.family is None else \
                f"is of {contents.family}'s authors"
            raise RuntimeError(f'the checkpoint {what}: a training cannot resume from it, but start, with load_from '
                               'and without resume')
        own, weights = adapted(contents, backbone, 'the checkpoint', self.allow)
        found = fit(backbone, own)
        lines = []
        if found.missing or found.unfit:
            lines.append(found.report(type(backbone).__name__, 'the checkpoint'))
        if not isinstance(runner._train_loop, BaseLoop):  # nothing will be trained: whatever is missing stays random
            told = {contents.prefix + name for name in (*found.missing, *found.unfit)}
            random = [name for name, value in model.named_parameters()
                      if name not in told and (name not in weights or weights[name].shape != value.shape)]
            if random:
                lines.append(f'{len(random)} more parameters of {type(model).__name__} are not in the checkpoint or '
                             f'have another shape, and this is a test, not a training: {", ".join(grouped(random))}')
        if lines and self.strict:
            report = '\n'.join(lines)
            raise RuntimeError(f'{report}\nThe checkpoint is of another model. If a partial match is what you want, '
                               'set strict=False on the OfficialCheckpointHook in custom_hooks.')
        if contents.family is not None:
            lines = [*contents.remarks, *lines]
        if lines:
            print_log('\n  '.join(lines), logger='current', level=logging.WARNING)
        raw = checkpoint.get('state_dict', {})
        if not self.allow and raw.keys() == weights.keys() and all(raw[name] is weights[name] for name in raw):
            return
        checkpoint['state_dict'] = OrderedDict(weights)
        checkpoint['state_dict']._metadata = OrderedDict(
            (name, {key: value for key, value in entry.items() if key not in FACTS or key not in self.allow})
            for name, entry in contents.metadata.items())
