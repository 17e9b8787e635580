"""Dataloaders that can resume at any batch, with random numbers that depend on the sample alone."""
import hashlib
import itertools
import logging
import os
import random
import traceback
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, TestLoop
from torch.utils.data import DataLoader, IterableDataset

from mmlocalmamba.openmmlab.engine.preemption import blocked_signals, shield_worker

# Number of samples by which a dataset is recognised.
FINGERPRINT_SAMPLES = 1000


def seed_host(*key: int) -> int:
    """Seed the CPU generators of Python, NumPy and torch from integers. Different keys give different sequences.

    Returns:
        The seed.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


def seed_everything(*key: int) -> None:
    """Seed the CPU generators as :func:`seed_host` does, and those of all devices."""
    torch.manual_seed(seed_host(*key))


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Save and restore the CPU random states of Python, NumPy and torch."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def naming_annotation_files() -> Iterator[None]:
    """Add the name of the annotation file to errors that are raised while datasets and evaluators are built.

    A JSON parser does not know the file, and for a dataset without samples NumPy only reports that it has nothing to
    concatenate. Where a folder or a file does not exist, the error says what there is, or what to write.

    Raises:
        RuntimeError: if an annotation file cannot be read, or a dataset has no samples.
        FileNotFoundError: if the folder or the annotation file of a dataset, or that of an evaluator, does not exist.
    """
    try:
        yield
    except Exception as error:
        # it looks at what the loops have built
        from mmlocalmamba.openmmlab.checks.audit import explain, missing_file, missing_folder, no_samples
        loop = None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            dataset = frame.f_locals.get('self')
            loop = dataset if isinstance(dataset, BaseLoop) else loop
            if isinstance(error, FileNotFoundError) and isinstance(dataset, BaseMetric):
                raise FileNotFoundError(_missing_truth(loop, dataset, error)) from error
            if (frame.f_code.co_name == '_serialize_data' and dataset is not None
                    and not getattr(dataset, 'data_list', True)):
                raise RuntimeError(f'{type(dataset).__name__} has no samples: '
                                   f'{no_samples(dataset)}{explain(dataset)}') from error
            if frame.f_code.co_name == 'load_data_list':
                path, why = getattr(dataset, 'ann_file', None), explain(dataset)
                if (isinstance(error, FileNotFoundError) and isinstance(error.filename, str)
                        and (not path or path == error.filename)):
                    explained = missing_file if path else missing_folder
                    raise FileNotFoundError(explained(error.filename)) from error
                if path and (why or path not in str(error)):
                    raise RuntimeError(f'{path} cannot be read as annotations ({type(error).__name__}: '
                                       f'{error}){why}') from error
        raise


def _missing_truth(loop: Any, metric: Any, error: FileNotFoundError) -> str:
    """Say which setting names an evaluator's file, and what to write."""
    key = 'test_evaluator' if isinstance(loop, TestLoop) else 'val_evaluator'
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    own = next((file for part in leaf_datasets(dataset) if (file := getattr(part, 'ann_file', None))), None)
    return (f'{key}.ann_file is {error.filename!r} ({type(metric).__name__}), which does not exist. Name the file of '
            f'{key.split("_")[0]}_dataloader: write {key} = dict(ann_file={own or "FILE"!r})')


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """Yield the datasets inside nested wrappers, or the dataset itself if it wraps none."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner[0] is None:
        yield dataset
    else:
        for part in inner:
            yield from leaf_datasets(part)


def _describe(path: str) -> tuple[str, int | None]:
    """Return the name of a file without its folder, and its bytes if it is a local file."""
    return os.path.basename(path), os.path.getsize(path) if os.path.isfile(path) else None


def fingerprint(dataset: Any) -> str | None:
    """Return a digest of the names and sizes of annotation files and of :data:`FINGERPRINT_SAMPLES` samples' files.

    The samples are spread evenly over each dataset. Folders play no part, so data may be moved. None: no sample is in a
    file, or the samples cannot be listed.
    """
    found: list[tuple[str, int | None]] = []
    for part in leaf_datasets(dataset):
        if not hasattr(part, 'get_data_info'):
            continue
        found.append(_describe(str(getattr(part, 'ann_file', ''))))
        try:
            for index in range(0, len(part), max(1, len(part) // FINGERPRINT_SAMPLES)):
                found += [_describe(value) for key, value in sorted(part.get_data_info(index).items())
                          if key.endswith('_path') and isinstance(value, str)]
        except Exception:  # datasets may raise any exception; loading the sample reports it
            return None
    return hashlib.sha256(repr(found).encode()).hexdigest() if any(name for name, _ in found) else None


class _Batch:
    """The indices of a batch. Iterating over them seeds the CPU generators for each sample before it is loaded."""

    def __init__(self, indices: Sequence[int], key: tuple[int, ...], place: int, step: int) -> None:
        self.indices, self.key, self.place, self.step = indices, key, place, step

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        for number, index in enumerate(self.indices):
            seed_host(*self.key, self.place + number * self.step)
            yield index


class _Batches:
    """Batch sampler of a stream's dataloader, which yields the remaining batches of the epoch."""

    def __init__(self, stream: 'DataStream', batches: Any, sampler: Any) -> None:
        self.stream, self.batches, self.sampler = stream, batches, sampler
        self.batch_size = getattr(batches, 'batch_size', None)
        self.drop_last = getattr(batches, 'drop_last', False)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Batch]:
        return self.stream._indices()


