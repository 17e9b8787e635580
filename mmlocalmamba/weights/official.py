"""Names and layouts of the authors' weights <-> ours: pure functions over names and tensors.

The authors are those of LocalMamba (hunto/LocalMamba), Vim (hustvl/Vim) and VMamba, versions 0 and 2
(MzeroMiko/VMamba); their names tell them apart. Vim's names and those of VMamba's version 0 are first changed to those
of LocalMamba's authors, then converted. Version 2 has these names already, and more for its MLPs and convolutions.

Our names are those of mmpretrain's, mmdet's and mmseg's models: ``backbone.*``, and ``head.fc.*`` of a classifier.
Besides names, three things differ: K directions are stacked in one tensor; PatchMerging orders a 2x2 patch channel by
channel, the authors' code position by position; rotary tables are computed, not stored.
"""
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmlocalmamba.layers.rope import rotary_tables

StateDict = dict[str, Tensor]

# ---- whose weights they are ----

BACKBONE = 'backbone.'
VMAMBA_DIRECTIONS = ('h', 'v', 'h_flip', 'v_flip')
_VIM_DIRECTIONS = ('h', 'h_flip')
# Vim's grids at 224 pixels: patches of 16 at this stride.
_VIM_STRIDES = {14: 16, 27: 8}

# A line of remarks().
DIRECTIONS_UNKNOWN = ("the authors' files do not name their scan directions: those of the configuration are used")

# Names that only one family has. VMamba's version 2 has those of LocalVMamba, with MLPs and without SCAttn.
_MARKS = {family: re.compile(pattern) for family, pattern in (
    ('LocalVim', r'layers\.\d+\.mixer\.(?:A_log|D|(?:conv1d|x_proj|dt_proj))_\d+(?:\.\w+)?'),
    ('LocalVMamba', r'layers\.\d+\.blocks\.\d+\.op\.(?:A_logs|Ds|x_proj_weight|dt_projs_weight|dt_projs_bias)'),
    ('Vim', r'layers\.\d+\.mixer\.(?:A_b_log|D_b|(?:conv1d|x_proj|dt_proj)_b\.\w+)'),
    ('VMamba', r'layers\.\d+\.blocks\.\d+\.self_attention\.(?:A_logs|Ds|x_proj_weight|dt_projs_weight|dt_projs_bias)'),
)}
_EXAMPLES = ('layers.0.mixer.A_log_0', 'layers.0.blocks.0.op.A_logs', 'layers.0.mixer.A_b_log',
             'layers.0.blocks.0.self_attention.A_logs')
_MLP = re.compile(r'layers\.\d+\.blocks\.\d+\.mlp\.\w+\.\w+')
_SCATTN = re.compile(r'layers\.\d+\.blocks\.\d+\.op\.multi_scan\..+')
_VIM = re.compile(r'(layers\.\d+\.mixer)\.(A_log|A_b_log|D|D_b|(?:conv1d|x_proj|dt_proj)(?:_b)?)(\.\w+)?')
_VMAMBA = [(r'\.ln_1\.', '.norm.'), (r'\.self_attention\.', '.op.'), (r'^patch_embed\.proj\.', 'patch_embed.0.'),
           (r'^patch_embed\.norm\.', 'patch_embed.2.'), (r'^(norm|head)\.', r'classifier.\1.')]


def family_of(state_dict: Mapping[str, Tensor]) -> tuple[str | None, str]:
    """Return ('LocalVim', 'LocalVMamba', 'Vim', 'VMamba' or None; prefix of the backbone: '' or 'backbone.')."""
    for prefix in ('', BACKBONE):
        for name in state_dict:
            if name.startswith(prefix):
                for family, mark in _MARKS.items():
                    if mark.fullmatch(name, len(prefix)):
                        return ('VMamba' if family == 'LocalVMamba' and _is_vmamba_v2(state_dict, prefix) else family,
                                prefix)
    return None, ''


