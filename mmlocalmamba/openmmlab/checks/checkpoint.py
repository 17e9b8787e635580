"""Compare a checkpoint with the data and the schedule of a run, before anything is trained or tested with it."""
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmlocalmamba.openmmlab.checks.findings import listed
from mmlocalmamba.openmmlab.checks.model import difference
from mmlocalmamba.weights.loading import unwrap_model

# What a scheduler's state has besides its settings.
_PROGRESS = ('last_step', '_global_step', '_last_value', 'verbose', 'optimizer')
_SHOWN = {'base_values': 'base rate'}
# Settings of an optimizer that no scheduler changes.
_FIXED = ('weight_decay', 'betas', 'eps', 'momentum', 'nesterov', 'amsgrad')


def saved_classes(checkpoint: dict) -> tuple[str, ...] | None:
    """Return the class names that a checkpoint was trained on, None if it does not say."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    known = meta.get('dataset_meta')
    known = known if isinstance(known, dict) else {}
    classes = known.get('classes', known.get('CLASSES', meta.get('CLASSES')))
    return tuple(classes) if isinstance(classes, (list, tuple)) else None


def tested_classes(saved: tuple[str, ...] | None, dataset: Any) -> tuple[str, bool]:
    """Return how the classes of a test differ from those of its checkpoint, and whether a class has another number.

    Names of which none is known to the checkpoint may be other names of the same classes.
    """
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if saved is None or not isinstance(classes, (list, tuple)):
        return '', False
    differs = difference(saved, classes, ('the checkpoint', 'the test data'))
    moved = [name for number, name in enumerate(classes) if name in saved and name != (
        saved[number] if number < len(saved) else None)]
    if not differs:
        return '', False
    write = (f"put the classes into the checkpoint's order: {listed(map(repr, saved))}. With a folder for each class, "
             'both need the same folders; one may be empty') if moved else 'make sure that they mean the same'
    return f'classes of checkpoint and test data differ: {differs}: {write}', bool(moved)


def resumption_problems(runner: Any, checkpoint: dict) -> list[str]:
    """Return why a training cannot go on with a checkpoint: other classes, or weights of other shapes."""
    found = []
    saved = saved_classes(checkpoint)
    dataset = runner.train_loop.dataloader.dataset
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    anew = ('start anew with load_from=CHECKPOINT and without resume: it takes the weights that fit, and neither the '
            'optimizer nor the position')
    if saved is not None and isinstance(classes, (list, tuple)) and (
            differs := difference(saved, classes, ('the checkpoint', 'the training data'))):
        found.append(f'the training that is resumed has other classes ({len(saved)}, now {len(classes)}): {differs}. '
                     f'Restore the data and class names, or {anew}')
    weights = checkpoint.get('state_dict')
    weights = weights if isinstance(weights, dict) else {}
    other = [f'{name} {"x".join(map(str, weights[name].shape))}, now {"x".join(map(str, value.shape))}'
             for name, value in unwrap_model(runner.model).named_parameters()
             if name in weights and hasattr(weights[name], 'shape') and weights[name].shape != value.shape]
    if other:
        found.append(f'the model that is resumed has weights of other shapes: {listed(other, 3)}. Restore the model, '
                     f'or {anew}')
    return found


def _schedulers(value: Any) -> list[Any]:
    """Return the schedulers of one optimizer or of several in one list."""
    if isinstance(value, dict):
        return [part for parts in value.values() for part in parts]
    return list(value or ())


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(np.allclose(one, other, rtol=1e-6, atol=0))
    except (TypeError, ValueError):  # no numbers, or of other lengths
        return bool(one == other)


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:
        return _short(value[0]) if all(_same(value[0], part) for part in value) else listed(map(_short, value), 3)
    return f'{value:g}' if isinstance(value, float) else str(value)


def schedule_remarks(runner: Any, checkpoint: dict) -> Iterator[str]:
    """Yield how the schedule and the optimizer of a resumed checkpoint differ from the configuration's.

    MMEngine goes on with the checkpoint's.
    """
    now, saved = _schedulers(runner.param_schedulers), _schedulers(checkpoint.get('param_schedulers'))
    differ = [f'{type(scheduler).__name__} {_SHOWN.get(key, key)} {_short(state[key])} (configuration: {_short(value)})'
              for scheduler, state in zip(now, saved) if hasattr(scheduler, 'state_dict') and isinstance(state, dict)
              for key, value in scheduler.state_dict().items()
              if key in state and key not in _PROGRESS and not _same(state[key], value)]
    if len(now) != len(saved):
        differ.append(f'{len(saved)} schedulers (configuration: {len(now)})')
    if differ:
        yield ('the schedule of the checkpoint goes on, not that of the configuration: ' + '; '.join(differ)
               + '. After its end the rates are not those of a training that has this length from the beginning. To '
                 'follow the configuration, start anew with load_from=CHECKPOINT and without resume')
    groups = getattr(runner.optim_wrapper, 'param_groups', None)
    state = checkpoint.get('optimizer')
    if isinstance(groups, list) and isinstance(state, dict) and isinstance(state.get('param_groups'), list):
        kept = {f'{key} {_short(old[key])} (configuration: {_short(group[key])})': None
                for group, old in zip(groups, state['param_groups']) for key in _FIXED
                if key in group and key in old and not _same(old[key], group[key])}
        if kept:
            yield f'the optimizer keeps settings of the checkpoint: {listed(kept)}'
