"""Training loops that can be preempted and resumed at any iteration."""
import bisect
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from mmlocalmamba.openmmlab.engine.checkpoints import (
    BEFORE_VALIDATION_FILE,
    LOOP_STATE,
    PREEMPTED_FILE,
    save_to_resume_from,
)
from mmlocalmamba.openmmlab.engine.data import Loaders, naming_annotation_files, seed_everything
from mmlocalmamba.openmmlab.engine.preemption import EXIT_PREEMPTED, Preemption, blocked_signals
from mmlocalmamba.registry import LOOPS
from mmlocalmamba.weights.loading import unwrap_model

# Second part of a seed: the purpose of the random numbers.
_ITERATION, _VALIDATION = 1, 2


class _LoopHook(Hook):
    """Hook through which a loop saves its state and follows the validation."""

    priority = 'HIGHEST'

    def __init__(self, loop: 'ResumableLoop') -> None:
        self.loop = loop
        self.starting = ExitStack()  # blocks signals while the validation's workers start

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[LOOP_STATE] = self.loop.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume:
            self.loop.load_state_dict(checkpoint.get(LOOP_STATE))

    def before_val_epoch(self, runner: Any) -> None:
        if self.loop.validating:
            self.starting.enter_context(blocked_signals())

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.starting.close()
        if self.loop.validating and batch_idx < self.loop.common_batches:
            self.loop.leave_if_preempted()

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        self.starting.close()
        self.loop.validation_due = False  # also in the best checkpoint, which is written next


