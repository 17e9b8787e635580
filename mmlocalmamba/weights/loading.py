"""Load weights into models: find them in a checkpoint, convert them, compare them with the model, report, load.

init_cfg, ``load_from``, the inferencers and export all use these functions.
"""
import logging
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmlocalmamba import files
from mmlocalmamba.files import SCHEME
from mmlocalmamba.weights import released
from mmlocalmamba.weights.official import (
    BACKBONE,
    DIRECTIONS_UNKNOWN,
    VMAMBA_DIRECTIONS,
    StateDict,
    family_of,
    from_official,
    implied_requirements,
    remarks,
)

_LOGGER = logging.getLogger(__name__)
# Where checkpoints keep their weights, in the order of search. Averages come last.
STATE_DICT_KEYS = ('state_dict', 'model', 'model_state_dict', 'state_dict_ema', 'model_ema', 'ema_model',
                   'ema_state_dict')
# Requirements that weights can have without showing them in their shapes.
REQUIREMENTS = ('directions', 'stride', 'rope', 'cls_token')
PARTIALS = (None, 'vmamba')
CHANNELS = (None, 'sum', 'repeat')
# Attributes in which DistributedDataParallel, averages, torch.compile, checkpointing and FSDP keep a model.
_WRAPPERS = ('module', '_orig_mod', '_checkpoint_wrapped_module', '_fsdp_wrapped_module')
_WRAPPERS_IN_NAMES = re.compile(rf'(?:^|(?<=\.))(?:{"|".join(_WRAPPERS)})\.')
_LIGHTNING = 'model.'
_BLOCK = re.compile(r'((?:.+\.)?)(?:layers\.\d+|stages\.\d+\.blocks\.\d+)\.mixer\.ssm\.A_log')
_LOCALVMAMBA_S = ('LocalVMamba', (2, 2, 27, 2), (96, 192, 384, 768))


# ---- wrappers ----


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel, FSDP, an average, torch.compile or a test-time augmentation.

    A model that has a ``backbone`` is not a wrapper, whatever else it holds.
    """
    while True:
        children = dict(model.named_children())
        inner = None if 'backbone' in children else next(filter(None, map(children.get, _WRAPPERS)), None)
        if inner is None:
            return model
        model = inner


def _without_wrappers(named: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the wrappers' parts from names, and Lightning's ``model.`` if all names begin with it."""
    named = {_WRAPPERS_IN_NAMES.sub('', name): value for name, value in named.items()}
    if named and all(name.startswith(_LIGHTNING) for name in named):
        named = {name.removeprefix(_LIGHTNING): value for name, value in named.items()}
    return named


# ---- reading ----


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


def _entry(checkpoint: Any, key: str | None) -> tuple[str | None, Mapping[str, Tensor]]:
    """Return the entry that holds the weights (None for the top) and the weights as they are."""
    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    if key is not None and not isinstance(found.get(key), Mapping):
        entries = [name for name in found if _is_state_dict(found[name])]
        raise ValueError(f'the checkpoint has no entry {key!r}; state dicts are under {", ".join(entries) or "none"}')
    for name in STATE_DICT_KEYS if key is None else (key, ):
        if isinstance(found.get(name), Mapping):
            key, found = name, found[name]
            break
    if not _is_state_dict(found):
        entries = [f'key={name!r}' for name, value in found.items() if _is_state_dict(value)]
        raise ValueError(f'no state dict at the top of the checkpoint nor under {", ".join(STATE_DICT_KEYS)}'
                         + (f'; others are taken with {" or ".join(entries)}' if entries else ''))
    return key, found


def find_state_dict(checkpoint: Any, key: str | None = None) -> StateDict:
    """Return the state dict inside a loaded checkpoint, under names without those of wrappers.

    Args:
        checkpoint: content of a checkpoint file.
        key: entry that holds the weights; None for the first of STATE_DICT_KEYS, or else the top.

    Raises:
        ValueError: there is no state dict.
    """
    return _without_wrappers(_entry(checkpoint, key)[1])


