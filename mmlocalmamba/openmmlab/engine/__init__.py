"""Training loops, hooks and checkpoints for jobs that are preempted and resumed.

docs/jobs.md lists the guarantees and their limits.
"""
from mmlocalmamba.openmmlab.engine.bfloat16 import BFloat16OptimWrapper
from mmlocalmamba.openmmlab.engine.broken_files import BrokenFilesHook
from mmlocalmamba.openmmlab.engine.checkpoints import CheckpointHook, WholeFileBackend
from mmlocalmamba.openmmlab.engine.data import DataStream, Loaders
from mmlocalmamba.openmmlab.engine.guard import NumericalGuardHook
from mmlocalmamba.openmmlab.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmlocalmamba.openmmlab.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmlocalmamba.openmmlab.engine.preemption import EXIT_PREEMPTED

__all__ = ['EXIT_PREEMPTED', 'BFloat16OptimWrapper', 'BrokenFilesHook', 'CheckpointHook', 'DataStream',
           'EpochBasedTrainLoop', 'IterBasedTrainLoop', 'LayerDecayOptimWrapperConstructor', 'Loaders',
           'NumericalGuardHook', 'WholeFileBackend']
