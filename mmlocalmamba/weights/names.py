"""State dicts of the authors' implementation (hunto/LocalMamba) <-> ours: pure functions over names and tensors. Those
of Vim and VMamba get the LocalMamba authors' names first, see families.py.

Ours are those of mmpretrain's, mmdet's and mmseg's models: ``backbone.*``, and ``head.fc.*`` of a classifier. What
differs besides names: K directions are stacked in one tensor; mmcv's PatchMerging unfolds a 2x2 patch channel by
channel, the authors' code position by position; rotary tables are computed, not stored.
"""
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmlocalmamba.layers.rope import rotary_tables
from mmlocalmamba.weights.families import as_localmamba

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
    last = max(int(name.split('.')[1]) for name in weights if name.startswith('layers.'))
    for name, tensor in weights.items():
        block = re.fullmatch(r'layers\.(\d+)\.blocks\.(\d+)\.op\.(.+)', name)
        if (renamed := _rename(name, _RENAMES['LocalVMamba'])) is not None:
            ours[renamed] = tensor
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
                    raise ValueError(f'{name}: the number of scan directions cannot be told, the checkpoint has none '
                                     f'of {", ".join(shown)}')
                tensor = tensor.reshape(K, -1, *tensor.shape[1:])
            elif leaf == 'multi_scan.weights':
                tensor = tensor.flatten()
            ours[f'backbone.stages.{stage}.blocks.{index}.mixer.{_STACKED[leaf]}'] = tensor
        else:
            unmatched.append(name)
    return ours, unmatched


def from_official(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, list[str]]:
    """The authors' state dict -> ours.

    Args:
        state_dict: of LocalMamba's authors: a classifier, a backbone with output norms, or a supernet of the direction
            search; or of Vim's released classifiers (class token in the middle) or VMamba's, version 0. Vim becomes a
            LocalVim with directions h, h_flip, VMamba a LocalVMamba with h, v, h_flip, v_flip, both without SCAttn.
            Of a detector or segmentor, which has the authors' names under ``backbone.``, the rest stays as it is.

    Returns:
        (weights under our names, names that were not understood). Rotary tables, which are computed, are dropped.

    Raises:
        ValueError: these are not the authors' names, the tensors of some direction are missing, or it is a model that
            has no counterpart here: one of the first Vim models (RoPE, class token in front), a later VMamba (with
            MLPs), a LocalVim with LayerNorm.
    """
    family, names, weights, rest = as_localmamba(state_dict)
    convert = _convert_local_vim if family in ('LocalVim', 'Vim') else _convert_local_vmamba
    ours, unmatched = convert(weights)
    return {**ours, **rest}, [names[name] for name in unmatched]


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
