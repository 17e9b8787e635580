"""Our configurations for those of others: where they lie, their schedules, their heads for other classes.

All are meant for expressions in configuration files, ``__import__('mmlocalmamba').config_path(...)``, since MMEngine
reads a file with import statements as one of another kind.
"""
import copy
import difflib
from pathlib import Path
from typing import Any


def config_path(name: str) -> str:
    """Absolute path of one of our configs, in a clone as in an installed wheel.

    Args:
        name: file name with or without ``.py`` and ``configs/``, e.g. ``'mask-rcnn_localvmamba-t_1x_coco'`` or
            ``'_base_/schedules/1x'``.

    Raises:
        ValueError: there is no such config; similar names are listed.
    """
    stem = name.removeprefix('configs/').removesuffix('.py')
    package = Path(__file__).resolve().parent
    folders = [folder for folder in (package / '.mim' / 'configs', package.parent / 'configs') if folder.is_dir()]
    for folder in folders:
        if (folder / f'{stem}.py').is_file():
            return str(folder / f'{stem}.py')
    known = sorted(str(path.relative_to(folder).with_suffix('')) for folder in folders[:1]
                   for path in folder.rglob('*.py'))
    similar = difflib.get_close_matches(stem, known, n=5, cutoff=0.3) or known
    raise ValueError(f'no config {name!r}; similar: {", ".join(similar) or "none, the configs are not installed"}')


def schedule(name: str) -> tuple[dict, list, dict, dict]:
    """What one of our schedules says of the optimizer and the training, to lay over a configuration of others.

    Nothing of the inherited optimizer and loop is left: AdamW does not take SGD's momentum.

    Args:
        name: of a file in ``configs/_base_/schedules``, e.g. ``'1x'``.

    Returns:
        ``optim_wrapper, param_scheduler, train_cfg, default_hooks`` of a configuration, in this order.
    """
    from mmengine.config import Config
    cfg = Config.fromfile(config_path(f'_base_/schedules/{name}')).to_dict()
    optim_wrapper, train_cfg = (dict(cfg[key], _delete_=True) for key in ('optim_wrapper', 'train_cfg'))
    return optim_wrapper, cfg['param_scheduler'], train_cfg, cfg['default_hooks']


def with_classes(model: dict, num_classes: int) -> dict:
    """A model's configuration with another number of classes in every head, those in lists included.

    ``topk`` of a classifier's head loses what is more than there are classes.

    Args:
        model: e.g. ``_base_.model``; it stays as it is.

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


def without_masks(base: dict) -> tuple[list, list, dict, dict, dict]:
    """What to lay over a detector's data with masks for data with boxes alone, whose annotations have no polygons.

    Args:
        base: ``_base_`` of a configuration, with ``train_pipeline`` and ``test_pipeline``; it stays as it is.

    Returns:
        ``train_pipeline, test_pipeline, train_dataloader, val_dataloader, val_evaluator`` of the configuration, in this
        order.

    Raises:
        ValueError: a pipeline loads no masks.
    """
    pipelines = []
    for name in ('train_pipeline', 'test_pipeline'):
        pipeline = copy.deepcopy(base[name])
        loads = [step for step in pipeline if step['type'] == 'LoadAnnotations' and step.get('with_mask')]
        if not loads:
            raise ValueError(f'{name} loads no masks: {[step["type"] for step in pipeline]}')
        for step in loads:
            step['with_mask'] = False
        pipelines.append(pipeline)
    train, test = pipelines
    return train, test, dict(dataset=dict(pipeline=train)), dict(dataset=dict(pipeline=test)), dict(metric='bbox')
