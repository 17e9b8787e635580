"""Training loops that own their data, their position and the signals, so that a training can be left and taken up."""
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
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from mmlocalmamba.engine.checkpoints import BEFORE_VALIDATION_FILE, PREEMPTED_FILE, save_to_resume_from
from mmlocalmamba.engine.data import Loaders, annotations_named, seed_everything
from mmlocalmamba.engine.preemption import EXIT_PREEMPTED, Preemption, signals_held
from mmlocalmamba.registry import LOOPS

# What random numbers are for: the second part of a seed.
_ITERATION, _VALIDATION = 1, 2
# Entry of a checkpoint.
STATE = 'loop'


class _LoopHook(Hook):
    """What a loop hears from its runner."""

    priority = 'HIGHEST'

    def __init__(self, loop: 'ResumableLoop') -> None:
        self.loop = loop
        self.starting = ExitStack()  # of the validation's workers

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[STATE] = self.loop.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume:
            self.loop.load_state_dict(checkpoint.get(STATE))

    def before_val_epoch(self, runner: Any) -> None:
        if self.loop.validating:
            self.starting.enter_context(signals_held())

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.starting.close()
        if self.loop.validating and batch_idx < self.loop.common_batches:
            self.loop.leave_if_preempted()

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        self.starting.close()
        self.loop.validation_due = False  # in the best checkpoint, too, which is written next


