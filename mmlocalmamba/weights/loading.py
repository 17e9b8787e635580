"""Loading of pre-trained weights into a backbone, with a report of what fitted."""
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from mmlocalmamba.compat import load_checkpoint
from mmlocalmamba.registry import WEIGHT_INITIALIZERS
from mmlocalmamba.weights.contents import Contents, architecture, read
from mmlocalmamba.weights.families import VMAMBA_DIRECTIONS
from mmlocalmamba.weights.names import StateDict

_LOCALVMAMBA_S = ('LocalVMamba', (2, 2, 27, 2), (96, 192, 384, 768))
PARTIALS = (None, 'vmamba')


def grouped(names: Sequence[str]) -> list[str]:
    """Names that differ in their numbers alone as one, with their count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r'(?<=\.)\d+(?=\.)', '*', name), []).append(name)
    return [f'{pattern} ({len(group)})' if len(group) > 1 else group[0] for pattern, group in groups.items()]


@dataclass
class Fit:
    """How weights fit a backbone: names, each in one list.

    Attributes:
        fitting: loaded.
        new: not in the file, and meant to be so.
        missing: not in the file.
        unfit: {name: both shapes}.
        unexpected: in the file only.
    """
    fitting: list[str]
    new: list[str]
    missing: list[str]
    unfit: dict[str, str]
    unexpected: list[str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unfit or self.unexpected)

    def report(self, kind: str, source: str) -> str:
        own = sum(map(len, (self.fitting, self.new, self.missing, self.unfit)))
        lines = [f'{len(self.fitting)} of {own} weights of {kind} come from {source}']
        for title, names in (('new, left as initialised', self.new), ('missing in the file', self.missing),
                             ('of another shape', [f'{name} {shapes}' for name, shapes in self.unfit.items()]),
                             ('in the file only', self.unexpected)):
            if names:
                groups = grouped(names)
                lines.append(f'{len(names)} {title}: ' + ', '.join(groups) if len(groups) <= 3 else
                             '\n    '.join([f'{len(names)} {title}:', *groups]))
        return '\n  '.join(lines)


def fit(backbone: nn.Module, weights: StateDict, new: str | None = None) -> Fit:
    """Compare weights under the backbone's own names with it.

    Args:
        new: part of the names of weights that may be missing beside those that a task adds.
    """
    own = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    unfit = {name: f'({tuple(weights[name].shape)} in the file, {shape} here)' for name, shape in own.items()
             if name in weights and tuple(weights[name].shape) != shape}
    absent = [name for name in own if name not in weights]
    fresh = {name for name in absent if backbone.is_new_for_task(name) or (new is not None and new in name)}
    return Fit([name for name in own if name in weights and name not in unfit],
               [name for name in absent if name in fresh], [name for name in absent if name not in fresh], unfit,
               [name for name in weights if name not in own and not backbone.is_new_for_task(name)])


def check_facts(backbone: nn.Module, facts: dict[str, Any], allow: Sequence[str], source: str) -> None:
    """As LocalMambaBackbone.check_facts, but for those that may differ."""
    backbone.check_facts({name: value for name, value in facts.items() if name not in allow}, source)


def check_architecture(weights: StateDict, backbone: nn.Module, source: str) -> None:
    """Refuse weights of the other backbone, of which nothing fits.

    Args:
        weights: of a backbone, under our names.
        source: where they come from, for the message.

    Raises:
        RuntimeError: they are of another class than ``backbone``.
    """

    def describe(name: str, blocks: Sequence[int], channels: Sequence[int]) -> str:
        return f'a {name} of {", ".join(map(str, blocks))} blocks and {", ".join(map(str, channels))} channels'

    found, own = architecture(weights), architecture(backbone.state_dict())
    if found is None or own is None or found[0] == own[0]:
        return
    message = f'{source} holds {describe(*found)}: it is not of this backbone, {describe(*own)}.'
    if found == _LOCALVMAMBA_S:
        message += (' It is the file of LocalVMamba-S, which the README of hunto/LocalMamba links for LocalVim-S as '
                    'well: weights of LocalVim-S are not linked there.')
    raise RuntimeError(message)


def adapted(contents: Contents, backbone: nn.Module, source: str,
            allow: Sequence[str] = ()) -> tuple[StateDict, StateDict]:
    """Weights of the backbone, fitted to it, and those of the whole model with these.

    Raises:
        RuntimeError: they are of another class than ``backbone``, or need what it is not and ``allow`` does not name.
    """
    check_architecture(contents.backbone(), backbone, source)
    check_facts(backbone, contents.facts, allow, source)
    own = backbone.adapt_state_dict(contents.backbone())
    return own, {**contents.weights, **{contents.prefix + name: value for name, value in own.items()}}


def from_vmamba(contents: Contents, backbone: nn.Module, source: str) -> StateDict:
    """VMamba's weights for a LocalVMamba that scans other directions: each starts from the one that it resembles, v
    from v, everything else, windows too, from h, flipped ones from flipped ones.

    Raises:
        RuntimeError: the weights are not those of a VMamba.
    """
    weights = contents.backbone()
    directions = contents.facts.get('directions', [[]])
    if directions[0] != list(VMAMBA_DIRECTIONS) or any('.scattn.' in name for name in weights):
        raise RuntimeError(f"{source}: partial='vmamba' starts a LocalVMamba from a VMamba, the authors' or ours with "
                           f'directions {", ".join(VMAMBA_DIRECTIONS)} and without SCAttn; this is none')
    blocks = [name for name in backbone.state_dict() if name.endswith('.mixer.ssm.A_log')]
    for name, directions in zip(blocks, backbone.directions, strict=True):
        order = torch.tensor([VMAMBA_DIRECTIONS.index(('v' if scan.startswith('v') else 'h')
                                                      + ('_flip' if scan.endswith('_flip') else ''))
                              for scan in directions])
        block = name[:-len('A_log')]
        weights = {key: value[order.to(value.device)] if key.startswith(block) else value
                   for key, value in weights.items()}
    return weights


@WEIGHT_INITIALIZERS.register_module()
class Pretrained:
    """What ``init_cfg=dict(type='Pretrained', checkpoint=PATH_OR_URL)`` means for our backbones.

    It takes checkpoints of this package (of a backbone, or of a classifier, detector or segmentor that holds one) and
    those of the authors, which are converted on the fly. What does not match is reported, and a backbone that is not
    completely filled is an error unless ``strict=False``; output norms of more stages than the checkpoint's model had
    may stay at their initial values. So is a file that says or implies other scan directions.

    Args:
        checkpoint: file or URL; None trains from scratch and says so.
        strict: False reports what does not match and goes on.
        prefix: where the backbone is in the checkpoint; None finds it at the top or under ``backbone.``.
        map_location: as for torch.load.
        key: entry of the checkpoint that holds the weights, e.g. 'model_ema'; None for the first of STATE_DICT_KEYS.
        allow: what may differ from what the weights need: 'directions', 'stride', 'rope'.
        partial: 'vmamba' starts a LocalVMamba from a VMamba: SCAttn is new, each direction starts from VMamba's that it
            resembles (see :func:`from_vmamba`), and everything else must match.

    Raises:
        ValueError: an unknown ``partial``.
    """

    def __init__(self, checkpoint: str | None, strict: bool = True, prefix: str | None = None,
                 map_location: str = 'cpu', key: str | None = None, allow: Sequence[str] = (),
                 partial: str | None = None) -> None:
        if partial not in PARTIALS:
            raise ValueError(f'partial must be one of {PARTIALS}, got {partial!r}')
        self.checkpoint, self.strict, self.prefix, self.map_location = checkpoint, strict, prefix, map_location
        self.key, self.allow, self.partial = key, allow, partial

    def __call__(self, backbone: nn.Module) -> None:
        """Load into ``backbone``.

        Raises:
            RuntimeError: weights of the other backbone, or for other scan directions; with ``strict``, weights that are
                missing or do not fit.
            ValueError: there are no weights in the file, or of a model that has no counterpart here.
        """
        kind, source = type(backbone).__name__, self.checkpoint
        if source is None:
            print_log(f'{kind}: no pre-trained weights were given (init_cfg.checkpoint=None), '
                      'the backbone starts from scratch', logger='current', level=logging.WARNING)
            return
        try:
            contents = read(load_checkpoint(source, self.map_location), self.key, self.prefix)
        except ValueError as error:
            raise ValueError(f'{source}: {error}') from None
        check_architecture(contents.backbone(), backbone, source)
        if self.partial == 'vmamba':
            weights, facts, new = from_vmamba(contents, backbone, source), {}, '.scattn.'
        else:
            weights, facts, new = contents.backbone(), contents.facts, None
        check_facts(backbone, facts, self.allow, source)
        weights = backbone.adapt_state_dict(weights)
        found = fit(backbone, weights, new)
        report = '\n  '.join([found.report(kind, source), *contents.remarks])
        if not found.complete and self.strict:
            raise RuntimeError(f'{report}\nThis checkpoint is not of this backbone. If a partial match is what you '
                               'want, add strict=False to init_cfg.')
        if found.fitting:
            backbone.load_state_dict({name: weights[name] for name in found.fitting}, strict=False)
        print_log(report, logger='current', level=logging.INFO if found.complete else logging.WARNING)
