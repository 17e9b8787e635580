"""Check before a training that data, classes and model agree, and which weights it starts from.

The functions return problems as texts. :class:`TrainingChecksHook` stops a training that has problems.
``python -m mmlocalmamba check`` (:mod:`mmlocalmamba.openmmlab.checks.trial`) prints them and makes a step.
"""
from mmlocalmamba.openmmlab.checks.data import data_problems
from mmlocalmamba.openmmlab.checks.hook import TrainingChecksHook
from mmlocalmamba.openmmlab.checks.model import (
    FROM_SCRATCH,
    class_problems,
    configuration_problems,
    heads,
    metric_problems,
    problems,
)

__all__ = ['FROM_SCRATCH', 'TrainingChecksHook', 'class_problems', 'configuration_problems', 'data_problems', 'heads',
           'metric_problems', 'problems']
