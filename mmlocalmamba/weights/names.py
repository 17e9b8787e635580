"""State dicts of the authors' implementation (hunto/LocalMamba) <-> ours, and of Vim (hustvl/Vim) and VMamba, version 0
(MzeroMiko/VMamba) -> ours: pure functions over names and tensors.

Ours are those of an mmpretrain classifier: ``backbone.*`` and ``head.fc.*``. What differs besides names: K directions
are stacked in one tensor; mmcv's PatchMerging unfolds a 2x2 patch channel by channel, the authors' code position by
position; rotary tables are computed, not stored.
"""
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmlocalmamba.layers.rope import rotary_tables

StateDict = dict[str, Tensor]

# (authors' name, ours); a field in braces stands for the same text on both sides.
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
        ('layers.{i}.blocks.{j}.norm.{leaf}', 'backbone.stages.{i}.blocks.{j}.norm.{leaf}'),
        ('layers.{i}.blocks.{j}.op.in_proj.weight', 'backbone.stages.{i}.blocks.{j}.mixer.in_proj.weight'),
        ('layers.{i}.blocks.{j}.op.out_proj.weight', 'backbone.stages.{i}.blocks.{j}.mixer.out_proj.weight'),
        ('layers.{i}.blocks.{j}.op.conv2d.{leaf}', 'backbone.stages.{i}.blocks.{j}.mixer.conv2d.{leaf}'),
        ('layers.{i}.blocks.{j}.op.out_norm.{leaf}', 'backbone.stages.{i}.blocks.{j}.mixer.out_norm.{leaf}'),
        ('layers.{i}.blocks.{j}.op.multi_scan.attn.{part}.{leaf}',
         'backbone.stages.{i}.blocks.{j}.mixer.scattn.{part}.{leaf}'),
        ('outnorm{i}.{leaf}', 'backbone.norm{i}.{leaf}'),
        ('classifier.head.{leaf}', 'head.fc.{leaf}'),
    ],
}
_MERGING = r'(layers|backbone\.stages)\.(\d+)\.downsample\.(reduction\.weight|norm\.weight|norm\.bias)'
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
# LocalVMamba stacks them already.
_STACKED = {
    'x_proj_weight': 'ssm.x_proj_weight',
    'dt_projs_weight': 'ssm.dt_proj_weight',
    'dt_projs_bias': 'ssm.dt_proj_bias',
    'A_logs': 'ssm.A_log',
    'Ds': 'ssm.D',
    'multi_scan.weights': 'mixed_scan.alphas',
}


# A name that only this model's authors have.
_MARKS = {
    'LocalVim': 'layers.0.mixer.A_log_0',
    'LocalVMamba': 'layers.0.blocks.0.op.A_logs',
    'Vim': 'layers.0.mixer.A_b_log',
    'VMamba': 'layers.0.blocks.0.self_attention.A_logs',
}
_VIM = re.compile(r'(layers\.\d+\.mixer)\.(A_log|A_b_log|D|D_b|(?:conv1d|x_proj|dt_proj)(?:_b)?)(\.\w+)?')
_VMAMBA = [(r'\.ln_1\.', '.norm.'), (r'\.self_attention\.', '.op.'), (r'^patch_embed\.proj\.', 'patch_embed.0.'),
           (r'^patch_embed\.norm\.', 'patch_embed.2.'), (r'^(norm|head)\.', r'classifier.\1.')]


def _official_arch(state_dict: Mapping[str, Tensor]) -> str | None:
    return next((arch for arch, name in _MARKS.items() if name in state_dict), None)


