"""Training as a job on a cluster: stopped at any moment, resumed as if it never was, halted before NaN reaches weights.

What it promises, and what not: docs/jobs.md.
"""
from mmlocalmamba.engine.bfloat16 import BFloat16OptimWrapper
from mmlocalmamba.engine.broken_files import BrokenFilesHook
from mmlocalmamba.engine.checkpoints import CheckpointHook, WholeFileBackend
from mmlocalmamba.engine.data import DataStream, Loaders
from mmlocalmamba.engine.guard import NumericalGuardHook
from mmlocalmamba.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmlocalmamba.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmlocalmamba.engine.preemption import EXIT_PREEMPTED

__all__ = ['EXIT_PREEMPTED', 'BFloat16OptimWrapper', 'BrokenFilesHook', 'CheckpointHook', 'DataStream',
           'EpochBasedTrainLoop', 'IterBasedTrainLoop', 'LayerDecayOptimWrapperConstructor', 'Loaders',
           'NumericalGuardHook', 'WholeFileBackend']
