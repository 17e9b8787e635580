"""Check that data, classes and model agree."""
from typing import Any

from torch import nn

from mmlocalmamba.openmmlab.checks.data import SAMPLES, data_problems, listed

# Modules whose num_classes may differ from that of the data: proposals have one class, semantic branches and borders
# have their own.
_OTHER_CLASSES = ('RPNHead', 'CascadeRPNHead', 'FusedSemanticHead', 'STDCHead', 'VGG')

# Message for a backbone with random weights.
FROM_SCRATCH = 'starts from scratch: neither model.backbone.init_cfg.checkpoint nor load_from is set'


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return {name: module} of the modules whose ``num_classes`` must match the data."""
    return {name: module for name, module in model.named_modules()
            if isinstance(getattr(module, 'num_classes', None), int)
            and type(module).__name__ not in _OTHER_CLASSES and not name.endswith('rpn_head')}


def class_problems(model: nn.Module, dataset: Any) -> list[str]:
    """Return a problem for each head whose ``num_classes`` is not the dataset's number of classes.

    If the dataset has no class names, its labels must be smaller than ``num_classes``.
    """
    classes = dataset.metainfo.get('classes')
    if isinstance(classes, str):
        return []
    made_for = heads(model)
    if classes is None:
        labels = [dataset.get_data_info(index).get('gt_label') for index in range(min(len(dataset), 100 * SAMPLES))]
        largest = max((label for label in labels if isinstance(label, int)), default=-1)
        return [f'{type(dataset).__name__} has the label {largest}, but {name} has num_classes={head.num_classes}: '
                f'set it to at least {largest + 1}' for name, head in made_for.items() if largest >= head.num_classes]
    wrong = {name: head.num_classes for name, head in made_for.items() if head.num_classes != len(classes)}
    if not wrong:
        return []
    named = listed(f'{name} num_classes={number}' for name, number in wrong.items())
    return [f'{type(dataset).__name__} has {len(classes)} classes ({listed(classes)}), but the model has {named}. '
            f"In a configuration with _base_, set model = __import__('mmlocalmamba').with_classes(_base_.model, "
            f'{len(classes)}); set data_preprocessor and evaluators separately']


def metric_problems(evaluator: Any, count: int) -> list[str]:
    """Return a problem for each metric whose ``topk`` is larger than the number of classes."""
    return [f'{type(metric).__name__} has topk={tuple(metric.topk)}, but there are {count} classes: set '
            'val_evaluator = dict(topk=(1, ))' for metric in evaluator.metrics
            if isinstance(getattr(metric, 'topk', None), (list, tuple)) and count < max(metric.topk)]


def problems(model: nn.Module, train: Any, val: Any = None, evaluator: Any = None) -> list[str]:
    """Return all problems of model, datasets and evaluator, each with its remedy."""
    found = [f'training data: {problem}' for problem in [*data_problems(train), *class_problems(model, train)]]
    if val is None:
        return found
    found += [f'validation data: {problem}' for problem in [*data_problems(val), *class_problems(model, val)]
              if f'training data: {problem}' not in found]
    classes, others = (dataset.metainfo.get('classes') for dataset in (train, val))
    if classes is not None and others is not None and tuple(classes) != tuple(others):
        number, (one, other) = next((number, pair) for number, pair in enumerate(
            zip((*classes, None), (*others, None))) if pair[0] != pair[1])
        found.append(f'classes of training and validation differ: class {number} is {one!r} in training and {other!r} '
                     'in validation. With a folder for each class, both need the same folders')
    elif evaluator is not None and classes is not None:
        found += metric_problems(evaluator, len(classes))
    return found


def configuration_problems(cfg: Any) -> list[str]:
    """Return a problem for each variable of a configuration that is no longer read."""
    if cfg.get('pretrained') is None:
        return []
    return [f'pretrained={cfg["pretrained"]!r} at the top of the configuration is no longer read: set model = '
            f"dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint={cfg['pretrained']!r}))), or "
            f'--cfg-options model.backbone.init_cfg.checkpoint={cfg["pretrained"]}']
