"""Dataloaders that can be taken up at any batch, with random numbers that belong to the sample."""
import itertools
import random
import traceback
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine import dist
from torch.utils.data import DataLoader, IterableDataset

from mmlocalmamba.engine.preemption import shield_worker, signals_held


def seed_host(*key: int) -> int:
    """Seed Python's, NumPy's and torch's generators on the CPU from integers, each of which makes another sequence.

    Returns:
        the seed.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


def seed_everything(*key: int) -> None:
    """The same, and those of devices."""
    torch.manual_seed(seed_host(*key))


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Whatever is drawn or seeded on the CPU meanwhile, who comes after does not notice."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def annotations_named() -> Iterator[None]:
    """While datasets are built, an error in an annotation file names the file, which a JSON parser does not know; and a
    dataset without samples says so, of which numpy only says that it has nothing to concatenate.

    Raises:
        RuntimeError: the file was not read, or nothing is left of it.
    """
    try:
        yield
    except Exception as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            dataset = frame.f_locals.get('self')
            if (frame.f_code.co_name == '_serialize_data' and dataset is not None
                    and not getattr(dataset, 'data_list', True)):
                source = getattr(dataset, 'ann_file', '') or getattr(dataset, 'data_prefix', '')
                raise RuntimeError(f'{type(dataset).__name__} has no sample: nothing in {source} is of the classes '
                                   f'{dataset.metainfo.get("classes")}, or no file has the ending that it looks for '
                                   '(img_suffix)') from error
            if frame.f_code.co_name == 'load_data_list':
                path = getattr(dataset, 'ann_file', None)
                if path and path not in str(error):
                    raise RuntimeError(f'{path} cannot be read as annotations ({type(error).__name__}: '
                                       f'{error})') from error
        raise


class _Batch:
    """Indices of a batch. Whoever reads them finds the random numbers seeded for the sample to be loaded."""

    def __init__(self, indices: Sequence[int], key: tuple[int, ...], place: int, step: int) -> None:
        self.indices, self.key, self.place, self.step = indices, key, place, step

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        for number, index in enumerate(self.indices):
            seed_host(*self.key, self.place + number * self.step)
            yield index


class _Batches:
    """The batch sampler of a stream's dataloader: what is left of the epoch."""

    def __init__(self, stream: 'DataStream', batches: Any, sampler: Any) -> None:
        self.stream, self.batches, self.sampler = stream, batches, sampler
        self.batch_size = getattr(batches, 'batch_size', None)
        self.drop_last = getattr(batches, 'drop_last', False)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Batch]:
        return self.stream._indices()