class Contents(NamedTuple):
    """A checkpoint's weights under our names.

    Attributes:
        weights: of the whole model; names that were not understood are unchanged.
        metadata: of the state dict, by module.
        requirements: what the backbone's weights need, as far as the file says; see LocalMambaBackbone.requirements.
        family: LocalVim, LocalVMamba, Vim or VMamba for the authors' files; None for ours.
        remarks: lines for the report.
        prefix: of the backbone: '' or a name with its dot.
    """
    weights: StateDict
    metadata: dict[str, dict]
    requirements: dict[str, Any]
    family: str | None
    remarks: list[str]
    prefix: str

    def backbone(self) -> StateDict:
        """Return the weights of the backbone alone."""
        if not self.prefix:
            return self.weights
        return {name[len(self.prefix):]: value for name, value in self.weights.items() if name.startswith(self.prefix)}


def _other_prefix(weights: Mapping[str, Tensor]) -> str:
    """Return where the weights of a backbone of ours are in the model of somebody else: '' or a name with its dot.

    Raises:
        ValueError: there are several.
    """
    found = list(dict.fromkeys(match.group(1) for name in weights if (match := _BLOCK.fullmatch(name))))
    if len(found) > 1 and '' not in found:
        raise ValueError('the checkpoint holds several backbones: take one with '
                         + ' or '.join(f'prefix={prefix[:-1]!r}' for prefix in found))
    return '' if '' in found or not found else found[0]


def read(checkpoint: Any, key: str | None = None, prefix: str | None = None) -> Contents:
    """Find and convert the weights of a loaded checkpoint of ours or of the authors.

    Args:
        checkpoint: content of a checkpoint file.
        key: entry that holds the weights; see :func:`find_state_dict`.
        prefix: of the backbone; None finds it at the top or under ``backbone.``.

    Raises:
        ValueError: there is no state dict, or it is of a model that has no counterpart here.
    """
    taken, raw = _entry(checkpoint, key)
    weights, metadata = _without_wrappers(raw), _without_wrappers(getattr(raw, '_metadata', {}))
    lines = []
    others = [name for name, value in checkpoint.items() if name != taken and _is_state_dict(value)]
    if taken is not None and others:
        lines.append(f'taken from the entry {taken!r}; another is taken with key={" or key=".join(map(repr, others))}')
    if prefix is not None:
        prefix = f'{prefix}.' if prefix and not prefix.endswith('.') else prefix
    family, needed = family_of(weights)[0], {}
    if family is not None:
        needed, metadata = implied_requirements(weights), {}
        lines += remarks(weights)
        converted, unmatched = from_official(weights)
        lines.append(f"{len(converted)} weights were converted from {family}'s names")
        converted.update((name if name.startswith(BACKBONE) else BACKBONE + name, weights[name]) for name in unmatched)
        prefix = BACKBONE if prefix is None else prefix
        weights = {prefix + name[len(BACKBONE):] if name.startswith(BACKBONE) else name: value
                   for name, value in converted.items()}
    if prefix is None:
        prefix = BACKBONE if any(name.startswith(BACKBONE) for name in weights) else _other_prefix(weights)
        if prefix not in ('', BACKBONE):
            lines.append(f'taken from the names that begin with {prefix}')
    if family is None:
        own = metadata.get(prefix[:-1], {})
        needed = {name: own[name] for name in (*REQUIREMENTS, 'grid') if name in own}
    return Contents(weights, metadata, needed, family, lines, prefix)


