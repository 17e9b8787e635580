"""Data and random numbers that can be repeated from any iteration, and the resumption that needs them."""
import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader

from mmlocalmamba.registry import HOOKS

# What random numbers are for: the second part of a seed.
_ITERATION, _DATA = 1, 2
# Entry of a checkpoint.
_POSITION = 'data_position'


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and torch's generators from integers, each of which makes another sequence."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _Batch:
    """Indices of a batch. Whoever reads them finds the random numbers seeded for the sample to be loaded."""

    def __init__(self, indices: Sequence[int], keys: list[tuple[int, ...]]) -> None:
        self.indices, self.keys = indices, keys

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        for index, key in zip(self.indices, self.keys):
            seed_everything(*key)
            yield index


class RepeatableBatches:
    """Takes the place of a dataloader's batch sampler, so that the data can be repeated from any batch on.

    The random numbers of a sample depend on the seed, the epoch and the sample's place in it, counted over all
    processes: not on the number of workers or processes, nor on what was loaded before. Batches that are skipped are
    not loaded.

    Args:
        loader: changed in place; none of its workers may be running.
        key: of the random numbers.
        rank, world_size: of this process among those that share the data.

    Raises:
        TypeError: the loader has no batch sampler (an IterableDataset, or batch_size=None).
    """

    def __init__(self, loader: DataLoader, *key: int, rank: int = 0, world_size: int = 1) -> None:
        if loader.batch_sampler is None or isinstance(loader.dataset, torch.utils.data.IterableDataset):
            raise TypeError('data can be repeated only from a dataset with indices and a batch sampler; '
                            f'{type(loader.dataset).__name__} is read as a stream')
        self.batches, self.loader, self.key = loader.batch_sampler, loader, key
        self.rank, self.world_size = rank, world_size
        self.sampler = getattr(self.batches, 'sampler', None) or loader.sampler
        self.batch_size = getattr(self.batches, 'batch_size', loader.batch_size)
        self.epoch = self.skip = 0
        # DataLoader forbids the assignment because of running workers. There are none.
        vars(loader).update(batch_sampler=self, _iterator=None)

    @property
    def endless(self) -> bool:
        """Whether there are no epochs."""
        return isinstance(self.sampler, InfiniteSampler)

    def start(self, epoch: int, skip: int = 0) -> None:
        """The next pass over the loader is that of ``epoch``, without its first ``skip`` batches."""
        self.epoch, self.skip = epoch, skip
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)
        if self.endless:
            self.sampler.indices = self.sampler._indices_of_rank()  # its only generator may have been read from

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Batch]:
        skip, self.skip = self.skip, 0
        place = self.rank
        for number, indices in enumerate(self.batches):
            if number >= skip:
                yield _Batch(indices, [(*self.key, self.epoch, place + i * self.world_size)
                                       for i in range(len(indices))])
            place += len(indices) * self.world_size


class BatchStream:
    """Batches without end from a number on, as IterBasedTrainLoop takes them.

    Args:
        repeatable: where they come from.
        done: batches to leave out.
        asked: how often MMEngine's loop, when resumed, asks for a batch only to drop it: these are not loaded.
    """

    def __init__(self, repeatable: RepeatableBatches, done: int, asked: int) -> None:
        self.batches = self._batches(repeatable, done)
        self.dropped = itertools.repeat(None, asked)

    @staticmethod
    def _batches(repeatable: RepeatableBatches, done: int) -> Iterator[Any]:
        first, skip = (0, done) if repeatable.endless else divmod(done, len(repeatable))
        for epoch in itertools.count(first):
            repeatable.start(epoch, skip if epoch == first else 0)
            yield from repeatable.loader

    def __iter__(self) -> 'BatchStream':
        return self

    def __next__(self) -> Any:
        for _ in self.dropped:
            return None
        return next(self.batches)

    def skip_iter(self, count: int) -> None:
        """How OneDL's loop drops what is done."""
        self.dropped = iter(())


def loaders_of(runner: Any) -> list[DataLoader]:
    loops = (runner.train_loop, runner.val_loop)
    return [loop.dataloader for loop in loops if loop is not None]


def end_workers(runner: Any) -> None:
    """End the dataloaders' workers in order. The interpreter, at its own end, would wait 5 s for each."""
    for loader in loaders_of(runner):
        loader._iterator = None
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        runner.train_loop.dataloader_iterator = None


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a resumed training equal to one that was never interrupted, bit for bit on a CPU, from any iteration.

    An epoch is taken up at the batch where it was left, without loading those before. Random numbers of a sample are
    seeded by its place in the epoch, those of a training iteration by its number and the rank: none depends on what
    came before, on the number of dataloader workers, or on whether they persist. A training on W processes draws the
    same numbers as one of a single process that accumulates the gradients of W batches.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.resumed: dict[str, int] | None = None
        self.batches: RepeatableBatches | None = None
        self.first = 0  # batches of the epoch that were done before

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume:
            self.resumed = checkpoint.get(_POSITION)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if self.batches is None:  # not in training
            return
        meta = checkpoint['meta']
        done = meta['iter'] - (0 if self.by_iter else meta['epoch'] * len(self.batches))
        checkpoint[_POSITION] = dict(done=done, samples=self.samples, seed=getattr(self.batches.sampler, 'seed', None))

    def before_train(self, runner: Any) -> None:
        loop = runner.train_loop
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.by_iter = isinstance(loop, IterBasedTrainLoop)
        if self.by_iter:
            loop.dataloader_iterator = None  # ends the workers that the loop has started
        self.batches = RepeatableBatches(loop.dataloader, runner.seed, _DATA, rank=self.rank,
                                         world_size=self.world_size)
        # Samples of one iteration on all processes.
        self.samples = (self.batches.batch_size or 1) * self.world_size
        self.first = self._done_before(runner)
        if self.by_iter:
            loop.dataloader_iterator = BatchStream(self.batches, self.first, asked=runner.iter)

    def _done_before(self, runner: Any) -> int:
        if self.resumed is None:  # nothing to resume, or a checkpoint of a training without this hook
            return runner.iter if self.by_iter else 0
        if self.resumed['seed'] is not None:
            self.batches.sampler.seed = self.resumed['seed']
        if self.resumed['samples'] != self.samples:
            print_log(f'the total batch was {self.resumed["samples"]} and is {self.samples} now: the training goes on '
                      'with the data that are left, but does not equal an uninterrupted one',
                      logger='current', level=logging.WARNING)
        return self.resumed['done'] * self.resumed['samples'] // self.samples

    def before_train_epoch(self, runner: Any) -> None:
        if self.by_iter:
            return
        self.batches.start(runner.epoch, self.first)
        if self.first:  # so that hooks and the log count the batches of the whole epoch, which MMEngine's loop does not
            loop, first = runner.train_loop, self.first
            loop.run_iter = lambda index, batch: type(loop).run_iter(loop, first + index, batch)

    def after_train_epoch(self, runner: Any) -> None:
        if not self.by_iter and self.first:
            self.first = 0
            del runner.train_loop.run_iter

    def after_train(self, runner: Any) -> None:
        end_workers(runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(runner.seed, _ITERATION, runner.iter * self.world_size + self.rank)


def need_exact_resumption(runner: Any, hook: Hook, why: str) -> None:
    if not any(isinstance(other, ExactResumeHook) for other in runner.hooks):
        raise ValueError(f"{type(hook).__name__} needs dict(type='mmlocalmamba.ExactResumeHook') in custom_hooks, "
                         f'{why}')
