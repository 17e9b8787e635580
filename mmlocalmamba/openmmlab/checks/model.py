"""Check that model, classes, metrics and loaders agree with the data."""
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmlocalmamba.openmmlab.checks.findings import listed
from mmlocalmamba.openmmlab.compat import mim_package

# Modules whose num_classes may differ from that of the data: proposals have one class, semantic branches and borders
# have their own.
_OTHER_CLASSES = ('RPNHead', 'CascadeRPNHead', 'FusedSemanticHead', 'STDCHead', 'VGG')
# Number of samples whose labels are read if there are no class names.
_SAMPLES = 100_000
DATALOADERS = 'train_dataloader', 'val_dataloader', 'test_dataloader'
# Options of a dataloader that torch refuses without workers.
_OF_WORKERS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context')

# Message for a backbone with random weights.
FROM_SCRATCH = 'starts from scratch: neither model.backbone.init_cfg.checkpoint nor load_from is set'


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return {name: module} of the modules whose ``num_classes`` must match the data."""
    return {name: module for name, module in model.named_modules()
            if isinstance(getattr(module, 'num_classes', None), int)
            and type(module).__name__ not in _OTHER_CLASSES and not name.endswith('rpn_head')}


def segmentation_head(model: nn.Module) -> nn.Module | None:
    """Return the head that predicts the classes of pixels."""
    head = getattr(model, 'decode_head', None)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def _metainfo(dataset: Any) -> dict:
    return getattr(dataset, 'metainfo', None) or {}


def class_problems(model: nn.Module, dataset: Any, trained: bool = False) -> list[str]:
    """Return a problem for each head whose ``num_classes`` is not the dataset's number of classes.

    If the dataset has no class names, its labels must be smaller than ``num_classes``.

    Args:
        trained: True for a dataset of a test, which must have the classes of the training.
    """
    classes = _metainfo(dataset).get('classes')
    if isinstance(classes, str):
        return []
    made_for = heads(model)
    if classes is None:
        labels = [dataset.get_data_info(index).get('gt_label') for index in range(min(len(dataset), _SAMPLES))
                  ] if hasattr(dataset, 'get_data_info') else []
        largest = max((label for label in labels if isinstance(label, int)), default=-1)
        return [f'{type(dataset).__name__} has the label {largest}, but {name} has num_classes={head.num_classes}: '
                f'set it to at least {largest + 1}' for name, head in made_for.items() if largest >= head.num_classes]
    wrong = {name: head.num_classes for name, head in made_for.items() if head.num_classes != len(classes)}
    if not wrong:
        return []
    named = listed(f'{name} num_classes={number}' for name, number in wrong.items())
    what = f'{type(dataset).__name__} has {len(classes)} classes ({listed(classes)}), but the model has {named}. '
    if trained:
        return [f'{what}A test needs the classes of the training, in the same order. With a folder for each class, '
                'make an empty folder for a class that has no pictures']
    return [f"{what}In a configuration with _base_, set model = __import__('mmlocalmamba').with_classes(_base_.model, "
            f'{len(classes)}), without a later model = dict(...), which replaces it; set data_preprocessor and '
            'evaluators separately']


def metric_problems(evaluator: Any, count: int) -> list[str]:
    """Return a problem for each metric whose ``topk`` is larger than the number of classes."""
    return [f'{type(metric).__name__} has topk={tuple(metric.topk)}, but there are {count} classes: set '
            'val_evaluator = dict(topk=(1, ))' for metric in evaluator.metrics
            if isinstance(getattr(metric, 'topk', None), (list, tuple)) and count < max(metric.topk)]


def difference(one: Sequence[Any], other: Sequence[Any], names: tuple[str, str]) -> str:
    """Return the first difference of two lists of classes, '' if there is none.

    Args:
        names: where the lists are from, for the message.
    """
    for number in range(max(len(one), len(other))):
        pair = [classes[number] if number < len(classes) else None for classes in (one, other)]
        if pair[0] != pair[1]:
            lacking = [f'{name} lacks {listed(map(repr, rest))}' for name, rest in (
                (names[0], [name for name in other if name not in one]),
                (names[1], [name for name in one if name not in other])) if rest]
            return f'class {number} is {pair[0]!r} in {names[0]} and {pair[1]!r} in {names[1]}' + (
                f' ({"; ".join(lacking)})' if lacking else '')
    return ''


def problems(model: nn.Module, train: Any, val: Any = None, evaluator: Any = None,
             doubted: Collection[str] = ()) -> list[str]:
    """Return the problems of model, classes and evaluator, each with its remedy.

    Args:
        doubted: those of 'training' and 'validation' whose classes the audit doubts; no head should be fitted to them.
    """
    of_train = [] if 'training' in doubted else class_problems(model, train)
    found = [f'training data: {problem}' for problem in of_train]
    if val is None:
        return found
    classes, others = (_metainfo(dataset).get('classes') for dataset in (train, val))
    if doubted or isinstance(classes, str) or isinstance(others, str):
        return found
    if classes is not None and others is not None and (
            differs := difference(classes, others, ('training', 'validation'))):
        found.append(f'classes of training and validation differ: {differs}. With a folder for each class, both need '
                     'the same folders; one may be empty in the validation')
    else:
        found += [f'validation data: {problem}' for problem in class_problems(model, val) if problem not in of_train]
        if evaluator is not None and classes is not None:
            found += metric_problems(evaluator, len(classes))
    return found


def configuration_problems(cfg: Any) -> list[str]:
    """Return problems of settings that are no longer read, and of dataloaders that torch or the models refuse."""
    found = []
    loaders = {key: cfg[key] for key in DATALOADERS if isinstance(cfg.get(key), dict)}
    scope = cfg.get('default_scope')
    if scope in ('mmdet', 'mmseg') and any(
            loader.get('collate_fn') == dict(type='default_collate') for loader in loaders.values()):
        package = mim_package(scope)
        found.append("mmpretrain's script runs this configuration and sets collate_fn=default_collate, which "
                     f'{package} does not take: write mim train {package} or mim test {package}')
    if cfg.get('pretrained') is not None:
        found.append(
            f'pretrained={cfg["pretrained"]!r} at the top of the configuration is no longer read: set model = '
            f"dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint={cfg['pretrained']!r}))), or "
            f'--cfg-options model.backbone.init_cfg.checkpoint={cfg["pretrained"]}')
    for key, loader in loaders.items():
        if not loader.get('num_workers'):
            found += [f'{key} has {option}={loader[option]!r} and num_workers=0, which torch refuses: set '
                      f'{key}.{option}={False if option == "persistent_workers" else None}, or num_workers=1'
                      for option in _OF_WORKERS if loader.get(option)]
    return found


# ---- BatchNorm ----


def norms_of_single_values(model: nn.Module) -> list[str]:
    """Return the names of BatchNorms that see one value of each picture and channel in a training step.

    They follow a pooling to 1x1 (as in UperNet and ASPP) or a linear layer. With one picture torch stops there.
    """
    training = model.training
    model.train()
    try:
        return list(_single_values(model))
    finally:
        model.train(training)


def _single_values(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        children = list(module.named_children())
        for place, (_, child) in enumerate(children):
            pooled = isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)) and isinstance(
                module, nn.Sequential)
            rest = children[place + 1:] if pooled else children[place + 1:place + 2] if isinstance(
                child, nn.Linear) else []
            for below, other in rest:
                for inner, norm in other.named_modules(prefix=f'{name}.{below}' if name else below):
                    if isinstance(norm, _BatchNorm) and norm.training and (
                            pooled or isinstance(norm, nn.BatchNorm1d)):
                        yield inner


def batch_problems(model: nn.Module, loader: Any, processes: int = 1) -> list[str]:
    """Return a problem if a step of the training gets a single picture that a BatchNorm cannot take.

    Args:
        loader: the training's dataloader.
        processes: number of processes, over which SyncBatchNorm counts.
    """
    batches = getattr(loader, 'batch_sampler', None)
    size = getattr(batches, 'batch_size', None)
    sampler = getattr(batches, 'sampler', None) or getattr(loader, 'sampler', None)
    if not size or sampler is None:
        return []
    endless = type(sampler).__name__.startswith('Infinite') or not hasattr(sampler, '__len__')
    last = 0 if endless or getattr(batches, 'drop_last', False) else len(sampler) % size
    if size != 1 and last != 1:
        return []
    modules = dict(model.named_modules())
    names = [name for name in norms_of_single_values(model)
             if processes == 1 or not isinstance(modules[name], nn.SyncBatchNorm)]
    if not names:
        return []
    if size == 1:
        what, write = 'batch_size is 1', 'set train_dataloader.batch_size to at least 2'
    else:
        what = f'the last batch of an epoch has one picture ({len(sampler)} in batches of {size})'
        write = 'set train_dataloader.drop_last=True, or another batch_size'
    return [f'{what}, but the BatchNorm {listed(names, 3)} normalises over one value for each picture, and torch stops '
            f'there: {write}']