def load_checkpoint(checkpoint: str, map_location: Any = 'cpu', key: str | None = None) -> Any:
    """Load a checkpoint from a file, an http(s) URL or ``mmlocalmamba://NAME``. No code in it is executed.

    What ``mmlocalmamba://`` names comes under our names, converted if it is of the authors, whatever loads it: weights
    of the package, released weights (:mod:`mmlocalmamba.weights.released`, downloaded once; their address does the
    same), or a file: ``mmlocalmamba://local_vim_tiny.ckpt``.

    Args:
        checkpoint: file, URL or name.
        map_location: as for torch.load.
        key: entry that holds the weights, for files that are converted.

    Raises:
        RuntimeError: as :func:`mmlocalmamba.files.load_checkpoint`, or released weights are not complete.
        FileNotFoundError: there is no such file or name.
    """
    checkpoint = str(checkpoint)
    named = released.find(checkpoint) if '://' in checkpoint else None
    if named is not None and named[1].packaged:
        return files.load_safetensors(SCHEME + named[1].file, map_location)
    if named is not None:
        name, entry = named
        loaded = files.load_checkpoint(entry.file, map_location, entry.least_bytes)
        _LOGGER.info(entry.describe(name))
        # By its address a file is what it is anywhere else: the first of STATE_DICT_KEYS.
        best = entry.key if key is None and checkpoint.startswith(SCHEME) else None
        return _converted(loaded, key, entry, best)
    rest = checkpoint.removeprefix(SCHEME)
    if rest == checkpoint or rest in files.packaged_names():
        return files.load_checkpoint(checkpoint, map_location)
    if not os.path.isfile(os.path.expanduser(rest)):
        known = sorted({*released.NAMED, *files.packaged_names()})
        raise FileNotFoundError(2, f'{files.meant(rest, known)}there are no weights and no file of this name; names '
                                f'are {", ".join(known)}', checkpoint)
    return _converted(files.load_checkpoint(rest, map_location), key, None)


def _converted(loaded: Any, key: str | None, entry: released.Weights | None, best: str | None = None) -> Any:
    """Return a checkpoint under our names, with what its weights need as metadata of the state dict."""
    contents = read(loaded, best if best is not None and _is_state_dict(loaded.get(best)) else key)
    if contents.family is None:
        return loaded
    found = sum(value.numel() for value in contents.weights.values())
    if entry is not None and (len(contents.weights) < entry.tensors or found < entry.values):
        raise RuntimeError(f'{entry.file} holds {len(contents.weights)} tensors of {found:,} values, but the model has '
                           f'{entry.tensors} of {entry.values:,}: remove {files.cached(entry.file)} and try again')
    needed = dict(contents.requirements)
    if entry is not None and 'directions' not in needed and (directions := entry.directions()) is not None:
        needed['directions'] = directions
        contents.remarks.remove(DIRECTIONS_UNKNOWN)
    weights = OrderedDict(contents.weights)
    weights._metadata = OrderedDict({contents.prefix[:-1]: needed})  # type: ignore[attr-defined]
    _LOGGER.info('\n  '.join(contents.remarks))
    return {key or 'state_dict': weights, 'meta': loaded.get('meta') or {}}


def backbone_state_dict(checkpoint: Any, prefix: str | None = None) -> StateDict:
    """Return the weights of the backbone alone, under our names, from a loaded checkpoint of ours or of the authors.

    Args:
        checkpoint: content of a checkpoint file.
        prefix: of the backbone; None finds it at the top or under ``backbone.``.
    """
    return read(checkpoint, prefix=prefix).backbone()


def architecture(weights: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """Return (class, blocks, channels) of a backbone's weights, one entry a stage; None for other weights.

    Args:
        weights: under the names of the backbone's own state dict.
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


# ---- comparing ----


def grouped(names: Sequence[str]) -> list[str]:
    """Join names that differ in their numbers alone, with their count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r'(?<=\.)\d+(?=\.)', '*', name), []).append(name)
    return [f'{pattern} ({len(group)})' if len(group) > 1 else group[0] for pattern, group in groups.items()]


@dataclass
class Fit:
    """A comparison of weights with a model. Each name is in one of the lists.

    Attributes:
        fitting: in both, with the same shape.
        new: not in the file, as intended.
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
        """Describe the comparison, a line for each list that is not empty."""
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


def _other_channels(name: str, value: Tensor, shape: Sequence[int]) -> bool:
    """Return True if a weight of a patch embedding differs from the model's in the channels of the image alone."""
    return ('patch_embed.' in f'.{name}' and value.dim() == len(shape) == 4 and value.shape[1] != shape[1]
            and (value.shape[0], *value.shape[2:]) == (shape[0], *shape[2:]))


