"""The parts of a checkpoint that MMEngine writes as Python objects, as numbers and tensors, and back.

torch.load(weights_only=True), the default since torch 2.6, then reads a checkpoint in any process, whether or not this
package is there: MMEngine's inferencers load before they build.
"""
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_HISTORY = {'log_history', 'count_history', 'max_length'}


def plain(value: Any) -> Any:
    """HistoryBuffers, arrays and scalars of numpy inside of dicts, lists and tuples are replaced."""
    if isinstance(value, HistoryBuffer):
        log, count = value.data
        return dict(log_history=torch.tensor(log), count_history=torch.tensor(count), max_length=value.max_length)
    if isinstance(value, dict):
        return type(value)((key, plain(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def histories(scalars: dict[str, Any]) -> dict[str, Any]:
    """What :func:`plain` made of HistoryBuffers in a message hub's ``log_scalars`` is one again; others stay."""
    return {name: HistoryBuffer(value['log_history'].numpy(force=True), value['count_history'].numpy(force=True),
                                value['max_length'])
            if isinstance(value, dict) and value.keys() == _HISTORY else value for name, value in scalars.items()}