class DataStream:
    """Batches of a dataloader, from a position on that can be saved.

    The position is the epoch and what was handed out of it: batches, and samples of all processes. Batches before it
    are not loaded. Random numbers of a sample depend on the seed, the stream's name, the epoch and the sample's place
    in it, counted over all processes: not on the number of workers or processes, nor on what was loaded before.
    Whatever a sampler draws when an epoch begins (``shuffle=True``) is seeded by the epoch and the rank.

    A stream is an iterator without end: one epoch follows the other.

    Args:
        runner: it has the seed.
        name: of the stream; no other stream of the training has it.
        loader: it is not used itself. Its parts make ``self.loader``, of which no worker runs yet.

    Raises:
        TypeError: the data have no indices or no batches, or the loader is of a class of its own.
        ValueError: the loader gives no batch.
    """

    def __init__(self, runner: Any, name: str, loader: DataLoader) -> None:
        if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
            raise TypeError('data can be repeated only from a dataset with indices and a batch sampler; '
                            f'{type(loader.dataset).__name__} is read as a stream')
        if type(loader) is not DataLoader:
            raise TypeError(f"the {name} data come from a {type(loader).__name__}. The loops of mmlocalmamba take "
                            "torch's DataLoader; others need a loop of MMEngine (train_cfg.type='EpochBasedTrainLoop')")
        if len(loader) == 0:
            raise ValueError(f'the {name} data give no batch: the dataset is smaller than its batch size, and the last '
                             'batch is dropped')
        self.runner, self.name, self.key = runner, name, zlib.crc32(name.encode())
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.epoch = self.batches = self.samples = 0
        self._sizes: deque[int] = deque()
        self._iterator: Iterator[Any] | None = None
        batches = _Batches(self, loader.batch_sampler,
                           getattr(loader.batch_sampler, 'sampler', None) or loader.sampler)
        options = {name: getattr(loader, name) for name in
                   ('num_workers', 'collate_fn', 'pin_memory', 'timeout', 'multiprocessing_context', 'generator',
                    'prefetch_factor', 'persistent_workers')}
        self.loader = DataLoader(loader.dataset, batch_sampler=batches,
                                 worker_init_fn=partial(shield_worker, loader.worker_init_fn), **options)

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    @property
    def total_batch(self) -> int | None:
        """Samples of a batch on all processes, if the batch sampler says so."""
        size = self.loader.batch_sampler.batch_size
        return size and size * self.world_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> 'DataStream':
        return self

    def __next__(self) -> Any:
        while True:
            try:
                return self._next()
            except StopIteration:
                self._end_epoch()

    def rest_of_epoch(self) -> Iterator[tuple[int, Any]]:
        """The batches that are left of the epoch, with their numbers in it. Then the stream is at the next one."""
        while True:
            number = self.batches
            try:
                batch = self._next()
            except StopIteration:
                break
            yield number, batch
        self._end_epoch()

    def _next(self) -> Any:
        with random_numbers_kept():
            if self._iterator is None:
                self._sizes.clear()
                with signals_held():
                    self._iterator = iter(self.loader)
            batch = next(self._iterator)
        self.batches += 1
        self.samples += self._sizes.popleft() * self.world_size
        return batch

    def _end_epoch(self) -> None:
        self._iterator = None
        self.epoch, self.batches, self.samples = self.epoch + 1, 0, 0

    def _indices(self) -> Iterator[_Batch]:
        source, key = self.loader.batch_sampler, (self.runner.seed, self.key, self.epoch)
        done, samples = self.batches, self.samples
        seed = seed_host(*key, self.rank, 1)
        if getattr(source.sampler, 'generator', None) is not None:  # of torch's samplers
            source.sampler.generator.manual_seed(seed)
        if hasattr(source.sampler, 'set_epoch'):
            source.sampler.set_epoch(self.epoch)
        before = 0
        for number, indices in enumerate(itertools.chain(source.batches, [None])):
            if number == done and before * self.world_size != samples:
                raise RuntimeError(f'the first {done} batches of epoch {self.epoch + 1} of the {self.name} data had '
                                   f'{samples} samples when the position was saved, and have '
                                   f'{before * self.world_size} now: the data or their sampler are others')
            if indices is None:
                break
            if number >= done:
                self._sizes.append(len(indices))
                yield _Batch(indices, key, self.rank + before * self.world_size, self.world_size)
            before += len(indices)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position of."""
        return dict(epoch=self.epoch, batches=self.batches, samples=self.samples, total_batch=self.total_batch,
                    size=len(self.dataset), sampler_seed=getattr(self.loader.batch_sampler.sampler, 'seed', None))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: it was saved with another total batch or another number of samples.
        """
        for what, own, saved in (('samples in an iteration', self.total_batch, state['total_batch']),
                                 ('samples in the dataset', len(self.dataset), state['size'])):
            if saved != own:
                raise ValueError(
                    f'{saved} {what} of the {self.name} data when the checkpoint was written, {own} here '
                    f'({self.world_size} processes, batch_size {self.loader.batch_sampler.batch_size}). Learning rates '
                    'and epochs would be neither those of the old training nor those of a new one. Resume with '
                    f'{saved} (batch_size times the number of processes may be split anew), or begin a new training '
                    'with these weights: load_from=CHECKPOINT, resume=False')
        self.epoch, self.batches, self.samples = state['epoch'], state['batches'], state['samples']
        if state['sampler_seed'] is not None:
            self.loader.batch_sampler.sampler.seed = state['sampler_seed']
        self._iterator = None

    def close(self) -> None:
        """End the workers in order. The interpreter, at its own end, would wait 5 s for each."""
        self._iterator = None
        self.loader._iterator = None  # where DataLoader keeps workers that persist


class Loaders:
    """All data of a training. Their workers are shielded from signals, their positions are in every checkpoint."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.streams: dict[str, DataStream] = {}
        self.others: list[DataLoader] = []
        self._saved: dict[str, dict] = {}

    def add(self, name: str, loader: DataLoader) -> DataStream:
        """Data to train on, as a stream whose position is saved and restored by the loop.

        A hook adds its own in ``before_run``: ``runner.train_loop.loaders.add('held_out', loader)``.

        Args:
            name: part of the random numbers' seed, and what checkpoints know the stream by.
            loader: see :class:`DataStream`.

        Raises:
            ValueError: the name is taken; otherwise see :class:`DataStream`.
        """
        if name in self.streams:
            raise ValueError(f'there are {name!r} data already')
        self.streams[name] = stream = DataStream(self.runner, name, loader)
        if name in self._saved:
            stream.load_state_dict(self._saved[name])
        return stream

    def shield(self, loader: DataLoader) -> None:
        """Shield workers of other data, which have no position: a validation's."""
        if loader not in self.others:
            self.others.append(loader)
            loader.worker_init_fn = partial(shield_worker, loader.worker_init_fn)

    def state_dict(self) -> dict[str, dict]:
        return {name: stream.state_dict() for name, stream in self.streams.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self._saved = state
        for name, saved in state.items():
            if name in self.streams:
                self.streams[name].load_state_dict(saved)

    def close(self) -> None:
        """End all workers."""
        for stream in self.streams.values():
            stream.close()
        for loader in self.others:
            loader._iterator = None
