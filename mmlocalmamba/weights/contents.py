"""What a loaded checkpoint holds: which state dict is taken, the backbone in it, its size, and what it needs."""
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mmlocalmamba.backbones.base import FACTS
from mmlocalmamba.weights.families import BACKBONE, family_of, implied_facts, remarks
from mmlocalmamba.weights.names import StateDict, from_official

# Where checkpoints keep their weights, in the order of search: averages only where there is nothing else.
STATE_DICT_KEYS = ('state_dict', 'model', 'state_dict_ema', 'model_ema', 'ema_model', 'ema_state_dict')
# What DistributedDataParallel, averages of them, and torch.compile put before names.
_WRAPPERS = re.compile(r'^(?:module\.|_orig_mod\.)+')


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


def _unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {_WRAPPERS.sub('', name): value for name, value in state_dict.items()}


def _entry(checkpoint: Any, key: str | None) -> tuple[str | None, Mapping[str, Tensor]]:
    """The entry that holds the weights, None being the top, and them as they are."""
    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    if key is not None and not isinstance(found.get(key), Mapping):
        entries = [name for name in found if _is_state_dict(found[name])]
        raise ValueError(f'the checkpoint has no entry {key!r}; state dicts are under {", ".join(entries) or "none"}')
    for name in STATE_DICT_KEYS if key is None else (key, ):
        if isinstance(found.get(name), Mapping):
            key, found = name, found[name]
            break
    if not _is_state_dict(found):
        raise ValueError(f'no state dict at the top of the checkpoint nor under {", ".join(STATE_DICT_KEYS)}')
    return key, found


def find_state_dict(checkpoint: Any, key: str | None = None) -> StateDict:
    """The state dict inside a loaded checkpoint: under ``key``, or under the first of STATE_DICT_KEYS, or at the top;
    names without what wrappers put before them.

    Raises:
        ValueError: there is none.
    """
    return _unwrapped(_entry(checkpoint, key)[1])


class Contents(NamedTuple):
    """A checkpoint's weights under our names.

    Attributes:
        weights: of the whole model; names that were not understood are among them as they were.
        metadata: of the state dict, by module.
        facts: what the backbone's weights need, as far as the file says; see LocalMambaBackbone.facts.
        family: whose they are: LocalVim, LocalVMamba, Vim, VMamba; None for ours.
        remarks: lines for the report.
        prefix: where the backbone is: '' or a name with its dot.
    """
    weights: StateDict
    metadata: dict[str, dict]
    facts: dict[str, Any]
    family: str | None
    remarks: list[str]
    prefix: str

    def backbone(self) -> StateDict:
        """Weights of the backbone alone."""
        if not self.prefix:
            return self.weights
        return {name[len(self.prefix):]: value for name, value in self.weights.items() if name.startswith(self.prefix)}


def read(checkpoint: Any, key: str | None = None, prefix: str | None = None) -> Contents:
    """Find, understand and convert the weights of a loaded checkpoint of ours or of the authors.

    Args:
        checkpoint: what a checkpoint file holds.
        key: entry that holds the weights; see :func:`find_state_dict`.
        prefix: where the backbone is in it; None finds it at the top or under ``backbone.``.

    Raises:
        ValueError: there is no state dict, or it is of a model that has no counterpart here.
    """
    taken, raw = _entry(checkpoint, key)
    weights, metadata = _unwrapped(raw), _unwrapped(getattr(raw, '_metadata', {}))
    lines = []
    others = [name for name, value in checkpoint.items() if name != taken and _is_state_dict(value)]
    if taken is not None and others:
        lines.append(f'taken from the entry {taken!r}; another is taken with key={" or key=".join(map(repr, others))}')
    if prefix is not None:
        prefix = f'{prefix}.' if prefix and not prefix.endswith('.') else prefix
    family, facts = family_of(weights)[0], {}
    if family is not None:
        facts, metadata = implied_facts(weights), {}
        lines += remarks(weights)
        converted, unmatched = from_official(weights)
        lines.append(f"{len(converted)} weights were converted from {family}'s names")
        converted.update((name if name.startswith(BACKBONE) else BACKBONE + name, weights[name]) for name in unmatched)
        prefix = BACKBONE if prefix is None else prefix
        weights = {prefix + name[len(BACKBONE):] if name.startswith(BACKBONE) else name: value
                   for name, value in converted.items()}
    if prefix is None:
        prefix = BACKBONE if any(name.startswith(BACKBONE) for name in weights) else ''
    if family is None:
        own = metadata.get(prefix[:-1], {})
        facts = {name: own[name] for name in FACTS if name in own}
    return Contents(weights, metadata, facts, family, lines, prefix)


def backbone_state_dict(checkpoint: Any, prefix: str | None = None) -> StateDict:
    """Weights of the backbone alone, under our names, from a loaded checkpoint of ours or of the authors.

    Args:
        checkpoint: what a checkpoint file holds.
        prefix: where the backbone is in it; None finds it at the top or under ``backbone.``.
    """
    return read(checkpoint, prefix=prefix).backbone()


def architecture(weights: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """(class, blocks, channels) of a backbone's weights under our names; a stage is one entry; None for other weights.

    Args:
        weights: names as in the backbone's own state dict.
    """
    for arch, pattern in (('LocalVim', r'(layers)\.(\d+)\.mixer\.out_proj\.weight'),
                          ('LocalVMamba', r'stages\.(\d+)\.blocks\.(\d+)\.mixer\.out_proj\.weight')):
        found = [(match, weights[name]) for name in weights if (match := re.fullmatch(pattern, name))]
        if found:
            blocks: dict[str, int] = {}
            channels = {}
            for match, weight in found:
                stage = match.group(1)
                blocks[stage] = max(blocks.get(stage, 0), int(match.group(2)) + 1)
                channels[stage] = len(weight)
            return arch, tuple(blocks.values()), tuple(channels.values())
    return None
