"""Compare the length and the data of a training with those of the checkpoint from which it resumes."""
import ast
from collections.abc import Iterator
from typing import Any

from mmengine.runner import IterBasedTrainLoop

# Entries of a dataset's configuration that say which data it has.
_PLACES = ('data_root', 'ann_file', 'data_prefix', 'split', 'classes')


def saved_settings(text: Any) -> dict[str, Any]:
    """Return the settings at the top of a configuration's text, as checkpoints hold it. No code in it is executed.

    Settings that are not made of numbers, texts, lists and dicts are left out.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, TypeError, ValueError):
        return {}
    settings = {}
    for statement in body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                settings[statement.targets[0].id] = _value(statement.value)
            except ValueError:
                continue
    return settings


def _value(node: ast.expr) -> Any:
    """Return the value of a literal in which dict(...) may stand for {...}."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(part) for part in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    return ast.literal_eval(node)


def _places(settings: Any) -> list[str]:
    """Return where the training data of a configuration are, one text a dataset."""
    dataset = (settings.get('train_dataloader') or {}).get('dataset')
    found, datasets = [], [dataset]
    while datasets:
        part = datasets.pop(0)
        if isinstance(part, (list, tuple)):
            datasets += part
        elif isinstance(part, dict):
            own = {key: part[key] for key in _PLACES if part.get(key)}
            if own:
                found.append(', '.join(f'{key}={_plain(value)!r}' for key, value in own.items()))
            datasets += [part.get('dataset'), part.get('datasets')]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def resumption_remarks(runner: Any, checkpoint: dict[str, Any]) -> Iterator[str]:
    """Yield what differs between a training and the checkpoint from which it resumes: its length, its data."""
    meta = checkpoint.get('meta')
    saved = saved_settings(meta.get('cfg')) if isinstance(meta, dict) else {}
    train_cfg = saved.get('train_cfg')
    key = 'max_iters' if isinstance(runner.train_loop, IterBasedTrainLoop) else 'max_epochs'
    before, now = train_cfg.get(key) if isinstance(train_cfg, dict) else None, getattr(runner, key)
    if before is not None and before != now:
        yield (f'the training that is resumed had {key}={before}, this one has {key}={now}. The learning rates follow '
               "the checkpoint's schedule, not param_scheduler. For a schedule of the new length, start anew with "
               'load_from=CHECKPOINT and without resume')
    old, new = _places(saved), _places(runner.cfg)
    if old and new and old != new:
        yield (f'the training that is resumed had other training data: {"; ".join(old)}. This one goes on from its '
               f'position with {"; ".join(new)}')