def _hint(name: str, value: Tensor, shape: Sequence[int]) -> str:
    """Return the argument of :func:`load_pretrained` that makes a weight fit."""
    if _other_channels(name, value, shape):
        return "; channels='sum' or channels='repeat' adapts it"
    positions = f'.{name}'.endswith('.pos_embed') and value.shape[-1] == shape[-1]
    return '; grid=(ROWS, COLUMNS) says how to resize it' if positions else ''


def _adapt_channels(weights: StateDict, backbone: nn.Module, channels: str) -> tuple[StateDict, list[str]]:
    """Fit the weights of the patch embedding to the channels of the model's images; see :func:`load_pretrained`."""
    lines, own = [], backbone.state_dict()
    for name, value in weights.items():
        if name not in own or not _other_channels(name, value, own[name].shape):
            continue
        theirs, ours = value.shape[1], own[name].shape[1]
        if channels == 'sum':
            adapted = value.sum(1, keepdim=True).expand(-1, ours, -1, -1) / ours
            done = f'each is the sum over the {theirs} channels in the file, divided by {ours}'
        else:
            adapted = value[:, torch.arange(ours) % theirs] * (theirs / ours)
            done = f'those of the {theirs} channels in the file in turn, multiplied by {theirs}/{ours}'
        weights = {**weights, name: adapted}
        lines.append(f'{name}: weights of {ours} channels, {done}')
    return weights, lines


def fit(model: nn.Module, weights: StateDict, new: str | None = None) -> Fit:
    """Compare weights under the model's own names with it.

    Args:
        model: one of our backbones, or a whole model.
        weights: {name: tensor}.
        new: part of the names of weights that may be missing beside those that a task adds to a backbone.
    """
    is_new = getattr(model, 'is_new_for_task', lambda name: False)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unfit = {name: f'({tuple(weights[name].shape)} in the file, {shape} here{_hint(name, weights[name], shape)})'
             for name, shape in own.items() if name in weights and tuple(weights[name].shape) != shape}
    absent = [name for name in own if name not in weights]
    fresh = {name for name in absent if is_new(name) or (new is not None and new in name)}
    return Fit([name for name in own if name in weights and name not in unfit],
               [name for name in absent if name in fresh], [name for name in absent if name not in fresh], unfit,
               [name for name in weights if name not in own and not is_new(name)])


def check_requirements(backbone: Any, needed: Mapping[str, Any], source: str, allow: Sequence[str] = ()) -> None:
    """Compare what weights need with what a backbone is.

    Args:
        backbone: one of our backbones.
        needed: requirements that came with the weights; others that a state dict's metadata hold are ignored.
        source: name of the file, for the message.
        allow: names of requirements that may differ.

    Raises:
        RuntimeError: a requirement differs. The message names both sides.
    """
    own = backbone.requirements()
    differing = [key for key in REQUIREMENTS if key in needed and key not in allow and needed[key] != own.get(key)]
    if not differing:
        return
    lines = [f'{source} belongs to another {type(backbone).__name__}:']
    for key in differing:
        theirs: Any = needed[key]
        ours: Any = own.get(key)
        if key == 'directions' and len(theirs) == len(ours):
            block = next(i for i, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1])
            count = sum(a != b for a, b in zip(theirs, ours))
            theirs, ours = (f'{", ".join(blocks[block])} in block {block}' for blocks in (theirs, ours))
            ours += f' ({count} of {len(backbone.directions)} blocks differ)'
        elif key == 'directions':
            theirs, ours = (f'{len(blocks)} blocks' for blocks in (theirs, ours))
        lines.append(f'{key}: its weights were trained with {theirs}, here: {ours}')
    report = '\n  '.join(lines)
    raise RuntimeError(f'{report}\nIts features would be meaningless here: give the backbone the values of the '
                       f'checkpoint. To keep the difference, write allow={differing} in init_cfg or on the '
                       'LoadCheckpointHook, or load dict(state_dict), which carries no metadata.')


