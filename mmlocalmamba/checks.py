"""What is looked at before a training: whether data, classes and model agree, and what the training starts from.

The functions name what is wrong, for the hook below, which stops a training that would not learn what it shall, and for
``python -m mmlocalmamba check``.
"""
import json
import logging
from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from torch import nn

from mmlocalmamba.backbones.base import LocalMambaBackbone, find_backbone
from mmlocalmamba.engine.broken_files import parts
from mmlocalmamba.registry import HOOKS

# Modules whose num_classes is not that of the data: proposals are of one class, a semantic branch has its own, so have
# borders.
_OTHER_CLASSES = ('RPNHead', 'CascadeRPNHead', 'FusedSemanticHead', 'STDCHead', 'VGG')
# So many samples are looked at: annotations that lack masks lack them in most of them.
_SAMPLES = 1000


def _listed(names: Any) -> str:
    names = list(map(str, names))
    return ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that are made for a number of classes of the data, by name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(getattr(module, 'num_classes', None), int)
            and type(module).__name__ not in _OTHER_CLASSES and not name.endswith('rpn_head')}


def _categories(dataset: Any) -> Iterator[str]:
    """Classes of a COCO file and of the configuration that do not belong together."""
    classes, found = dataset.metainfo.get('classes'), getattr(dataset, 'cat_ids', None)
    if found is None or tuple(classes) == tuple(getattr(type(dataset), 'METAINFO', {}).get('classes', ())):
        return
    with open(dataset.ann_file) as file:
        names = [category['name'] for category in json.load(file)['categories']]
    missing = [name for name in classes if name not in names]
    if missing:
        yield (f'classes of the configuration that {dataset.ann_file} does not have: {_listed(missing)}. '
               f'It has {_listed(names)}')
    elif [name for name in names if name in classes] != list(classes):
        yield (f'the classes {_listed(classes)} stand in another order than in {dataset.ann_file}, by which '
               f'MMDetection numbers them: write {tuple(name for name in names if name in classes)}')


def _masks(dataset: Any) -> Iterator[str]:
    if not any(getattr(step, 'with_mask', False) for step in getattr(dataset.pipeline, 'transforms', ())):
        return
    for index in range(min(len(dataset), _SAMPLES)):
        info = dataset.get_data_info(index)
        if any('mask' not in instance for instance in info.get('instances', ())):
            yield (f"an object of {info.get('img_path')} has a box but no polygon ('segmentation'), and the pipeline "
                   'asks for masks. For boxes alone take one of the configurations faster-rcnn_localvmamba-* and '
                   'retinanet_localvmamba-*; with another detector, LoadAnnotations(with_mask=False) and a model and '
                   'metric without masks')
            return


def data_problems(dataset: Any) -> list[str]:
    """What is wrong with a dataset by itself: it is empty, its classes are not those of its file, masks are missing."""
    problems = []
    for part in parts(dataset):
        if not len(part):
            where = getattr(part, 'ann_file', '') or getattr(part, 'data_prefix', '')
            problems.append(f'{type(part).__name__} found no sample in {where}: check data_root, data_prefix, the '
                            'endings of the files (img_suffix) and that annotations belong to the classes')
        elif isinstance(part.metainfo.get('classes'), str):
            classes = part.metainfo['classes']
            problems.append(f'classes must be a tuple, got the string {classes!r}: write ({classes!r}, )')
        else:
            problems += [*_categories(part), *_masks(part)]
    return problems


def class_problems(model: nn.Module, dataset: Any) -> list[str]:
    """Heads that are made for another number of classes than the dataset has. Without names of classes, labels must fit
    into the heads."""
    classes = dataset.metainfo.get('classes')
    if isinstance(classes, str):
        return []
    made_for = heads(model)
    if classes is None:
        labels = [dataset.get_data_info(index).get('gt_label') for index in range(min(len(dataset), 100 * _SAMPLES))]
        largest = max((label for label in labels if isinstance(label, int)), default=-1)
        return [f'a label of {type(dataset).__name__} is {largest}, but {name} is made for '
                f'num_classes={head.num_classes}' for name, head in made_for.items() if largest >= head.num_classes]
    wrong = {name: head.num_classes for name, head in made_for.items() if head.num_classes != len(classes)}
    if not wrong:
        return []
    named = _listed(f'{name} num_classes={number}' for name, number in wrong.items())
    return [f'{type(dataset).__name__} has {len(classes)} classes ({_listed(classes)}), but the model has {named}. '
            f"In a configuration that inherits: model = __import__('mmlocalmamba').with_classes(_base_.model, "
            f'{len(classes)}); data_preprocessor and evaluators are apart from the model']


def metric_problems(evaluator: Any, count: int) -> list[str]:
    """Accuracies among more classes than there are."""
    return [f'{type(metric).__name__} asks for topk={tuple(metric.topk)}, but there are {count} classes: '
            'val_evaluator = dict(topk=(1, ))' for metric in evaluator.metrics
            if isinstance(getattr(metric, 'topk', None), (list, tuple)) and count < max(metric.topk)]


