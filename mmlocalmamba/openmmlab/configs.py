"""Helpers for configuration files: paths of our configurations, schedules, numbers of classes, data without masks.

Configuration files call them in expressions, ``__import__('mmlocalmamba').config_path(...)``, since MMEngine reads a
file with import statements as a new-style configuration.
"""
import copy
import difflib
from pathlib import Path
from typing import Any


def config_path(name: str) -> str:
    """Return the absolute path of one of our configurations, in a clone or in an installed wheel.

    Args:
        name: file name with or without ``configs/`` and ``.py``, e.g. ``'mask-rcnn_localvmamba-t_1x_coco'`` or
            ``'_base_/schedules/1x'``.

    Raises:
        ValueError: no configuration has this name. The message lists similar names.
    """
    stem = name.removeprefix('configs/').removesuffix('.py')
    package = Path(__file__).resolve().parents[1]
    folders = [folder for folder in (package / '.mim' / 'configs', package.parent / 'configs') if folder.is_dir()]
    for folder in folders:
        if (folder / f'{stem}.py').is_file():
            return str(folder / f'{stem}.py')
    known = sorted(str(path.relative_to(folder).with_suffix('')) for folder in folders[:1]
                   for path in folder.rglob('*.py'))
    similar = difflib.get_close_matches(stem, known, n=5, cutoff=0.3) or known
    raise ValueError(f'no config {name!r}; similar: {", ".join(similar) or "none, the configs are not installed"}')


def schedule(name: str) -> dict:
    """Return the settings of one of our schedules, for a configuration with another schedule.

    In a configuration file, ``globals().update(...)`` makes each entry a setting of the file::

        _base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
        globals().update(__import__('mmlocalmamba').schedule('1x'))

    ``optim_wrapper`` and ``train_cfg`` replace the inherited ones: AdamW does not accept the momentum of SGD. Later
    lines of the file may assign an entry again.

    Args:
        name: name of a file in ``configs/_base_/schedules``, e.g. ``'1x'``.

    Returns:
        A dict with ``optim_wrapper``, ``param_scheduler``, ``train_cfg``, ``default_hooks`` and ``log_processor``, and
        with ``auto_scale_lr`` if the schedule has it.

    Raises:
        ValueError: no schedule has this name.
    """
    from mmengine.config import Config
    cfg = Config.fromfile(config_path(f'_base_/schedules/{name}')).to_dict()
    settings = {key: dict(cfg[key], _delete_=True) for key in ('optim_wrapper', 'train_cfg')}
    # At least five entries: unpacking into the four names of older versions raises ValueError.
    settings['log_processor'] = cfg.get('log_processor', dict(by_epoch=True))
    settings.update({key: cfg[key] for key in ('param_scheduler', 'default_hooks', 'auto_scale_lr') if key in cfg})
    return settings


def with_classes(model: dict, num_classes: int) -> dict:
    """Return a model's configuration with another number of classes in every head.

    ``topk`` of a classifier's head loses the numbers above ``num_classes``.

    Args:
        model: the model's configuration, e.g. ``_base_.model``. It is not changed.
        num_classes: the number of classes, at least 1.

    Raises:
        ValueError: no head has ``num_classes``, or the number is below 1.
    """
    if num_classes < 1:
        raise ValueError(f'num_classes must be at least 1, got {num_classes}')
    found = 0

    def change(value: Any) -> None:
        nonlocal found
        if isinstance(value, dict):
            if 'num_classes' in value:
                value['num_classes'], found = num_classes, found + 1
                if isinstance(value.get('topk'), (list, tuple)):
                    value['topk'] = tuple(k for k in value['topk'] if k <= num_classes)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            change(part)

    model = copy.deepcopy(model)
    change(model)
    if not found:
        raise ValueError(f"no part of the model {model.get('type')} has num_classes")
    return model


def without_masks(base: dict) -> dict:
    """Return the data settings of a detector with masks, for annotations that have boxes and no polygons.

    In a configuration file, ``globals().update(...)`` makes each entry a setting of the file::

        globals().update(__import__('mmlocalmamba').without_masks(_base_))

    Args:
        base: ``_base_`` of the configuration, with ``train_pipeline`` and ``test_pipeline``. It is not changed.

    Returns:
        A dict with ``train_pipeline``, ``test_pipeline``, ``train_dataloader``, ``val_dataloader``, ``val_evaluator``,
        ``test_dataloader`` and ``test_evaluator``.

    Raises:
        ValueError: a pipeline loads no masks.
    """
    settings = {}
    for name in ('train_pipeline', 'test_pipeline'):
        settings[name] = pipeline = copy.deepcopy(base[name])
        loads = [step for step in pipeline if step['type'] == 'LoadAnnotations' and step.get('with_mask')]
        if not loads:
            raise ValueError(f'{name} loads no masks: {[step["type"] for step in pipeline]}')
        for step in loads:
            step['with_mask'] = False
    for split, name in (('train', 'train_pipeline'), ('val', 'test_pipeline'), ('test', 'test_pipeline')):
        settings[f'{split}_dataloader'] = dict(dataset=dict(pipeline=settings[name]))
    # Seven entries: unpacking into the five names of older versions raises ValueError.
    return dict(settings, val_evaluator=dict(metric='bbox'), test_evaluator=dict(metric='bbox'))