def check_architecture(weights: StateDict, backbone: nn.Module, source: str) -> None:
    """Refuse weights of the other backbone class.

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


def weights_for(contents: Contents, backbone: Any, source: str, allow: Sequence[str] = (),
                channels: str | None = None, grid: Sequence[int] | None = None) -> tuple[StateDict, StateDict]:
    """Fit a checkpoint's weights to a backbone.

    Args:
        contents: see :func:`read`. What is adapted is added to its remarks.
        backbone: one of our backbones.
        source: name of the file, for messages.
        allow: requirements that may differ.
        channels, grid: see :func:`load_pretrained`.

    Returns:
        Weights of the backbone, and weights of the whole model that contain them.

    Raises:
        RuntimeError: the weights are of another class than ``backbone``, or a requirement differs.
        ValueError: ``channels`` is unknown, or the file has not as many positions as ``grid``.
    """
    if channels not in CHANNELS:
        raise ValueError(f'channels must be one of {CHANNELS}, got {channels!r}')
    check_architecture(contents.backbone(), backbone, source)
    check_requirements(backbone, contents.requirements, source, allow)
    own = contents.backbone()
    if grid is not None and 'pos_embed' in own:
        tokens = own['pos_embed'].shape[1] - getattr(backbone, 'num_cls_tokens', 0)
        if math.prod(grid) != tokens:
            raise ValueError(f'grid={tuple(grid)} has {math.prod(grid)} positions, but {source} has {tokens}')
    own = backbone.adapt_state_dict(own, contents.requirements.get('grid') if grid is None else grid)
    if channels is not None:
        own, lines = _adapt_channels(own, backbone, channels)
        contents.remarks.extend(lines)
    return own, {**contents.weights, **{contents.prefix + name: value for name, value in own.items()}}


# ---- loading ----


def adapted(weights: StateDict, backbone: Any, prefix: str,
            metadata: Mapping[str, Mapping[str, Any]] | None = None) -> OrderedDict:
    """Return a state dict whose metadata say that its positions have the backbone's own grid.

    Args:
        weights: as :func:`weights_for` returns them.
        backbone: one of our backbones.
        prefix: of the backbone in ``weights``.
        metadata: further metadata by module.
    """
    state_dict = OrderedDict(weights)
    entries = {name: dict(entry) for name, entry in (metadata or {}).items()}
    entries.setdefault(prefix.removesuffix('.'), {}).update(grid=backbone.requirements().get('grid'))
    state_dict._metadata = OrderedDict(entries)  # type: ignore[attr-defined]
    return state_dict


def _from_vmamba(contents: Contents, backbone: nn.Module, source: str) -> StateDict:
    """Return VMamba's weights for a LocalVMamba that scans other directions.

    Each direction starts from the one that it resembles: v from v, everything else (windows, too) from h, flipped ones
    from flipped ones.

    Raises:
        RuntimeError: the weights are not those of a VMamba.
    """
    weights = contents.backbone()
    directions = contents.requirements.get('directions', [[]])
    if directions[0] != list(VMAMBA_DIRECTIONS) or any('.scattn.' in name for name in weights):
        raise RuntimeError(f"{source}: partial='vmamba' starts a LocalVMamba from a VMamba, the authors' or ours with "
                           f'directions {", ".join(VMAMBA_DIRECTIONS)} and without SCAttn; this is not one')
    blocks = [name for name in backbone.state_dict() if name.endswith('.mixer.ssm.A_log')]
    for name, directions in zip(blocks, backbone.directions, strict=True):
        order = torch.tensor([VMAMBA_DIRECTIONS.index(('v' if scan.startswith('v') else 'h')
                                                      + ('_flip' if scan.endswith('_flip') else ''))
                              for scan in directions])
        block = name[:-len('A_log')]
        weights = {key: value[order.to(value.device)] if key.startswith(block) else value
                   for key, value in weights.items()}
    return weights


def load_pretrained(backbone: Any, checkpoint: str | None, strict: bool = True, prefix: str | None = None,
                    map_location: Any = 'cpu', key: str | None = None, allow: Sequence[str] = (),
                    partial: str | None = None, channels: str | None = None,
                    grid: Sequence[int] | None = None) -> None:
    """Load pre-trained weights into a backbone: ``init_cfg=dict(type='Pretrained', checkpoint=FILE_OR_URL)``.

    Checkpoints can be of this package (of a backbone, or of a classifier, detector or segmentor that holds one) or of
    the authors, which are converted on the fly. The log reports what did not match. Output norms of stages that the
    checkpoint's model did not have keep their initial values.

    Args:
        backbone: one of our backbones.
        checkpoint: file, URL or ``mmlocalmamba://NAME``; None keeps the initial weights and says so.
        strict: False reports what does not match and goes on.
        prefix: of the backbone in the checkpoint; None finds it at the top or under ``backbone.``.
        map_location: as for torch.load.
        key: entry of the checkpoint that holds the weights, such as 'model_ema'; None for the first of STATE_DICT_KEYS.
        allow: requirements that may differ: 'directions', 'stride', 'rope', 'cls_token'.
        partial: 'vmamba' starts a LocalVMamba from a VMamba: SCAttn is new, each direction starts from the VMamba
            direction that it resembles, and everything else must match.
        channels: how weights for images of other channels are adapted; None does not. 'sum': each channel gets the
            sum over the file's channels, divided by the number of channels here, so that a grey image gives what its
            three equal channels gave. 'repeat': the file's channels in turn, scaled so that their sum stays, as timm
            does for more than one channel.
        grid: (rows, columns) of the file's learned positions, where the file does not say it.

    Raises:
        RuntimeError: the weights are of the other backbone or for other scan directions; with ``strict``, some are
            missing or do not fit.
        ValueError: ``partial`` is unknown, or the file has no weights, or those of a model without a counterpart here.
    """
    if partial not in PARTIALS:
        raise ValueError(f'partial must be one of {PARTIALS}, got {partial!r}')
    kind = type(backbone).__name__
    if checkpoint is None:
        # No warning: a checkpoint may follow, by load_from or --resume.
        _LOGGER.info('%s: init_cfg names no checkpoint (None), so the backbone has its initial weights', kind)
        return
    try:
        contents = read(load_checkpoint(checkpoint, map_location, key), key, prefix)
    except ValueError as error:
        raise ValueError(f'{checkpoint}: {error}') from None
    if partial == 'vmamba':
        check_architecture(contents.backbone(), backbone, checkpoint)
        weights, new = backbone.adapt_state_dict(_from_vmamba(contents, backbone, checkpoint)), '.scattn.'
    else:
        weights, new = weights_for(contents, backbone, checkpoint, allow, channels, grid)[0], None
    found = fit(backbone, weights, new)
    report = '\n  '.join([found.report(kind, checkpoint), *contents.remarks])
    if not found.complete and strict:
        raise RuntimeError(f'{report}\nThis checkpoint belongs to another backbone. If you want a partial match, add '
                           'strict=False to init_cfg.')
    if found.fitting:
        backbone.load_state_dict(adapted({name: weights[name] for name in found.fitting}, backbone, ''), strict=False)
    _LOGGER.log(logging.INFO if found.complete else logging.WARNING, report)


def load_whole_model(model: nn.Module, backbone: Any, contents: Contents, source: str,
                     channels: str | None = None) -> None:
    """Load a checkpoint into all parts of a model.

    Args:
        model: it holds ``backbone`` under ``contents.prefix``.
        backbone: one of our backbones, or None.
        contents: see :func:`read`.
        source: name of the file, for messages.
        channels: see :func:`load_pretrained`.

    Raises:
        RuntimeError: a weight is missing, unexpected or of another shape, or a requirement differs.
    """
    weights = contents.weights if backbone is None else weights_for(contents, backbone, source, channels=channels)[1]
    found = fit(model, weights)
    if not found.complete:
        raise RuntimeError(f'{source} is not a checkpoint of this {type(model).__name__}. '
                           f'{found.report(type(model).__name__, source)}\nName the configuration that it was trained '
                           'with.')
    model.load_state_dict(weights if backbone is None else adapted(weights, backbone, contents.prefix))
    if contents.remarks:
        _LOGGER.info('\n  '.join([f'{source}:', *contents.remarks]))
