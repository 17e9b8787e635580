"""Checkpoints given as ``load_from``, to resume or to test."""
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from mmlocalmamba.backbones.base import find_backbone
from mmlocalmamba.openmmlab.checks.model import heads
from mmlocalmamba.openmmlab.compat import weights_only
from mmlocalmamba.registry import HOOKS
from mmlocalmamba.weights.loading import REQUIREMENTS, adapted, fit, grouped, read, unwrap_model, weights_for


def unfilled(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters that a checkpoint leaves random: it has none of the name, or one of another shape."""
    return [name for name, value in model.named_parameters()
            if name not in weights or weights[name].shape != value.shape]


def other_classes(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Return a remedy that names both numbers of classes, if nothing else keeps a checkpoint from filling a model.

    A layer has one row for each class, or several (boxes, anchors), and perhaps one more for the background.
    """
    own, numbers = dict(model.named_parameters()), {head.num_classes for head in heads(model).values()}
    names = unfilled(model, weights)
    if not names or len(numbers) > 1 or any(
            name not in weights or weights[name].shape[1:] != own[name].shape[1:] for name in names):
        return ''
    count = numbers.pop() if numbers else min(len(own[name]) for name in names)
    possible = []
    for name in names:
        there, here = len(weights[name]), len(own[name])
        ratios = [((here - more) // count, more) for more in (0, 1) if here > more and (here - more) % count == 0]
        possible.append({(there - more) // ratio for ratio, more in ratios
                         if there > more and (there - more) % ratio == 0})
    found = set.intersection(*possible)
    if len(found) != 1:
        return ''
    classes, = found
    return (f'the checkpoint has {classes} classes, the configuration {count}: set num_classes to {classes} (model = '
            f"__import__('mmlocalmamba').with_classes(_base_.model, {classes})) and use data of the same classes, or "
            f'name a checkpoint of {count} classes.')


@HOOKS.register_module()
class LoadCheckpointHook(Hook):
    """Convert the authors' checkpoints on the fly, and refuse checkpoints that do not fill the model.

    It serves checkpoints given as ``load_from``, for resuming or testing. A training needs all weights of the backbone,
    a test all weights of the model; MMEngine alone would go on with random weights. No code in a file is executed.

    The hook runs before all others, because EMAHook loads what it finds in the checkpoint.

    Args:
        strict: False reports what is missing and goes on.
        key: entry of the checkpoint that holds the weights; None for the first of STATE_DICT_KEYS.
        allow: requirements of the weights that may differ: 'directions', 'stride', 'rope', 'cls_token'.
        channels, grid: see :func:`mmlocalmamba.weights.load_pretrained`.
    """
    priority = 'HIGHEST'

    def __init__(self, strict: bool = True, key: str | None = None, allow: Sequence[str] = (),
                 channels: str | None = None, grid: Sequence[int] | None = None) -> None:
        self.strict, self.key, self.allow, self.channels, self.grid = strict, key, allow, channels, grid

    def before_run(self, runner: Any) -> None:
        if runner._load_from is not None:
            runner._load_from = weights_only(runner._load_from)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Convert ``checkpoint`` in place; one of ours stays as it is.

        Raises:
            RuntimeError: the checkpoint is of the other backbone or for other scan directions; a training resumes from
                it and it is the authors', or holds weights alone; with ``strict``, weights of the backbone (in a test,
                of the model) are missing or have another shape.
            ValueError: it holds no weights, or those of a model without a counterpart here.
        """
        model = unwrap_model(runner.model)
        prefix, backbone = find_backbone(model)
        if backbone is None:
            return
        contents = read(checkpoint, self.key, prefix)
        # MMEngine would complain about one missing entry after the other.
        if runner._resume and (contents.family is not None or 'message_hub' not in checkpoint):
            held = 'holds only weights, no training state' if contents.family is None else \
                f"is of {contents.family}'s authors"
            raise RuntimeError(f'the checkpoint {held}: a training cannot resume from it. To start from its weights, '
                               'set load_from without resume')
        own, weights = weights_for(contents, backbone, 'the checkpoint', self.allow, self.channels, self.grid)
        found = fit(backbone, own)
        lines = []
        if found.missing or found.unfit:
            lines.append(found.report(type(backbone).__name__, 'the checkpoint'))
        if not isinstance(runner._train_loop, BaseLoop):  # a test: what is missing stays random
            told = {contents.prefix + name for name in (*found.missing, *found.unfit)}
            random = [name for name in unfilled(model, weights) if name not in told]
            if random:
                lines.append(f'{len(random)} more parameters of {type(model).__name__} are not in the checkpoint or '
                             f'have another shape, and this is a test, not a training: {", ".join(grouped(random))}')
            remedy = other_classes(model, weights) or (
                'The checkpoint is of another model: name the configuration that it was trained with.')
        else:
            remedy = ('The checkpoint is of another model. If you want a partial match, set strict=False on the '
                      'LoadCheckpointHook in custom_hooks.')
        if lines and self.strict:
            raise RuntimeError('\n'.join([*lines, remedy]))
        if contents.family is not None or self.channels is not None:
            lines = [*contents.remarks, *lines]
        if lines:
            print_log('\n  '.join(lines), logger='current', level=logging.WARNING)
        raw = checkpoint.get('state_dict', {})
        if not self.allow and raw.keys() == weights.keys() and all(raw[name] is weights[name] for name in raw):
            return
        checkpoint['state_dict'] = adapted(weights, backbone, contents.prefix, {
            name: {key: value for key, value in entry.items() if key not in REQUIREMENTS or key not in self.allow}
            for name, entry in contents.metadata.items()})


@HOOKS.register_module()
class OfficialCheckpointHook(LoadCheckpointHook):
    """The former name of :class:`LoadCheckpointHook`, for one version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn('OfficialCheckpointHook is called LoadCheckpointHook now: change its name in custom_hooks',
                      FutureWarning, stacklevel=2)
        super().__init__(*args, **kwargs)
