"""Training as a job on a cluster: stopped at any moment, resumed as if it never was, halted before NaN reaches weights.

What it promises, and what not: docs/jobs.md.
"""
from mmlocalmamba.engine.broken_files import BrokenFilesHook
from mmlocalmamba.engine.checkpoints import CheckpointHook, WholeFileBackend
from mmlocalmamba.engine.guard import NumericalGuardHook
from mmlocalmamba.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmlocalmamba.engine.loops import ExactResumeHook, RepeatableBatches
from mmlocalmamba.engine.preemption import EXIT_PREEMPTED, PreemptionHook

__all__ = ['EXIT_PREEMPTED', 'BrokenFilesHook', 'CheckpointHook', 'ExactResumeHook',
           'LayerDecayOptimWrapperConstructor', 'NumericalGuardHook', 'PreemptionHook', 'RepeatableBatches',
           'WholeFileBackend']