class DataStream:
    """Endless iterator over the batches of a dataloader, with a position that can be saved and restored.

    The position is the epoch, the batches of this process in it, and the samples of all processes in it. Batches before
    the position are not loaded.

    The random numbers of a sample depend on the seed, the stream's name, the epoch and the sample's index in the epoch,
    counted over all processes. They do not depend on the number of workers or processes, or on samples loaded before.
    The epoch and the rank seed the numbers that a sampler draws at the start of an epoch (``shuffle=True``).

    Args:
        runner: source of the seed.
        name: name of the stream, unique in the training.
        loader: dataloader whose dataset, batch sampler and options ``self.loader`` takes over. It is not iterated
            itself, and its workers are not started.

    Raises:
        TypeError: if the dataset is an IterableDataset, or if the loader has no batch sampler or is not exactly torch's
            DataLoader.
        ValueError: if the loader has no batches.
    """

    def __init__(self, runner: Any, name: str, loader: DataLoader) -> None:
        if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
            raise TypeError(f'the {name} data cannot be resumed: {type(loader.dataset).__name__} is an IterableDataset '
                            'or has no batch sampler. Use a dataset with indices, and batch_size or batch_sampler')
        if type(loader) is not DataLoader:
            raise TypeError(f"the loader of the {name} data is a {type(loader).__name__}. The loops of mmlocalmamba "
                            "need torch's DataLoader; for other classes use a loop of MMEngine, "
                            "train_cfg.type='EpochBasedTrainLoop'")
        if len(loader) == 0:
            raise ValueError(f'the {name} data have no batches: the dataset of {len(loader.dataset)} samples is '
                             'smaller than batch_size, and drop_last is set. Reduce batch_size')
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

    @cached_property
    def fingerprint(self) -> str | None:
        """The :func:`fingerprint` of the dataset."""
        return fingerprint(self.dataset)

    @property
    def total_batch(self) -> int | None:
        """The number of samples of a batch over all processes; None if the batch sampler has no ``batch_size``."""
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
        """Yield the number in the epoch and the batch, for its remaining batches; then move to the next epoch."""
        while True:
            number = self.batches
            try:
                batch = self._next()
            except StopIteration:
                break
            yield number, batch
        self._end_epoch()

    def _next(self) -> Any:
        with preserved_random_state():
            if self._iterator is None:
                self._sizes.clear()
                with blocked_signals():
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
        if getattr(source.sampler, 'generator', None) is not None:  # torch's samplers
            source.sampler.generator.manual_seed(seed)
        if hasattr(source.sampler, 'set_epoch'):
            source.sampler.set_epoch(self.epoch)
        before = 0
        for number, indices in enumerate(itertools.chain(source.batches, [None])):
            if number == done and before * self.world_size != samples:
                raise RuntimeError(f'the first {done} batches of epoch {self.epoch + 1} of the {self.name} data had '
                                   f'{samples} samples when the position was saved, and have '
                                   f'{before * self.world_size} now: the data or their sampler have changed. '
                                   'Resume with the data and the sampler of the checkpoint')
            if indices is None:
                break
            if number >= done:
                self._sizes.append(len(indices))
                yield _Batch(indices, key, self.rank + before * self.world_size, self.world_size)
            before += len(indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the total batch, dataset size, fingerprint and sampler seed that it belongs to."""
        return dict(epoch=self.epoch, batches=self.batches, samples=self.samples, total_batch=self.total_batch,
                    size=len(self.dataset), fingerprint=self.fingerprint,
                    sampler_seed=getattr(self.loader.batch_sampler.sampler, 'seed', None))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Log a warning if the files of the samples are others.

        Raises:
            ValueError: if it was saved with another total batch or another number of samples.
        """
        anew = 'or start a new training from these weights: load_from=CHECKPOINT, resume=False'
        size = self.loader.batch_sampler.batch_size
        split = (f' ({self.world_size} processes, batch_size {size}). Learning rates and '
                 f'epochs would match neither the old training nor a new one. Resume with {state["total_batch"]} '
                 f'(batch_size times the number of processes may be split differently), {anew}')
        for what, own, saved, remedy in (
                ('samples in an iteration', self.total_batch, state['total_batch'], split),
                ('samples in the dataset', len(self.dataset), state['size'], f'. Resume with the same data, {anew}')):
            if saved != own:
                raise ValueError(f'the checkpoint was written with {saved} {what} of the {self.name} data, this '
                                 f'training has {own}{remedy}')
        saved = state.get('fingerprint')
        if saved is not None and dist.is_main_process() and saved != self.fingerprint:
            print_log(f'the names or sizes of the files of the {self.name} data differ from those at the checkpoint: '
                      'the training goes on with other data. If this is not intended, resume with the data of the '
                      'checkpoint', logger='current', level=logging.WARNING)
        self.epoch, self.batches, self.samples = state['epoch'], state['batches'], state['samples']
        if state['sampler_seed'] is not None:
            self.loader.batch_sampler.sampler.seed = state['sampler_seed']
        self._iterator = None

    def close(self) -> None:
        """Stop the workers. Without this, the interpreter waits 5 s for each of them at exit."""
        self._iterator = None
        self.loader._iterator = None  # DataLoader keeps persistent workers here


class Loaders:
    """All dataloaders of a training. Workers are shielded from signals, and checkpoints hold the positions.

    Attributes:
        streams: name -> stream of data that are trained on.
        others: dataloaders without a position, such as the validation's.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.streams: dict[str, DataStream] = {}
        self.others: list[DataLoader] = []
        self._saved: dict[str, dict] = {}

    def add(self, name: str, loader: DataLoader) -> DataStream:
        """Add training data as a stream whose position the loop saves and restores.

        A hook adds its own data in ``before_run``: ``runner.train_loop.loaders.add('held_out', loader)``.

        Args:
            name: name of the stream in checkpoints, and part of the seed of its random numbers.
            loader: see :class:`DataStream`.

        Raises:
            ValueError: if a stream of this name exists; see also :class:`DataStream`.
            TypeError: see :class:`DataStream`.
        """
        if name in self.streams:
            raise ValueError(f'a data stream {name!r} exists already: choose another name')
        self.streams[name] = stream = DataStream(self.runner, name, loader)
        if name in self._saved:
            stream.load_state_dict(self._saved[name])
        return stream

    def shield(self, loader: DataLoader) -> None:
        """Shield the workers of a dataloader without a position, such as the validation's, from signals."""
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
        """Stop all workers."""
        for stream in self.streams.values():
            stream.close()
        for loader in self.others:
            loader._iterator = None