def problems(model: nn.Module, train: Any, val: Any = None, evaluator: Any = None) -> list[str]:
    """All that is known to be wrong, each with what to do."""
    found = [f'training data: {problem}' for problem in [*data_problems(train), *class_problems(model, train)]]
    if val is None:
        return found
    found += [f'validation data: {problem}' for problem in [*data_problems(val), *class_problems(model, val)]
              if f'training data: {problem}' not in found]
    classes, others = (dataset.metainfo.get('classes') for dataset in (train, val))
    if classes is not None and others is not None and tuple(classes) != tuple(others):
        number, (one, other) = next((number, pair) for number, pair in enumerate(
            zip((*classes, None), (*others, None))) if pair[0] != pair[1])
        found.append(f'classes of training and validation differ: number {number} is {one!r} in one and {other!r} in '
                     'the other. With a folder per class, both need the same folders')
    elif evaluator is not None and classes is not None:
        found += metric_problems(evaluator, len(classes))
    return found


# ---- what a training starts from ----

def _pretrained(backbone: LocalMambaBackbone) -> list[dict]:
    cfgs = backbone.init_cfg if isinstance(backbone.init_cfg, (list, tuple)) else [backbone.init_cfg]
    return [cfg for cfg in cfgs if cfg and cfg['type'] == 'Pretrained']


def starts_from(backbone: LocalMambaBackbone) -> str | None:
    """The file or URL that ``init_weights`` will load."""
    return next((cfg['checkpoint'] for cfg in _pretrained(backbone) if cfg.get('checkpoint')), None)


def hand_on_pretrained(cfg: dict, model: nn.Module) -> None:
    """``pretrained`` at the top of a configuration, of which MMEngine knows nothing, becomes the backbone's.

    Raises:
        ValueError: the backbone's ``init_cfg`` names another file.
    """
    wanted, backbone = cfg.get('pretrained'), find_backbone(model)[1]
    if wanted is None or backbone is None:
        return
    known = _pretrained(backbone)
    if not known:
        known = [dict(type='Pretrained', checkpoint=None)]
        others = backbone.init_cfg if isinstance(backbone.init_cfg, (list, tuple)) else [backbone.init_cfg]
        backbone.init_cfg = [*filter(None, others), *known]
    for init_cfg in known:
        if init_cfg.get('checkpoint') not in (None, wanted):
            raise ValueError(f"the configuration says pretrained={wanted!r}, but model.backbone.init_cfg.checkpoint="
                             f"{init_cfg['checkpoint']!r}: set one of them to None")
        init_cfg['checkpoint'] = wanted


@HOOKS.register_module()
class TrainingChecksHook(Hook):
    """Before a training: hands the configuration's ``pretrained`` to the backbone, and stops if data, classes and heads
    do not agree. At the end of start-up and in the last line of the log: says if the backbone starts from scratch, or
    if there was nothing to train.

    Args:
        strict: False warns of what does not agree and goes on.

    Raises:
        ValueError: before training, with everything that is wrong and what to do.
    """

    priority = 'LOWEST'

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.remarks: list[str] = []

    def before_run(self, runner: Any) -> None:
        loop, val_loop = runner._train_loop, runner._val_loop
        if not isinstance(loop, BaseLoop):  # a test
            return
        hand_on_pretrained(runner.cfg, runner.model)
        val, evaluator = (val_loop.dataloader.dataset, val_loop.evaluator) if isinstance(val_loop, BaseLoop) else (
            None, None)
        wrong = problems(runner.model, loop.dataloader.dataset, val, evaluator)
        if not wrong:
            return
        message = '\n  '.join(['this training would not do what it shall:', *wrong])
        if self.strict:
            raise ValueError(f'{message}\nIf it is meant so, TrainingChecksHook(strict=False) only warns.')
        print_log(message, logger='current', level=logging.WARNING)

    def before_train(self, runner: Any) -> None:
        self.remarks = []
        backbone = find_backbone(runner.model)[1]
        if backbone is not None and not runner._has_loaded and starts_from(backbone) is None:
            self.remarks.append(f'{type(backbone).__name__} starts from scratch: pretrained=None, and no load_from. '
                                'Which weights there are: docs/weights.md')
        # Loops that count iterations say that they have one epoch.
        key = 'max_iters' if isinstance(runner.train_loop, IterBasedTrainLoop) else 'max_epochs'
        done, of = (runner.iter, runner.max_iters) if key == 'max_iters' else (runner.epoch, runner.max_epochs)
        if runner._resume and runner._has_loaded and done >= of:
            self.remarks.append(f'nothing is trained: the training was finished before, {done} of {key}={of}. To go '
                                f'on, raise train_cfg.{key} and the ends of param_scheduler')
        self._say()

    def after_run(self, runner: Any) -> None:
        if isinstance(runner._train_loop, BaseLoop):
            self._say()

    def _say(self) -> None:
        for remark in self.remarks:
            print_log(remark, logger='current', level=logging.WARNING)