def _is_vmamba_v2(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    return (any(_MLP.fullmatch(name, len(prefix)) for name in state_dict)
            and not any(_SCATTN.fullmatch(name, len(prefix)) for name in state_dict))


def is_official(state_dict: Mapping[str, Tensor]) -> bool:
    """Return True if the names are those of LocalMamba's, Vim's or VMamba's authors."""
    return family_of(state_dict)[0] is not None


def _backbone_of(state_dict: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Tensor], dict[str, Tensor]]:
    family, prefix = family_of(state_dict)
    own = {name[len(prefix):]: value for name, value in state_dict.items() if name.startswith(prefix)}
    return family, own, {name: value for name, value in state_dict.items() if not name.startswith(prefix)}


def _depth(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match.groups() for name in weights if (match := re.match(pattern, name))})


def implied_requirements(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the authors' weights need, as far as names and shapes tell; see LocalMambaBackbone.requirements.

    LocalMamba's weights say nothing about their scan directions.
    """
    family, weights, _ = _backbone_of(state_dict)
    needed: dict[str, Any] = {}
    if family == 'VMamba':
        needed['directions'] = [list(VMAMBA_DIRECTIONS)] * _depth(weights, r'layers\.(\d+)\.blocks\.(\d+)\.')
    elif family == 'Vim':
        needed['directions'] = [list(_VIM_DIRECTIONS)] * _depth(weights, r'layers\.(\d+)\.')
        if 'pos_embed' in weights and tuple(weights['patch_embed.proj.weight'].shape[2:]) == (16, 16):
            side = round((weights['pos_embed'].shape[1] - 1) ** 0.5)
            if side in _VIM_STRIDES and side * side + 1 == weights['pos_embed'].shape[1]:
                needed['stride'] = _VIM_STRIDES[side]
            if side % 2:  # else a class token in the middle of every scan gives the same
                needed['cls_token'] = 'vim'
    elif family == 'LocalVim' and 'rope.freqs_cos' in weights:
        cos = weights['rope.freqs_cos']
        side = round(len(cos) ** 0.5)
        exact = rotary_tables(side, side, cos.shape[1], 14, cos.device)[0]
        if exact.shape == cos.shape and (exact - cos).abs().max() > 0.01:
            needed['rope'] = 'resized'
    if (positions := weights.get('pos_embed')) is not None:  # the authors' images are square
        tokens = positions.shape[1] - int('cls_token' in weights)
        side = round(tokens ** 0.5)
        if side * side == tokens:
            needed['grid'] = [side, side]
    return needed


def remarks(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Return lines for the load report about the authors' weights."""
    family, weights, _ = _backbone_of(state_dict)
    if family not in ('LocalVim', 'LocalVMamba'):
        return []
    lines = [DIRECTIONS_UNKNOWN]
    embedding = weights.get('patch_embed.proj.weight')
    if family == 'LocalVim' and embedding is not None and len(embedding) == 384:
        lines.append("the authors' code has two models called local_vim_small, and the later one, without search, "
                     'hides the other: a file that was trained under that name belongs to localvim-s-nosearch, '
                     'but nothing in it shows that')
    return lines


def _vim_name(name: str) -> str:
    """Return LocalVim's name for Vim's: Vim writes scans h and h_flip without and with ``_b``, LocalVim as 0 and 1."""
    match = _VIM.fullmatch(name)
    if match is None:
        return name
    mixer, part, leaf = match.groups()
    return f'{mixer}.{part.replace("_b", "")}_{int("_b" in part)}{leaf or ""}'


def _vmamba_name(name: str) -> str:
    """Return LocalVMamba's name for VMamba's."""
    for pattern, replacement in _VMAMBA:
        name = re.sub(pattern, replacement, name)
    return name


def _vim_tensor(name: str, tensor: Tensor) -> Tensor:
    """Halve the output projection of Vim.

    Vim's released models (``..._div2``) halve the sum of both directions before this projection. It is linear, and 2 is
    a power of two, so half of its weight gives exactly the same.
    """
    return tensor / 2 if name.endswith('.mixer.out_proj.weight') else tensor


def as_localmamba(state_dict: Mapping[str, Tensor]
                  ) -> tuple[str, dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Rename a state dict of any family to the names of LocalMamba's authors.

    Returns:
        (family, {new name: name in the file}, {new name: weight}, weights outside of the backbone under their names).

    Raises:
        ValueError: the state dict is of no family, or of a model that has no counterpart here.
    """
    family, prefix = family_of(state_dict)
    if family is None:
        raise ValueError("this is not a state dict of the authors' LocalVim or LocalVMamba, nor of Vim or VMamba: it "
                         f'has neither {" nor ".join(_EXAMPLES)}, but e.g. '
                         f'{", ".join(list(state_dict)[:3]) or "nothing"}')
    _, own, rest = _backbone_of(state_dict)
    if family == 'Vim' and ('rope.freqs_cos' in own or 'cls_token' not in own):
        raise ValueError('this is a Vim with rotary positions or without a class token: only the released models '
                         'with a class token in the middle (midclstok, div2) are converted; others combine their '
                         'directions and tokens differently')
    for name, value in own.items():
        if re.fullmatch(r'layers\.\d+\.downsample\.1\.weight', name) and value.shape[2:] != (3, 3):
            raise ValueError('this VMamba is between versions 0 and 2: it halves its resolution by convolutions of '
                             f'{"x".join(map(str, value.shape[2:]))} ({name}), which have no counterpart here. '
                             'Versions 0 and 2 are converted')
    if family == 'LocalVim' and any(re.fullmatch(r'layers\.\d+\.norm\.bias', name) for name in own):
        raise ValueError("this LocalVim has LayerNorm (layers.0.norm.bias), as the authors' detectors and segmentors "
                         'with rms_norm=False have. LocalVim has RMSNorm here, as their classifiers have, and cannot '
                         'compute the same')
    rename = dict(Vim=_vim_name, VMamba=_vmamba_name).get(family, str)
    names = {rename(name): prefix + name for name in own}
    weights = {rename(name): _vim_tensor(name, value) if family == 'Vim' else value for name, value in own.items()}
    return family, names, weights, rest


# ---- LocalMamba's names <-> ours ----

# (authors' name, our name); a field in braces stands for the same text on both sides.
_FIELDS = {'i': r'\d+', 'j': r'\d+', 'part': r'\w+', 'leaf': 'weight|bias'}
_RENAMES = {
    'LocalVim': [
        ('patch_embed.proj.{leaf}', 'backbone.patch_embed.projection.{leaf}'),
        ('pos_embed', 'backbone.pos_embed'),
        ('cls_token', 'backbone.cls_token'),
        ('layers.{i}.norm.weight', 'backbone.layers.{i}.norm.weight'),
        ('layers.{i}.mixer.in_proj.weight', 'backbone.layers.{i}.mixer.in_proj.weight'),
        ('layers.{i}.mixer.out_proj.weight', 'backbone.layers.{i}.mixer.out_proj.weight'),
        ('layers.{i}.mixer.attn.{part}.{leaf}', 'backbone.layers.{i}.mixer.scattn.{part}.{leaf}'),
        ('norm_f.weight', 'backbone.norm.weight'),
        ('outnorm_{i}.{leaf}', 'backbone.out_norms.{i}.{leaf}'),
        ('head.{leaf}', 'head.fc.{leaf}'),
    ],
    'LocalVMamba': [
        ('patch_embed.0.{leaf}', 'backbone.patch_embed.projection.{leaf}'),
        ('patch_embed.2.{leaf}', 'backbone.patch_embed.norm.{leaf}'),
        ('patch_embed.5.{leaf}', 'backbone.patch_embed.projection2.{leaf}'),
        ('patch_embed.7.{leaf}', 'backbone.patch_embed.norm2.{leaf}'),
        ('layers.{i}.blocks.{j}.norm.{leaf}', 'backbone.stages.{i}.blocks.{j}.norm.{leaf}'),
        ('layers.{i}.blocks.{j}.norm2.{leaf}', 'backbone.stages.{i}.blocks.{j}.norm2.{leaf}'),
        ('layers.{i}.blocks.{j}.mlp.{part}.{leaf}', 'backbone.stages.{i}.blocks.{j}.mlp.{part}.{leaf}'),
        ('layers.{i}.blocks.{j}.op.in_proj.weight', 'backbone.stages.{i}.blocks.{j}.mixer.in_proj.weight'),
        ('layers.{i}.blocks.{j}.op.out_proj.weight', 'backbone.stages.{i}.blocks.{j}.mixer.out_proj.weight'),
        ('layers.{i}.blocks.{j}.op.conv2d.{leaf}', 'backbone.stages.{i}.blocks.{j}.mixer.conv2d.{leaf}'),
        ('layers.{i}.blocks.{j}.op.out_norm.{leaf}', 'backbone.stages.{i}.blocks.{j}.mixer.out_norm.{leaf}'),
        ('layers.{i}.blocks.{j}.op.multi_scan.attn.{part}.{leaf}',
         'backbone.stages.{i}.blocks.{j}.mixer.scattn.{part}.{leaf}'),
        ('layers.{i}.downsample.1.{leaf}', 'backbone.stages.{i}.downsample.conv.{leaf}'),
        ('layers.{i}.downsample.3.{leaf}', 'backbone.stages.{i}.downsample.out_norm.{leaf}'),
        ('outnorm{i}.{leaf}', 'backbone.norm{i}.{leaf}'),
        ('classifier.head.{leaf}', 'head.fc.{leaf}'),
    ],
}
_MERGING = r'(layers|backbone\.stages)\.(\d+)\.downsample\.(reduction\.weight|norm\.weight|norm\.bias)'
# Parts of mmdet's detectors and mmseg's segmentors beside the backbone.
_DENSE = re.compile(r'(?:neck|\w+_head)\.')
# LocalVim keeps one tensor a direction, ours one for all.
_PER_DIRECTION = {
    'A_log_{}': 'ssm.A_log',
    'D_{}': 'ssm.D',
    'conv1d_{}.weight': 'conv_weight',
    'conv1d_{}.bias': 'conv_bias',
    'x_proj_{}.weight': 'ssm.x_proj_weight',
    'dt_proj_{}.weight': 'ssm.dt_proj_weight',
    'dt_proj_{}.bias': 'ssm.dt_proj_bias',
}
# Linear layers, which VMamba's version 2 may hold as 1x1 convolutions.
_LINEAR = re.compile(r'layers\.\d+\.blocks\.\d+\.(?:op\.(?:in|out)_proj|mlp\.\w+)\.weight')
# LocalVMamba stacks them already.
_STACKED = {
    'x_proj_weight': 'ssm.x_proj_weight',
    'dt_projs_weight': 'ssm.dt_proj_weight',
    'dt_projs_bias': 'ssm.dt_proj_bias',
    'A_logs': 'ssm.A_log',
    'Ds': 'ssm.D',
    'multi_scan.weights': 'mixed_scan.alphas',
}


def _merging_order(channels: int, to_ours: bool) -> Tensor:
    """Return the permutation of PatchMerging's 4C inputs.

    The authors order them as C channels of each of (0,0), (1,0), (0,1), (1,1), meaning (row, column). Ours are (0,0),
    (0,1), (1,0), (1,1) of each of C channels.
    """
    official = torch.arange(4 * channels).view(2, 2, channels)  # column, row, channel
    order = official.permute(2, 1, 0).flatten()
    return order if to_ours else order.argsort()


def _permute_merging(tensor: Tensor, to_ours: bool) -> Tensor:
    order = _merging_order(tensor.shape[-1] // 4, to_ours)
    return tensor[..., order.to(tensor.device)]


def _rename(name: str, rules: list[tuple[str, str]]) -> str | None:
    """Return the counterpart of ``name`` by the first rule whose left side it fits, or None."""
    for left, right in rules:
        pattern = re.escape(left).replace(r'\{', '{').replace(r'\}', '}')
        match = re.fullmatch(pattern.format(**{field: f'(?P<{field}>{text})' for field, text in _FIELDS.items()}), name)
        if match:
            return right.format(**match.groupdict())
    return None


def _convert_local_vim(weights: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    ours, unmatched = {}, []
    directions: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        block = re.fullmatch(r'layers\.(\d+)\.mixer\.(\w+?)_(\d+)(\.\w+)?', name)
        if (renamed := _rename(name, _RENAMES['LocalVim'])) is not None:
            ours[renamed] = tensor
        elif match := re.fullmatch(r'layers\.(\d+)\.mixer\.multi_scan\.weights', name):
            ours[f'backbone.layers.{match.group(1)}.mixer.mixed_scan.alphas'] = tensor.flatten()
        elif block and (key := f'{block.group(2)}_{{}}{block.group(4) or ""}') in _PER_DIRECTION:
            target = f'{block.group(1)}.mixer.{_PER_DIRECTION[key]}'
            directions.setdefault(target, {})[int(block.group(3))] = tensor
        elif name not in ('rope.freqs_cos', 'rope.freqs_sin'):
            unmatched.append(name)
    counts: dict[str, int] = {}
    for target, tensors in directions.items():
        index = target.split('.')[0]
        counts[index] = max(counts.get(index, 0), max(tensors) + 1)
    for target, tensors in directions.items():
        K = counts[target.split('.')[0]]
        if len(tensors) != K:
            raise ValueError(f'layers.{target}: the checkpoint has directions {sorted(tensors)}, expected 0 to {K - 1}')
        stacked = torch.stack([tensors[k] for k in range(K)])
        ours[f'backbone.layers.{target}'] = stacked[:, :, 0] if target.endswith('conv_weight') else stacked
    return ours, unmatched


def _convert_local_vmamba(weights: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    ours, unmatched = {}, []
    last = max(int(match[1]) for name in weights if (match := re.match(r'layers\.(\d+)\.', name)))
    for name, tensor in weights.items():
        block = re.fullmatch(r'layers\.(\d+)\.blocks\.(\d+)\.op\.(.+)', name)
        if (renamed := _rename(name, _RENAMES['LocalVMamba'])) is not None:
            one_by_one = tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and _LINEAR.fullmatch(name)
            ours[renamed] = tensor.flatten(1) if one_by_one else tensor
        elif re.fullmatch(_MERGING, name):
            ours[name.replace('layers.', 'backbone.stages.', 1)] = _permute_merging(tensor, to_ours=True)
        elif re.fullmatch(r'classifier\.norm\.(weight|bias)', name):
            ours.setdefault(f'backbone.norm{last}.{name.split(".")[-1]}', tensor)
        elif block and block.group(3) in _STACKED:
            stage, index, leaf = block.groups()
            if leaf in ('A_logs', 'Ds'):
                op = name[:-len(leaf)]
                shown = [op + other for other in ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias')]
                K = next((len(weights[other]) for other in shown if other in weights), None)
                if K is None:
                    raise ValueError(f'{name}: the number of scan directions is unknown: the checkpoint has none '
                                     f'of {", ".join(shown)}')
                tensor = tensor.reshape(K, -1, *tensor.shape[1:])
            elif leaf == 'multi_scan.weights':
                tensor = tensor.flatten()
            ours[f'backbone.stages.{stage}.blocks.{index}.mixer.{_STACKED[leaf]}'] = tensor
        else:
            unmatched.append(name)
    return ours, unmatched


def from_official(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    """Convert the authors' state dict to our names.

    Args:
        state_dict: of LocalMamba's authors: a classifier, a backbone with output norms, or a supernet of the direction
            search; or of Vim's released classifiers (class token in the middle) or VMamba's, versions 0 and 2. Vim
            becomes a LocalVim with directions h, h_flip, VMamba a LocalVMamba with h, v, h_flip, v_flip, both without
            SCAttn. Of a detector or segmentor, which has the authors' names under ``backbone.``, the rest stays as it
            is: their necks and heads are mmdet's and mmseg's.

    Returns:
        (weights under our names, names that were not understood). Rotary tables are dropped: they are computed.

    Raises:
        ValueError: these are not the authors' names, tensors of a direction are missing, or the model has no
            counterpart here: one of the first Vim models (RoPE, class token in front), a VMamba between versions 0
            and 2, a LocalVim with LayerNorm.
    """
    family, names, weights, rest = as_localmamba(state_dict)
    convert = _convert_local_vim if family in ('LocalVim', 'Vim') else _convert_local_vmamba
    ours, unmatched = convert(weights)
    return {**ours, **rest}, [names[name] for name in unmatched]


def to_official(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    """Convert our state dict to the authors' names: the inverse of :func:`from_official`.

    Args:
        state_dict: of a classifier (``backbone.*``, ``head.fc.*``), of a backbone alone, or of a detector or
            segmentor, whose weights outside of the backbone stay as they are.

    Returns:
        (weights under the authors' names, names without a counterpart there). VMamba of version 0 gets the names of
        LocalMamba's authors, which VMamba's present code reads, too.

    Raises:
        ValueError: these are not our names, or the grid of learned positions is unknown.
    """
    metadata = getattr(state_dict, '_metadata', {})
    grid = next((metadata[module]['grid'] for module in ('backbone', '') if 'grid' in metadata.get(module, {})), None)
    if not any(name.startswith('backbone.') for name in state_dict):
        state_dict = {f'backbone.{name}': tensor for name, tensor in state_dict.items()}
    if 'backbone.layers.0.mixer.ssm.A_log' in state_dict:
        arch = 'LocalVim'
    elif 'backbone.stages.0.blocks.0.mixer.ssm.A_log' in state_dict:
        arch = 'LocalVMamba'
    else:
        raise ValueError('this is not a state dict of LocalVim or LocalVMamba: it has, e.g., '
                         f'{", ".join(list(state_dict)[:3]) or "nothing"}')
    rules = [(ours, official) for official, ours in _RENAMES[arch]]
    per_direction = {ours: official for official, ours in _PER_DIRECTION.items()}
    stacked = {ours: official for official, ours in _STACKED.items()}
    stages = (re.match(r'backbone\.stages\.(\d+)\.', name) for name in state_dict)
    last = max((int(stage[1]) for stage in stages if stage), default=0)
    taps = [name for name in state_dict if re.fullmatch(r'backbone\.norm\d+\.weight', name)]
    rest = {name: tensor for name, tensor in state_dict.items() if _DENSE.match(name)}
    official, unmatched = {}, []
    for name, tensor in state_dict.items():
        block, _, leaf = name.rpartition('.mixer.')
        if name in rest:
            continue
        if arch == 'LocalVMamba' and not rest and len(taps) == 1 and name.startswith(f'backbone.norm{last}.'):
            official[name.replace(f'backbone.norm{last}', 'classifier.norm')] = tensor
        elif (renamed := _rename(name, rules)) is not None:
            official[renamed] = tensor
        elif arch == 'LocalVim' and leaf in per_direction:
            prefix = f'{block[len("backbone."):]}.mixer.'
            for k, own in enumerate(tensor):
                official[prefix + per_direction[leaf].format(k)] = own[:, None] if leaf == 'conv_weight' else own
        elif arch == 'LocalVim' and leaf == 'mixed_scan.alphas':
            official[f'{block[len("backbone."):]}.mixer.multi_scan.weights'] = tensor.view(-1, 1, 1, 1)
        elif arch == 'LocalVMamba' and re.fullmatch(_MERGING, name):
            official[name.replace('backbone.stages.', 'layers.', 1)] = _permute_merging(tensor, to_ours=False)
        elif arch == 'LocalVMamba' and leaf in stacked:
            if leaf in ('ssm.A_log', 'ssm.D'):
                tensor = tensor.flatten(0, 1)
            elif leaf == 'mixed_scan.alphas':
                tensor = tensor.view(-1, 1, 1, 1)
            official[f'{block.replace("backbone.stages.", "layers.", 1)}.op.{stacked[leaf]}'] = tensor
        else:
            unmatched.append(name)
    if arch == 'LocalVim' and 'cls_token' not in official:
        tokens, channels = official['pos_embed'].shape[1:]
        rows, columns = grid or (round(tokens ** 0.5), ) * 2
        if rows * columns != tokens:
            raise ValueError(f'the grid of {tokens} positions is unknown: {tokens} is not a square number, and the '
                             'state dict has no metadata with the grid')
        tables = rotary_tables(rows, columns, channels, 14, official['pos_embed'].device)
        official['rope.freqs_cos'], official['rope.freqs_sin'] = (table.clone() for table in tables)
    if rest:
        official = {BACKBONE + name: tensor for name, tensor in official.items()}
    return {**official, **rest}, unmatched