class ResumableLoop(BaseLoop):
    """Base of the two training loops.

    Attributes:
        loaders: all data of the training, see :class:`Loaders`.
        data: the stream of batches that the weights are trained on.
        validation_due: True if the validation after the last iteration has not run yet.
        optim_wrapper: optimizer wrapper for the model's ``train_step``: the runner's, or a hook's replacement from
            ``before_train``.
        at_end: callbacks of hooks for the end of the training, also after an error.
        recorded: position of the last checkpoint, or None.
    """

    stop_training: bool  # MMEngine's loops set it

    def _set_up(self, runner: Any, dataloader: Any, preemptible: bool) -> None:
        with naming_annotation_files():
            BaseLoop.__init__(self, runner, dataloader)
        self.loaders = Loaders(runner)
        self.data = self.loaders.add('train', self.dataloader)
        if preemptible and not isinstance(runner, Runner):
            print_log(f'a training with {type(runner).__name__} cannot be preempted or resumed; signals end it',
                      logger='current', level=logging.WARNING)
            preemptible = False
        self.preemption = Preemption(preemptible)
        self.validation_due = self.validating = False
        self.common_batches = 0
        self.optim_wrapper: Any = None
        self.at_end = ExitStack()
        self.recorded: tuple | None = None
        self._ranks: list[dict] = []
        self._ranks_at: tuple | None = None
        runner.register_hook(_LoopHook(self))

    # ---- running ----

    @contextmanager
    def _training(self) -> Iterator[None]:
        self._restore_rank()
        if self.runner.val_loop is not None:
            self.loaders.shield(self.runner.val_loop.dataloader)
        self.optim_wrapper = self.runner.optim_wrapper
        try:
            with self.at_end, self.preemption:
                self.runner.call_hook('before_train')
                yield
                self.runner.call_hook('after_train')
        finally:
            self.loaders.close()

    def _iterate(self, number: int, batch: Any) -> None:
        """Run one iteration, with random numbers seeded for it and this process."""
        seed_everything(self.runner.seed, _ITERATION, self._iter * dist.get_world_size() + dist.get_rank())
        self.runner.call_hook('before_train_iter', batch_idx=number, data_batch=batch)
        outputs = self.runner.model.train_step(batch, optim_wrapper=self.optim_wrapper)
        self.runner.call_hook('after_train_iter', batch_idx=number, data_batch=batch, outputs=outputs)
        self._iter += 1

    def _decide_on_validation(self, done: int, end: int) -> None:
        """Set ``validation_due`` after ``done`` epochs or iterations of ``end``."""
        self.val_interval = self.dynamic_intervals[bisect.bisect(self.dynamic_milestones, done + 1) - 1]
        self.validation_due = (self.runner.val_loop is not None and done >= self.val_begin
                               and (done % self.val_interval == 0 or done == end))

    def _validate_if_due(self) -> None:
        if not self.validation_due or self.runner.val_loop is None:
            return
        self.collect_ranks()
        if self.preemption.enabled and self.recorded != self.position:
            save_to_resume_from(self.runner, BEFORE_VALIDATION_FILE)
        self.leave_if_preempted()
        # Processes may have different numbers of batches. They ask for signals only while all of them have one.
        self.common_batches = self.preemption.reduce(len(self.runner.val_loop.dataloader),
                                                     torch.distributed.ReduceOp.MIN)
        self.validating = True
        seed_everything(self.runner.seed, _VALIDATION, self._iter)
        self.runner.val_loop.run()
        self.validating = self.validation_due = False
        self.leave_if_preempted()

    # ---- leaving ----

    @property
    def position(self) -> tuple:
        """The epoch, the samples of it and ``validation_due``. Equal positions give equal checkpoints."""
        return self.data.epoch, self.data.samples, self.validation_due

    def leave_if_preempted(self) -> None:
        """Exit with code 75 if any process was signalled. All processes must call it between two iterations.

        A checkpoint is written first, except in a validation, which has one from before it.
        """
        if not self.preemption.requested():
            return
        path = os.path.join(self.runner.work_dir, PREEMPTED_FILE)
        if not self.validating:
            self.collect_ranks()
            save_to_resume_from(self.runner, PREEMPTED_FILE)
        self.preemption.wait()
        print_log(f'preempted after iteration {self._iter}'
                  + (', in the validation, which restarts on resumption' if self.validating
                     else f'; resume from {path}'),
                  logger='current', level=logging.WARNING)
        self.runner.visualizer.close()
        sys.exit(EXIT_PREEMPTED)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        if self._ranks_at != self.position[:2]:
            if dist.get_world_size() == 1:
                self.collect_ranks()
            else:
                print_log('this checkpoint lacks the state of the other processes (BatchNorm statistics, accumulated '
                          'gradients): use mmlocalmamba.CheckpointHook, which saves it', logger='current',
                          level=logging.WARNING)
        stoppers = [dict(wait_count=hook.wait_count, best_score=hook.best_score) for hook in self._stoppers()]
        return dict(data=self.loaders.state_dict(), validation_due=self.validation_due, early_stopping=stoppers,
                    stop_training=self.stop_training,
                    ranks=self._ranks if self._ranks_at == self.position[:2] else [])

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go to the position of a checkpoint.

        Args:
            state: result of :meth:`state_dict`; None if another loop wrote the checkpoint.

        Raises:
            ValueError: if the total batch or the number of samples has changed, or if the runner is not MMEngine's
                Runner and so saves its state in another way.
            RuntimeError: if the processes have loaded different checkpoints.
        """
        if not isinstance(self.runner, Runner):
            raise ValueError(f'{type(self.runner).__name__} cannot resume a training of {type(self).__name__}: use '
                             f"Runner, or MMEngine's loop, train_cfg.type='{type(self).__name__}'")
        if state is None:
            print_log('the checkpoint was not written by a loop of mmlocalmamba and holds no position in the data: the '
                      'epoch restarts, and the result differs from that of an uninterrupted training',
                      logger='current', level=logging.WARNING)
            return
        self.loaders.load_state_dict(state['data'])
        self.validation_due, self._ranks = state['validation_due'], state['ranks']
        positions = dist.all_gather_object(self.position)
        if len(set(positions)) > 1:
            raise RuntimeError('the processes have loaded different states of a checkpoint, at the positions (epoch, '
                               f'samples, validation due) {positions}: the file system of the work directory shows new '
                               'files late on some nodes. Start again in a minute')
        for hook, saved in zip(self._stoppers(), state['early_stopping']):
            vars(hook).update(saved)
        self.stop_training = state.get('stop_training', False)
        if self.stop_training:
            print_log('a hook, such as EarlyStoppingHook, had stopped this training when the checkpoint was written: '
                      'nothing is trained. To go on, start a new training from these weights: load_from=CHECKPOINT, '
                      'resume=False', logger='current', level=logging.WARNING)

    def _stoppers(self) -> list[EarlyStoppingHook]:
        return [hook for hook in self.runner.hooks if isinstance(hook, EarlyStoppingHook)]

    def collect_ranks(self) -> None:
        """Gather the state of each process for the next checkpoint. All processes must call it.

        This state is the buffers that differ from those of the first process, and gradients that are being
        accumulated.
        """
        model, wrapper = unwrap_model(self.runner.model), self.runner.optim_wrapper
        mine: dict[str, dict] = dict(buffers={}, gradients={})
        if isinstance(wrapper, OptimWrapper) and not wrapper.should_update():
            mine['gradients'] = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()
                                 if parameter.grad is not None}
        if dist.get_world_size() > 1:
            mine['buffers'] = {name: buffer.cpu() for name, buffer in model.named_buffers()}
        self._ranks = dist.all_gather_object(mine)
        first = self._ranks[0]['buffers']
        for rank in self._ranks[1:]:
            rank['buffers'] = {name: value for name, value in rank['buffers'].items()
                               if not torch.equal(value, first[name])}
        self._ranks[0]['buffers'] = {}
        self._ranks_at = self.position[:2]

    def _restore_rank(self) -> None:
        if not self._ranks:
            return
        model, world_size = unwrap_model(self.runner.model), dist.get_world_size()
        if len(self._ranks) == world_size:
            mine = self._ranks[dist.get_rank()]
        else:  # another number of processes: the step uses the mean of the gradients
            names = self._ranks[0]['gradients']
            mine = dict(buffers={}, gradients={name: sum(rank['gradients'][name] for rank in self._ranks)
                                               / len(self._ranks) for name in names})
        buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
        for name, value in mine['buffers'].items():
            buffers[name].copy_(value)
        for name, value in mine['gradients'].items():
            parameters[name].grad = value.to(parameters[name])
        self._ranks = []


@LOOPS.register_module()
class EpochBasedTrainLoop(ResumableLoop, MMEngineEpochBasedTrainLoop):
    """MMEngine's loop over epochs, for a training that may stop at any iteration and resume exactly.

    On SIGTERM or SIGUSR1 the loop finishes the iteration, writes ``preempted.pth`` and exits with code 75.
    docs/jobs.md lists the guarantees.

    Args:
        runner: MMEngine's Runner. Other runners can train, but not be preempted or resumed.
        dataloader: dataloader or its configuration, see :class:`~mmlocalmamba.openmmlab.engine.data.DataStream`.
        preemptible: False does not handle the signals.
        **kwargs: arguments of MMEngine's loop: max_epochs, val_begin, val_interval, dynamic_intervals.

    Raises:
        RuntimeError: if an annotation file cannot be read, or the dataset has no samples.
        TypeError, ValueError: if the dataloader cannot be resumed, see
            :class:`~mmlocalmamba.openmmlab.engine.data.DataStream`.
    """

    def __init__(self, runner: Any, dataloader: Any, preemptible: bool = True, **kwargs: Any) -> None:
        self._set_up(runner, dataloader, preemptible)
        MMEngineEpochBasedTrainLoop.__init__(self, runner, self.data.loader, **kwargs)

    def run(self) -> nn.Module:
        with self._training():
            self._validate_if_due()
            while self._epoch < self._max_epochs and not self.stop_training:
                self.run_epoch()
                self._validate_if_due()
        return self.runner.model

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        for number, batch in self.data.rest_of_epoch():
            self.run_iter(number, batch)
            self.leave_if_preempted()
        self._decide_on_validation(self._epoch + 1, self._max_epochs)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        self._iterate(idx, data_batch)


@LOOPS.register_module()
class IterBasedTrainLoop(ResumableLoop, MMEngineIterBasedTrainLoop):
    """MMEngine's loop over iterations, preempted and resumed like :class:`EpochBasedTrainLoop`.

    Args:
        runner, dataloader, preemptible: see :class:`EpochBasedTrainLoop`, also for what is raised.
        **kwargs: arguments of MMEngine's loop: max_iters, val_begin, val_interval, dynamic_intervals.
    """

    def __init__(self, runner: Any, dataloader: Any, preemptible: bool = True, **kwargs: Any) -> None:
        self._set_up(runner, dataloader, preemptible)
        # MMEngine's loop calls iter() at once. The stream starts no worker before its first batch.
        MMEngineIterBasedTrainLoop.__init__(self, runner, self.data, **kwargs)
        self.dataloader, self.dataloader_iterator = self.data.loader, self.data

    def run(self) -> nn.Module:
        with self._training():
            self.runner.call_hook('before_train_epoch')
            self._validate_if_due()
            while self._iter < self._max_iters and not self.stop_training:
                self.runner.model.train()
                self.run_iter(next(self.data))
                self._validate_if_due()
                self.leave_if_preempted()
            self.runner.call_hook('after_train_epoch')
        return self.runner.model

    def run_iter(self, data_batch: Any) -> None:
        self._decide_on_validation(self._iter + 1, self._max_iters)
        self._iterate(self._iter, data_batch)


def require_resumable_loop(runner: Any, hook: Hook, why: str) -> ResumableLoop:
    """Return the training loop.

    Args:
        why: relative clause for the message.

    Raises:
        ValueError: if it is not a loop of mmlocalmamba.
    """
    if not isinstance(runner.train_loop, ResumableLoop):
        raise ValueError(f"{type(hook).__name__} needs train_cfg.type='mmlocalmamba.EpochBasedTrainLoop' or "
                         f"'mmlocalmamba.IterBasedTrainLoop', {why}; it is {type(runner.train_loop).__name__}")
    return runner.train_loop
