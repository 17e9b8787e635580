"""What a loaded checkpoint holds: its state dict, the backbone in it, the size of that backbone."""
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmlocalmamba.weights.names import StateDict, from_official, is_official

# Where checkpoints keep their weights, in the order of search.
STATE_DICT_KEYS = ('state_dict', 'model', 'state_dict_ema')


def find_state_dict(checkpoint: Any, key: str | None = None) -> StateDict:
    """The state dict inside a loaded checkpoint: under ``key``, or under one of STATE_DICT_KEYS, or at the top.

    Raises:
        ValueError: there is none.
    """
    keys = STATE_DICT_KEYS if key is None else (key, )
    for name in keys:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    else:
        if key is not None:
            raise ValueError(f'the checkpoint has no entry {key!r}')
    if not isinstance(checkpoint, Mapping) or not checkpoint or \
            not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(f'no state dict at the top of the checkpoint nor under {", ".join(STATE_DICT_KEYS)}')
    return {name[len('module.'):] if name.startswith('module.') else name: value
            for name, value in checkpoint.items()}


def backbone_state_dict(checkpoint: Any, prefix: str | None = None) -> StateDict:
    """Weights of the backbone alone, under our names, from a loaded checkpoint of ours or of the authors.

    Args:
        checkpoint: what a checkpoint file holds.
        prefix: where the backbone is in it; None finds it at the top or under ``backbone.``.
    """
    weights = find_state_dict(checkpoint)
    if prefix is None and is_official(weights):
        weights, unmatched = from_official(weights)
        weights.update((f'backbone.{name}', find_state_dict(checkpoint)[name]) for name in unmatched)
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in weights) else ''
    prefix = prefix if not prefix or prefix.endswith('.') else f'{prefix}.'
    return {name[len(prefix):]: value for name, value in weights.items() if name.startswith(prefix)}


def architecture(weights: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """(class, blocks, channels) of a backbone's weights under our names; a stage is one entry; None for other weights.

    Args:
        weights: names as in the backbone's own state dict.
    """
    for arch, pattern in (('LocalVim', r'(layers)\.(\d+)\.mixer\.out_proj\.weight'),
                          ('LocalVMamba', r'stages\.(\d+)\.blocks\.(\d+)\.mixer\.out_proj\.weight')):
        found = [(match, weights[name]) for name in weights if (match := re.fullmatch(pattern, name))]
        if found:
            blocks, channels = {}, {}
            for match, weight in found:
                stage = match.group(1)
                blocks[stage] = max(blocks.get(stage, 0), int(match.group(2)) + 1)
                channels[stage] = len(weight)
            return arch, tuple(blocks.values()), tuple(channels.values())
    return None
