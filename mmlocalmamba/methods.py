"""Our backbones in methods of others: widths, levels and strides are set, so that nobody has to know channel numbers.

For expressions in configuration files: ``model = __import__('mmlocalmamba').with_backbone(_base_.model, dict(...))``.
"""
import copy
from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from typing import Any

# What weights of ImageNet, ours and the authors', are trained with.
_MEAN, _STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_STAGES = 4
# A backbone with patches of this size, or larger, has maps of one stride.
_PLAIN = 14


def with_backbone(model: dict, backbone: dict) -> dict:
    """A model's configuration with one of our backbones in the place of its own.

    Whoever reads the backbone's maps, the neck or else the heads, gets their widths. Stages that nobody reads are left
    out, so that every parameter gets a gradient. LocalVim's maps have one stride: a ``Pyramid`` brings them to the
    strides of the backbone that was there, but in image-level models. Where the model normalises images, it does so as
    the weights of ImageNet need it (in mmpretrain's classifiers the configuration's ``data_preprocessor`` does).

    Args:
        model: e.g. ``_base_.model``; it stays as it is.
        backbone: ``type`` and arguments of ours, e.g. ``dict(type='mmlocalmamba.LocalVMamba', arch='tiny')``.
            ``out_indices`` and ``out_type`` need not be given.

    Returns:
        The configuration, with ``_delete_=True``, to lay over the inherited one. In Python:
        ``cfg.merge_from_dict(dict(model=with_backbone(cfg.model, ...)))``.

    Raises:
        ValueError: the model holds no single backbone, nobody says which widths it reads, the number of maps does not
            fit, or they cannot be brought to the strides that the method needs.
    """
    model = copy.deepcopy(model)
    owner = model
    while 'backbone' not in owner:
        inner = [part for part in owner.values() if isinstance(part, dict) and _holds_backbone(part)]
        if len(inner) != 1:
            raise ValueError(f'the model {model.get("type")} has no single backbone to replace')
        owner, = inner
    old, new = owner['backbone'], copy.deepcopy(dict(backbone))
    readers = list(_readers(owner))
    if not readers:
        raise ValueError(f'neither the neck nor a head of {owner.get("type")} says in_channels: what reads the '
                         'backbone is not known')
    count = _count(old, readers)
    levels = _used_levels(readers, count)
    plain = _is_plain(new)
    stages = _stages_of(old, count, new)
    image_level = 'head' in owner
    pooled = image_level and plain and str(_first(owner).get('type')).endswith('GlobalAveragePooling')
    if plain:
        if pooled and new.get('out_type', 'avg_featmap') != 'featmap':
            owner['neck'] = None  # LocalVim pools by itself
        else:
            new.setdefault('out_type', 'featmap')
        if len(levels) > 1:
            depth = len(_built(new).layers)
            new.setdefault('out_indices', [depth * (place + 1) // len(levels) - 1 for place in range(len(levels))])
    elif _has_one_stride(old) and len(levels) > 1:
        raise ValueError(f'{model.get("type")} is made for maps of one stride, those of {old.get("type")}: take '
                         'LocalVim, or a configuration whose backbone has several')
    else:
        new.setdefault('out_indices', [stages[level] for level in levels])
    built = _built(new)
    if len(built.out_channels) != len(levels):
        raise ValueError(f'the method reads {len(levels)} maps, out_indices={new["out_indices"]} gives '
                         f'{len(built.out_channels)}')
    widths = dict(zip(levels, built.out_channels))
    for reader in readers:
        _set_widths(reader, widths, count)
    _tell_what_passes(owner, widths)
    if plain and not image_level:
        wanted = _strides_of(old, stages)
        _match_strides(owner, built, [wanted[level] for level in levels])
    owner['backbone'] = new
    for part in (model, owner):
        part.pop('pretrained', None)  # of the backbone that was there
        _normalise(part.get('data_preprocessor'), image_level)
    return dict(model, _delete_=True)


def _holds_backbone(part: dict) -> bool:
    return 'backbone' in part or any(isinstance(value, dict) and _holds_backbone(value) for value in part.values())


def _built(backbone: dict) -> Any:
    """The backbone on the meta device: without memory, without weights."""
    import torch

    from mmlocalmamba.registry import MODELS
    with torch.device('meta'):
        built = MODELS.build(dict(backbone, init_cfg=None))
    if not hasattr(built, 'out_channels'):
        raise ValueError(f'{backbone.get("type")} is no backbone of mmlocalmamba')
    return built


def _is_plain(backbone: dict) -> bool:
    return hasattr(_built(backbone), 'pos_embed')


def _first(owner: dict) -> dict:
    neck = owner.get('neck') or {}
    return neck[0] if isinstance(neck, (list, tuple)) else neck


def _readers(owner: dict) -> Iterator[dict]:
    """The parts that read the backbone's maps: they have in_channels, for one map or for several."""
    first = _first(owner)
    if 'in_channels' in first or 'in_channel' in first:
        yield first
        return

    def inner(part: Any) -> Iterator[dict]:
        if isinstance(part, dict) and {'in_channels', 'in_index'} <= set(part):
            yield part
        elif isinstance(part, (dict, list, tuple)):
            for value in part.values() if isinstance(part, dict) else part:
                yield from inner(value)

    for name, value in owner.items():
        if name == 'head' or name.endswith('_head'):
            for head in value if isinstance(value, (list, tuple)) else [value]:
                found = list(inner(head))
                yield from found or ([head] if isinstance(head, dict) and 'in_channels' in head else [])


def _key(reader: dict) -> str:
    return 'in_channels' if 'in_channels' in reader else 'in_channel'


def _count(old: dict, readers: list[dict]) -> int:
    """How many maps the backbone that was there gives."""
    lists = {len(reader[_key(reader)]) for reader in readers
             if isinstance(reader[_key(reader)], (list, tuple)) and 'in_index' not in reader}
    if lists:
        return max(lists)
    indices = old.get('out_indices')
    if isinstance(indices, (list, tuple)):
        return len(indices)
    read = [index for reader in readers for index in _indices(reader, _STAGES)] if any(
        'in_index' in reader for reader in readers) else [0]
    return max(read) + 1


def _indices(reader: dict, count: int) -> list[int]:
    """Which of the maps a part reads."""
    index = reader.get('in_index')
    if index is None:
        index = list(range(count)) if isinstance(reader[_key(reader)], (list, tuple)) else -1
    found = [place % count for place in ([index] if isinstance(index, int) else index)]
    return [*found, 0] if 'c1_in_channels' in reader else found


def _used_levels(readers: list[dict], count: int) -> list[int]:
    levels = sorted({level for reader in readers for level in _indices(reader, count)})
    start = readers[0].get('start_level', 0)
    if str(readers[0].get('type')).endswith('NASFCOS_FPN'):  # it numbers the backbone's maps
        return levels
    if len(readers) == 1 and start and readers[0].get('end_level', -1) == -1:
        readers[0]['start_level'] = 0
        readers[0]['in_channels'] = readers[0]['in_channels'][start:]
        return levels[start:]
    return levels


def _stages_of(old: dict, count: int, new: dict) -> list[int]:
    """Our stages for the maps of the backbone that was there."""
    indices = old.get('out_indices')
    if isinstance(indices, (list, tuple)) and len(indices) == count and max(indices) < _STAGES:
        return list(indices)
    if count == 2 or count > _STAGES:
        if 'out_indices' not in new:
            raise ValueError(f'which stages replace the {count} maps of {old.get("type")} is not known: give '
                             'out_indices, so that the strides fit')
        return [new['out_indices']] * count if isinstance(new['out_indices'], int) else list(new['out_indices'])
    return list(range(_STAGES - count, _STAGES))


def _has_one_stride(old: dict) -> bool:
    return isinstance(old.get('patch_size'), int) and old['patch_size'] >= _PLAIN


def _strides_of(old: dict, stages: list[int]) -> list[int]:
    """Strides of the maps that the method is made for."""
    if _has_one_stride(old):
        return [old['patch_size']] * len(stages)
    if 'strides' in old and len(old['strides']) > max(stages):  # a ResNet's, perhaps dilated
        by_stage = list(accumulate(old['strides'], mul, initial=4))[1:]
        return [by_stage[stage] for stage in stages]
    return [4 * 2 ** stage for stage in stages]


def _match_strides(owner: dict, built: Any, wanted: list[int]) -> None:
    scales = [stride / want for stride, want in zip(built.out_strides, wanted)]
    if set(scales) == {1.0}:
        return
    neck = owner.get('neck')
    pyramid = dict(type='mmlocalmamba.Pyramid', channels=built.out_channels[0], scales=scales)
    owner['neck'] = [pyramid, *(neck if isinstance(neck, (list, tuple)) else [neck])] if neck else pyramid


def _set_widths(reader: dict, widths: dict[int, int], count: int) -> None:
    key, levels = _key(reader), list(widths)
    if isinstance(reader[key], (list, tuple)):
        read = _indices(reader, count) if 'in_index' in reader else levels
        new = [widths[level] for level in read]
        falling = list(reader[key]) == sorted(reader[key], reverse=True) and len(set(reader[key])) > 1
        reader[key] = type(reader[key])(new[::-1] if falling else new)  # JPU insists on a tuple
    else:
        reader[key] = widths[_indices(reader, count)[0]]
    if 'c1_in_channels' in reader:
        reader['c1_in_channels'] = widths[0]
    index = reader.get('in_index')
    if index is not None:
        reader['in_index'] = (levels.index(index % count) if isinstance(index, int)
                              else [levels.index(place % count) for place in index])


def _tell_what_passes(owner: dict, widths: dict[int, int]) -> None:
    """mmsegmentation's JPU replaces the last map alone: heads read the others as the backbone gave them."""
    if not str(_first(owner).get('type')).endswith('JPU'):
        return
    passed = list(widths.values())[:-1]
    for name, head in owner.items():
        for reader in head if isinstance(head, list) else [head]:
            if name.endswith('_head') and isinstance(reader.get('in_index'), int) and reader['in_index'] < len(passed):
                reader['in_channels'] = passed[reader['in_index']]
            elif name.endswith('_head') and isinstance(reader.get('in_index'), (list, tuple)):
                reader['in_channels'] = [passed[place] if place < len(passed) else channels
                                         for place, channels in zip(reader['in_index'], reader['in_channels'])]


def _normalise(preprocessor: dict | None, image_level: bool) -> None:
    if not isinstance(preprocessor, dict):
        return
    if 'data_preprocessor' in preprocessor:  # one for each branch of a semi-supervised model
        _normalise(preprocessor['data_preprocessor'], image_level)
        return
    preprocessor.update(mean=list(_MEAN), std=list(_STD))
    preprocessor.pop('rgb_to_bgr', None)
    preprocessor['to_rgb' if image_level else 'bgr_to_rgb'] = True