class ResumableLoop(BaseLoop):
    """What the two loops share.

    Attributes:
        loaders: all data of the training, see :class:`Loaders`; ``data`` are those of the weights.
        validation_due: whether the validation after the last iteration has yet to take place.
        optim_wrapper: what the model's train_step gets: the runner's, or what a hook put before it in ``before_train``.
        at_end: what hooks want to be called when the training ends, in whatever way.
    """

    def _own(self, runner: Any, dataloader: Any, preemptible: bool) -> None:
        with annotations_named():
            BaseLoop.__init__(self, runner, dataloader)
        self.loaders = Loaders(runner)
        self.data = self.loaders.add('train', self.dataloader)
        if preemptible and not isinstance(runner, Runner):
            print_log(f'a training by {type(runner).__name__} cannot be preempted or resumed; signals end it',
                      logger='current', level=logging.WARNING)
            preemptible = False
        self.preemption = Preemption(preemptible)
        self.validation_due = self.validating = False
        self.common_batches = 0
        self.optim_wrapper: Any = None
        self.at_end = ExitStack()
        self.recorded: tuple | None = None  # where the last checkpoint was written
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
        """One iteration, with the random numbers of its own."""
        seed_everything(self.runner.seed, _ITERATION, self._iter * dist.get_world_size() + dist.get_rank())
        self.runner.call_hook('before_train_iter', batch_idx=number, data_batch=batch)
        outputs = self.runner.model.train_step(batch, optim_wrapper=self.optim_wrapper)
        self.runner.call_hook('after_train_iter', batch_idx=number, data_batch=batch, outputs=outputs)
        self._iter += 1

    def _decide_on_validation(self, done: int, end: int) -> None:
        """After ``done`` epochs or iterations of ``end``."""
        self.val_interval = self.dynamic_intervals[bisect.bisect(self.dynamic_milestones, done + 1) - 1]
        self.validation_due = (self.runner.val_loop is not None and done >= self.val_begin
                               and (done % self.val_interval == 0 or done == end))

    def _validate_if_due(self) -> None:
        if not self.validation_due or self.runner.val_loop is None:
            return
        self.collect_ranks()
        if self.preemption.enabled and self.recorded != self.moment:
            save_to_resume_from(self.runner, BEFORE_VALIDATION_FILE)
        self.leave_if_preempted()
        # Processes may have different numbers of batches, and ask each other only while all have some.
        self.common_batches = self.preemption.reduce(len(self.runner.val_loop.dataloader),
                                                     torch.distributed.ReduceOp.MIN)
        self.validating = True
        seed_everything(self.runner.seed, _VALIDATION, self._iter)
        self.runner.val_loop.run()
        self.validating = self.validation_due = False
        self.leave_if_preempted()

    # ---- leaving ----

    @property
    def moment(self) -> tuple:
        """Two checkpoints of the same moment are the same."""
        return self.data.epoch, self.data.samples, self.validation_due

    def leave_if_preempted(self) -> None:
        """Between two iterations: write a checkpoint, unless a validation has begun, which has one before it."""
        if not self.preemption.requested():
            return
        path = os.path.join(self.runner.work_dir, PREEMPTED_FILE)
        if not self.validating:
            self.collect_ranks()
            save_to_resume_from(self.runner, PREEMPTED_FILE)
        self.preemption.wait()
        print_log(f'preempted after iteration {self._iter}'
                  + (', in the validation, which will begin again' if self.validating else f'; resume from {path}'),
                  logger='current', level=logging.WARNING)
        self.runner.visualizer.close()
        sys.exit(EXIT_PREEMPTED)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        if self._ranks_at != self.moment[:2]:
            if dist.get_world_size() == 1:
                self.collect_ranks()
            else:
                print_log('this checkpoint holds nothing that only other processes know (statistics of BatchNorm, '
                          'gradients that are accumulated): mmlocalmamba.CheckpointHook writes them', logger='current',
                          level=logging.WARNING)
        stoppers = [dict(wait_count=hook.wait_count, best_score=hook.best_score) for hook in self._stoppers()]
        return dict(data=self.loaders.state_dict(), validation_due=self.validation_due, early_stopping=stoppers,
                    ranks=self._ranks if self._ranks_at == self.moment[:2] else [])

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go to where a checkpoint was written; None: by another loop.

        Raises:
            ValueError: with another total batch, or other data; a runner that saves its state in its own way.
        """
        if not isinstance(self.runner, Runner):
            raise ValueError(f'{type(self.runner).__name__} cannot resume a training of {type(self).__name__}: take '
                             f"the Runner, or MMEngine's loop, train_cfg.type='{type(self).__name__}'")
        if state is None:
            print_log('the checkpoint was not written by a loop of mmlocalmamba and does not say where it was in the '
                      'data: they begin with the epoch, and the training does not equal an uninterrupted one',
                      logger='current', level=logging.WARNING)
            return
        self.loaders.load_state_dict(state['data'])
        self.validation_due, self._ranks = state['validation_due'], state['ranks']
        for hook, saved in zip(self._stoppers(), state['early_stopping']):
            vars(hook).update(saved)

    def _stoppers(self) -> list[EarlyStoppingHook]:
        return [hook for hook in self.runner.hooks if isinstance(hook, EarlyStoppingHook)]

    def _model(self) -> nn.Module:
        model = self.runner.model
        while is_model_wrapper(model):
            model = model.module
        return model

    def collect_ranks(self) -> None:
        """Gather for the next checkpoint what each process has for itself. All of them must take part.

        That are buffers which differ from the first process', and gradients inside of an accumulation.
        """
        model, wrapper = self._model(), self.runner.optim_wrapper
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
        self._ranks_at = self.moment[:2]

    def _restore_rank(self) -> None:
        if not self._ranks:
            return
        model, world_size = self._model(), dist.get_world_size()
        if len(self._ranks) == world_size:
            mine = self._ranks[dist.get_rank()]
        else:  # the mean is what a step would have seen
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
    """MMEngine's loop over epochs, of a training that may be stopped at any moment, and then goes on where it was.

    What it promises: docs/jobs.md. On SIGTERM or SIGUSR1 it finishes the iteration, writes ``preempted.pth`` and
    leaves with exit code 75.

    Args:
        preemptible: False leaves the signals alone.
        **kwargs: MMEngine's: max_epochs, val_begin, val_interval, dynamic_intervals.
    """

    def __init__(self, runner: Any, dataloader: Any, preemptible: bool = True, **kwargs: Any) -> None:
        self._own(runner, dataloader, preemptible)
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
    """MMEngine's loop over iterations, as :class:`EpochBasedTrainLoop`.

    Args:
        preemptible: False leaves the signals alone.
        **kwargs: MMEngine's: max_iters, val_begin, val_interval, dynamic_intervals.
    """

    def __init__(self, runner: Any, dataloader: Any, preemptible: bool = True, **kwargs: Any) -> None:
        self._own(runner, dataloader, preemptible)
        # MMEngine's begins to iterate at once: over the stream, which starts no worker before its first batch.
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


def need_own_loop(runner: Any, hook: Hook, why: str) -> ResumableLoop:
    """The training's loop, which must be one of these.

    Raises:
        ValueError: it is another.
    """
    if not isinstance(runner.train_loop, ResumableLoop):
        raise ValueError(f"{type(hook).__name__} needs train_cfg.type='mmlocalmamba.EpochBasedTrainLoop' or "
                         f"'mmlocalmamba.IterBasedTrainLoop', {why}; it is {type(runner.train_loop).__name__}")
    return runner.train_loop
