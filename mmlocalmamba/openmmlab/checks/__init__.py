"""Check before a training or test that data, classes, model and checkpoint agree.

:func:`audit_data` reads the data. The other functions return problems as texts. :class:`TrainingChecksHook` stops a
training or test that has problems. ``python -m mmlocalmamba check`` (:mod:`mmlocalmamba.openmmlab.checks.trial`) prints
them and makes a step.
"""
from mmlocalmamba.openmmlab.checks.audit import Audit, audit_data, truths
from mmlocalmamba.openmmlab.checks.findings import Finding, Note, Problem, Tally
from mmlocalmamba.openmmlab.checks.hook import TrainingChecksHook, audit_run
from mmlocalmamba.openmmlab.checks.model import (
    FROM_SCRATCH,
    batch_problems,
    class_problems,
    configuration_problems,
    heads,
    metric_problems,
    problems,
)

__all__ = ['FROM_SCRATCH', 'Audit', 'Finding', 'Note', 'Problem', 'Tally', 'TrainingChecksHook', 'audit_data',
           'audit_run', 'batch_problems', 'class_problems', 'configuration_problems', 'heads', 'metric_problems',
           'problems', 'truths']