def is_official(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of LocalMamba's, Vim's or VMamba's authors."""
    return _official_arch(state_dict) is not None


def _vim_name(name: str) -> str:
    """Vim's name -> LocalVim's: scans h and h_flip are numbers 0 and 1 there, and without or with ``_b`` here."""
    match = _VIM.fullmatch(name)
    if match is None:
        return name
    mixer, part, leaf = match.groups()
    return f'{mixer}.{part.replace("_b", "")}_{int("_b" in part)}{leaf or ""}'


def _vmamba_name(name: str) -> str:
    """VMamba's name -> LocalVMamba's."""
    for pattern, replacement in _VMAMBA:
        name = re.sub(pattern, replacement, name)
    return name


def _vim_tensor(name: str, tensor: Tensor) -> Tensor:
    """Vim's released models (``..._div2``) halve the sum of both directions before the output projection, which is
    linear: half of its weight does the same, exactly, 2 being a power of two."""
    return tensor / 2 if name.endswith('.mixer.out_proj.weight') else tensor


def _merging_order(channels: int, to_ours: bool) -> Tensor:
    """Permutation of PatchMerging's 4C inputs. The authors': C channels of each of (0,0), (1,0), (0,1), (1,1), as
    (row, column); ours: (0,0), (0,1), (1,0), (1,1) of each of C channels."""
    official = torch.arange(4 * channels).view(2, 2, channels)  # column, row, channel
    order = official.permute(2, 1, 0).flatten()
    return order if to_ours else order.argsort()


def _permute_merging(tensor: Tensor, to_ours: bool) -> Tensor:
    order = _merging_order(tensor.shape[-1] // 4, to_ours)
    return tensor[..., order.to(tensor.device)]


def _rename(name: str, rules: list[tuple[str, str]]) -> str | None:
    """The counterpart of ``name`` by the first rule whose left side it fits, or None."""
    for left, right in rules:
        pattern = re.escape(left).replace(r'\{', '{').replace(r'\}', '}')
        match = re.fullmatch(pattern.format(**{field: f'(?P<{field}>{text})' for field, text in _FIELDS.items()}), name)
        if match:
            return right.format(**match.groupdict())
    return None


def from_official(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    """The authors' state dict -> ours.

    Args:
        state_dict: of LocalMamba's authors: a classifier, a backbone with output norms, or a supernet of the direction
            search; or of Vim's released classifiers (class token in the middle) or VMamba's, version 0. Vim becomes a
            LocalVim with directions h, h_flip, VMamba a LocalVMamba with h, v, h_flip, v_flip, both without SCAttn.

    Returns:
        (weights under our names, names that were not understood). Rotary tables, which are computed, are dropped.

    Raises:
        ValueError: these are not the authors' names, the tensors of some direction are missing, or it is one of the
            first Vim models (RoPE, class token in front).
    """
    arch = _official_arch(state_dict)
    if arch is None:
        raise ValueError("this is not a state dict of the authors' LocalVim or LocalVMamba, nor of Vim or VMamba: it "
                         f'has neither {" nor ".join(_MARKS.values())}, but e.g. '
                         f'{", ".join(list(state_dict)[:3]) or "nothing"}')
    names = {name: name for name in state_dict}  # as hunto/LocalMamba would have them -> as they are in the file
    if arch == 'Vim':
        if 'rope.freqs_cos' in state_dict or 'cls_token' not in state_dict:
            raise ValueError('this is a Vim with rotary positions or without a class token: only the released models '
                             'with a class token in the middle (midclstok, div2) are converted; others combine their '
                             'directions and tokens differently')
        names = {_vim_name(name): name for name in names}
        state_dict = {name: _vim_tensor(name, state_dict[own]) for name, own in names.items()}
        arch = 'LocalVim'
    elif arch == 'VMamba':
        names = {_vmamba_name(name): name for name in names}
        state_dict = {name: state_dict[own] for name, own in names.items()}
        arch = 'LocalVMamba'
    ours, unmatched, directions = {}, [], {}
    last = max(int(name.split('.')[1]) for name in state_dict if name.startswith('layers.'))
    for name, tensor in state_dict.items():
        renamed = _rename(name, _RENAMES[arch])
        if renamed is not None:
            ours[renamed] = tensor
        elif arch == 'LocalVim' and name in ('rope.freqs_cos', 'rope.freqs_sin'):
            continue
        elif arch == 'LocalVim' and (match := re.fullmatch(r'layers\.(\d+)\.mixer\.multi_scan\.weights', name)):
            ours[f'backbone.layers.{match.group(1)}.mixer.mixed_scan.alphas'] = tensor.flatten()
        elif arch == 'LocalVim' and (match := re.fullmatch(r'layers\.(\d+)\.mixer\.(\w+?)_(\d+)(\.\w+)?', name)) \
                and (key := f'{match.group(2)}_{{}}{match.group(4) or ""}') in _PER_DIRECTION:
            target = f'backbone.layers.{match.group(1)}.mixer.{_PER_DIRECTION[key]}'
            directions.setdefault(target, {})[int(match.group(3))] = tensor
        elif arch == 'LocalVMamba' and re.fullmatch(_MERGING, name):
            ours[name.replace('layers.', 'backbone.stages.', 1)] = _permute_merging(tensor, to_ours=True)
        elif arch == 'LocalVMamba' and re.fullmatch(r'classifier\.norm\.(weight|bias)', name):
            ours.setdefault(f'backbone.norm{last}.{name.split(".")[-1]}', tensor)
        elif arch == 'LocalVMamba' and (match := re.fullmatch(r'layers\.(\d+)\.blocks\.(\d+)\.op\.(.+)', name)) \
                and match.group(3) in _STACKED:
            if match.group(3) in ('A_logs', 'Ds'):
                K = state_dict[name[:-len(match.group(3))] + 'dt_projs_bias'].shape[0]
                tensor = tensor.reshape(K, -1, *tensor.shape[1:])
            elif match.group(3) == 'multi_scan.weights':
                tensor = tensor.flatten()
            ours[f'backbone.stages.{match.group(1)}.blocks.{match.group(2)}.mixer.{_STACKED[match.group(3)]}'] = tensor
        else:
            unmatched.append(names[name])
    for target, tensors in directions.items():
        block = target.split('.mixer.')[0]
        K = len(directions[f'{block}.mixer.ssm.A_log'])
        if sorted(tensors) != list(range(K)):
            raise ValueError(f'{target}: the checkpoint has directions {sorted(tensors)}, expected 0 to {K - 1}')
        stacked = torch.stack([tensors[k] for k in range(K)])
        ours[target] = stacked[:, :, 0] if target.endswith('conv_weight') else stacked
    return ours, unmatched


def to_official(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    """Our state dict -> the authors'; the inverse of :func:`from_official`.

    Args:
        state_dict: of a classifier (``backbone.*``, ``head.fc.*``) or of a backbone alone.

    Returns:
        (weights under the authors' names, names that they have no counterpart for).

    Raises:
        ValueError: these are not our names.
    """
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
    last = max((int(name.split('.')[2]) for name in state_dict if name.startswith('backbone.stages.')), default=0)
    taps = [name for name in state_dict if re.fullmatch(r'backbone\.norm\d+\.weight', name)]
    official, unmatched = {}, []
    for name, tensor in state_dict.items():
        block, _, leaf = name.rpartition('.mixer.')
        if arch == 'LocalVMamba' and len(taps) == 1 and name.startswith(f'backbone.norm{last}.'):
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
        side = round(tokens ** 0.5)
        tables = rotary_tables(side, side, channels, 14, official['pos_embed'].device)
        official['rope.freqs_cos'], official['rope.freqs_sin'] = (table.clone() for table in tables)
    return official, unmatched
