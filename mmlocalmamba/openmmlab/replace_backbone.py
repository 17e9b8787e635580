"""Replace the backbone in a configuration of mmdet, mmsegmentation or mmpretrain by LocalVim or LocalVMamba.

Configuration files call it: ``model = __import__('mmlocalmamba').with_backbone(_base_.model, dict(...))``.
"""
import copy
from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from typing import Any

_MEAN, _STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of the ImageNet weights, in RGB order
_SKIPPING_NECKS = ('FPN', 'PAFPN', 'NASFPN', 'FPG')  # read no maps below start_level
_VECTOR_HEADS = ('LinearClsHead', 'VisionTransformerClsHead')  # read one vector per image
_POOLING = 'GlobalAveragePooling'


def with_backbone(model: dict, backbone: dict) -> dict:
    """Return a model's configuration with another backbone and the settings that depend on it.

    The parts that read the backbone's maps get its widths:

    - The first neck has ``in_channels``.
    - Without a neck, the heads have ``in_channels``, and ``in_index`` if they choose maps.
    - A classifier has a neck ``GlobalAveragePooling``, or a linear head alone.

    Stages that no part reads are left out, since their parameters would get no gradient. LocalVim has one stride: a
    neck ``mmlocalmamba.Pyramid`` resizes its maps to the strides of the former backbone, unless an image-level model
    reads one map. A ``data_preprocessor`` inside the model gets mean and standard deviation of the ImageNet weights.

    Args:
        model: the model's configuration, e.g. ``_base_.model``. It is not changed.
        backbone: ``type`` and arguments, e.g. ``dict(type='mmlocalmamba.LocalVMamba', arch='tiny')``. ``out_indices``
            and ``out_type`` follow from the model unless they are given.

    Returns:
        The configuration with ``_delete_=True``, which replaces the inherited model. In Python, use
        ``cfg.merge_from_dict(dict(model=with_backbone(cfg.model, ...)))``.

    Raises:
        ValueError: no rule covers the model, or the backbone does not fit it. The message names the part.
    """
    model, new = copy.deepcopy(model), copy.deepcopy(dict(backbone))
    owner = _owner(model)
    old, necks, image_level = owner['backbone'], _list(owner.get('neck')), 'head' in owner
    pooled = image_level and _type(necks[0] if necks else None) == _POOLING
    rest = necks[pooled:]
    one_vector = pooled or image_level and not necks and _type(owner['head']) in _VECTOR_HEADS
    readers = _readers(owner, rest)
    count = _count(old, readers)
    levels = sorted({level for reader in readers for level in _levels(reader, count)})
    added: list[dict] = [dict(type=_POOLING)] if one_vector else []
    plain = hasattr(_build(new), 'pos_embed')  # LocalVim
    if plain and one_vector and new.get('out_type', 'avg_featmap') != 'featmap':
        added = []  # it pools by itself
    elif plain:
        new.setdefault('out_type', 'featmap')
        if len(levels) > 1:
            depth = len(_build(new).layers)
            new.setdefault('out_indices', [depth * (place + 1) // len(levels) - 1 for place in range(len(levels))])
    elif _has_one_stride(old) and len(levels) > 1:
        raise ValueError(f'{model.get("type")} reads maps of one stride, as {old.get("type")} gives: use LocalVim, or '
                         'a configuration whose backbone has several strides')
    elif 'out_indices' not in new:
        stages = _stages(old, count)
        new['out_indices'] = [stages[level] for level in levels]
    built = _build(new)
    if len(built.out_channels) != len(levels):
        raise ValueError(f'{model.get("type")} reads {len(levels)} maps, but out_indices={new["out_indices"]} gives '
                         f'{len(built.out_channels)}')
    for reader in readers:
        _set_channels(reader, count, dict(zip(levels, built.out_channels)))
    if plain and (len(levels) > 1 or not image_level):
        strides = _strides(old, count)
        scales = [stride / strides[level] for stride, level in zip(built.out_strides, levels)]
        if set(scales) != {1.0}:
            added = [dict(type='mmlocalmamba.Pyramid', channels=built.out_channels[0], scales=scales)]
    if added + rest != necks:
        necks = added + rest
        owner['neck'] = necks if len(necks) > 1 else necks[0] if necks else None
    owner['backbone'] = new
    for part in _parts(model):
        if 'backbone' in part:
            part.pop('pretrained', None)  # weights of the former backbone
        preprocessor = part.get('data_preprocessor')
        if isinstance(preprocessor, dict) and 'data_preprocessor' not in preprocessor:
            preprocessor.update(mean=[*_MEAN], std=[*_STD])
            preprocessor['to_rgb' if image_level else 'bgr_to_rgb'] = True
            preprocessor.pop('rgb_to_bgr', None)
    return dict(model, _delete_=True)


def _list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _type(part: dict | None) -> str:
    return str((part or {}).get('type')).rsplit('.')[-1]


def _parts(value: Any) -> Iterator[dict]:
    """Yield all dicts in a configuration, the outer ones first."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _parts(part)


def _build(backbone: dict) -> Any:
    """Build a backbone on the meta device: no memory, no weights."""
    import torch

    from mmlocalmamba.registry import MODELS
    with torch.device('meta'):
        built = MODELS.build(dict(backbone, init_cfg=None))
    if not hasattr(built, 'out_channels'):
        raise ValueError(f'{backbone.get("type")} is not a backbone of mmlocalmamba')
    return built


def _owner(model: dict) -> dict:
    """Return the dict that holds the backbone: the model, or the only such dict inside it."""
    owners = [model] if 'backbone' in model else [part for part in _parts(model) if 'backbone' in part]
    if len(owners) != 1:
        raise ValueError(f'{model.get("type")} has {len(owners)} parts with a backbone: '
                         'give with_backbone a part that has one')
    for part in _parts(owners[0]):
        for key in {'shared_head', 'rfp_backbone'} & set(part):
            raise ValueError(f'{part.get("type")} has {key}, which is made for {owners[0]["backbone"].get("type")}: '
                             f'use a configuration without {key}')
    return owners[0]


def _readers(owner: dict, necks: list[dict]) -> list[dict]:
    """Return the neck, or else the heads, that read the backbone's maps."""
    heads = [head for name in owner if name == 'head' or name.endswith('_head') for head in _list(owner[name])]
    readers = [part for part in _parts(heads) if 'in_channels' in part
               and ('in_index' in part or any(part is head for head in heads))]
    for neck in necks[:1]:
        # Heads with in_index may read maps that a neck without out_channels passes on.
        needed = ['in_channels', 'out_channels'][:1 + any('in_index' in reader for reader in readers)]
        if missing := [key for key in needed if key not in neck]:
            raise ValueError(f'the neck {neck.get("type")} of {owner.get("type")} has no {missing[0]}, so its widths '
                             'are unknown: use a configuration with another neck or without one')
        return [neck]
    if not readers:
        raise ValueError(f'{owner.get("type")} has no neck or head with in_channels; its heads are '
                         f'{[part.get("type") for part in heads]}: replace the backbone by hand')
    return readers


def _count(old: dict, readers: list[dict]) -> int:
    """Return the number of maps of the former backbone."""
    lists = [reader['in_channels'] for reader in readers if 'in_index' not in reader] + [old.get('out_indices')]
    counts = [len(value) for value in lists if isinstance(value, (list, tuple))]
    return counts[0] if counts else 1 + max(level for reader in readers for level in _levels(reader, 4))


def _levels(reader: dict, count: int) -> list[int]:
    """Return the indices of the maps that a neck or head reads. ``c1_in_channels`` adds the first map at the end."""
    index = reader.get('in_index', -1)
    if isinstance(reader['in_channels'], (list, tuple)) and 'in_index' not in reader:
        skips = _type(reader) in _SKIPPING_NECKS and reader.get('end_level', -1) == -1
        index = range(reader.get('start_level', 0) if skips else 0, count)
    levels = [place % count for place in ([index] if isinstance(index, int) else index)]
    return [*levels, 0] if 'c1_in_channels' in reader else levels


def _set_channels(reader: dict, count: int, widths: dict[int, int]) -> None:
    levels, former = _levels(reader, count), _list(reader['in_channels'])
    if 'c1_in_channels' in reader:
        reader['c1_in_channels'] = widths[levels.pop()]
    channels = [widths[level] for level in levels]
    if former == sorted(former, reverse=True) != sorted(former):  # from the coarsest map to the finest
        channels.reverse()
    reader['in_channels'] = channels if isinstance(reader['in_channels'], (list, tuple)) else channels[0]
    if 'in_index' in reader:
        index = [list(widths).index(level) for level in levels]
        reader['in_index'] = index[0] if isinstance(reader['in_index'], int) else index
    elif len(levels) < count and 'start_level' in reader:
        reader['start_level'] = 0


def _has_one_stride(old: dict) -> bool:
    return isinstance(old.get('patch_size'), int) and old['patch_size'] >= 14


def _stages(old: dict, count: int) -> list[int]:
    """Return the stages, of four, that replace the former backbone's maps."""
    indices = old.get('out_indices')
    if isinstance(indices, (list, tuple)) and len(indices) == count and max(indices) < 4:
        return list(indices)
    if count not in (1, 3, 4):
        raise ValueError(f'the strides of the {count} maps of {old.get("type")} are unknown: use LocalVMamba with '
                         'out_indices')
    return list(range(4 - count, 4))


def _strides(old: dict, count: int) -> list[int]:
    """Return the strides of the former backbone's maps."""
    if _has_one_stride(old):
        return [old['patch_size']] * count
    strides = list(accumulate([4, *old.get('strides', (1, 2, 2, 2))[1:]], mul))  # a ResNet may be dilated
    return [strides[stage] for stage in _stages(old, count)]
