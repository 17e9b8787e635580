"""Training as a job on a cluster: stopped at any moment, resumed as if it never was, halted before NaN reaches weights.
Files of the data that cannot be read are named.

The hooks work with the loops of MMEngine's Runner. What they promise, and what they do not cover: docs/jobs.md.
"""
import fcntl
import glob
import itertools
import json
import logging
import os
import random
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import InfiniteSampler
from mmengine.fileio import LocalBackend, get, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from mmlocalmamba.files import write_whole
from mmlocalmamba.registry import HOOKS

# "Temporary failure, try again" of sysexits.h: 75. Batch systems take it as: requeue.
EXIT_PREEMPTED = os.EX_TEMPFAIL
PREEMPTED_FILE = 'preempted.pth'
SKIPPED_FILE = 'skipped_files.txt'
# What random numbers are for: the second part of a seed.
_ITERATION, _DATA = 1, 2
# Entries of a checkpoint.
_POSITION, _GUARD = 'data_position', 'numerical_guard'


# ---- data and random numbers that can be repeated from any iteration ----

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


def _loaders(runner: Any) -> list[DataLoader]:
    loops = (runner.train_loop, runner.val_loop)
    return [loop.dataloader for loop in loops if loop is not None]


def _end_workers(runner: Any) -> None:
    """End the dataloaders' workers in order. The interpreter, at its own end, would wait 5 s for each."""
    for loader in _loaders(runner):
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
        _end_workers(runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(runner.seed, _ITERATION, runner.iter * self.world_size + self.rank)


def _need_exact_resumption(runner: Any, hook: Hook, why: str) -> None:
    if not any(isinstance(other, ExactResumeHook) for other in runner.hooks):
        raise ValueError(f"{type(hook).__name__} needs dict(type='mmlocalmamba.ExactResumeHook') in custom_hooks, "
                         f'{why}')


# ---- checkpoints that are whole ----

@register_backend('whole_files')
class WholeFileBackend(LocalBackend):
    """MMEngine's local files, written whole or not at all: ``backend_args=dict(backend='whole_files')``."""

    def put(self, obj: bytes, filepath: str) -> None:
        write_whole(str(filepath), obj)

    def put_text(self, obj: str, filepath: str, encoding: str = 'utf-8') -> None:
        write_whole(str(filepath), obj.encode(encoding))


def is_whole(path: str) -> bool:
    """Whether a checkpoint has an end: torch.save's files are ZIP archives, whose table of contents comes last."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's CheckpointHook, of which no moment to be killed in loses a checkpoint or leaves a partial one.

    A local file is written beside its place, synced and renamed. Older ones are removed after that, so that there is
    room for one more than ``max_keep_ckpts`` needed. Resuming (without load_from) takes the newest whole checkpoint if
    ``last_checkpoint`` names none. All arguments are MMEngine's.
    """

    def before_run(self, runner: Any) -> None:
        if runner._resume and runner._load_from is None:
            self._mend_last_checkpoint(runner)
            dist.barrier()

    @dist.master_only
    def _mend_last_checkpoint(self, runner: Any) -> None:
        folder = str(runner.work_dir)
        if self.out_dir is not None:
            folder = os.path.join(str(self.out_dir), os.path.basename(folder.rstrip(os.sep)))
        for path in glob.glob(os.path.join(glob.escape(folder), '*.pth.*.tmp')):
            os.remove(path)  # of a process that was killed while it wrote
        record = os.path.join(runner.work_dir, 'last_checkpoint')
        last = ''
        if os.path.isfile(record):
            with open(record) as file:
                last = file.read().strip()
        if '://' in last or is_whole(last):
            return
        names = itertools.chain(*(
            glob.glob(os.path.join(glob.escape(place), name)) for place, name in
            ((folder, self.filename_tmpl.format('*')), (str(runner.work_dir), PREEMPTED_FILE))))
        whole = sorted(filter(is_whole, names), key=os.path.getmtime)
        if whole:
            print_log(f'last_checkpoint names no whole checkpoint ({last or "nothing"}); the newest is {whole[-1]}',
                      logger='current', level=logging.WARNING)
            write_whole(record, whole[-1])

    def before_train(self, runner: Any) -> None:
        if self.backend_args is None and self.file_client_args is None and '://' not in str(self.out_dir or ''):
            self.backend_args = dict(backend='whole_files')
        super().before_train(runner)
        self.outdated: list[str] = []
        if isinstance(self.file_backend, WholeFileBackend):
            # MMEngine removes old checkpoints before it writes the new one.
            self.file_backend.remove = self.outdated.append

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_outdated()

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        current = {self.last_ckpt, getattr(self, 'best_ckpt_path', None),
                   *getattr(self, 'best_ckpt_path_dict', {}).values()}
        while self.outdated:
            path = self.outdated.pop()
            if path not in current and os.path.isfile(path):
                os.remove(path)


# ---- preemption ----

def _obey_parent_alone() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _shield_worker(init: Any, worker: int) -> None:
    """Schedulers signal all processes of a job. A dataloader's worker that obeys breaks the training, which has yet to
    finish its iteration; only the training may end it."""
    if init is not None:
        init(worker)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent_alone, daemon=True).start()


def _start_shielded(start: Callable[[], Any]) -> Any:
    """Start workers with signals blocked, until each has shielded itself. Those to the training wait meanwhile."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, PreemptionHook.SIGNALS)
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """SIGTERM or SIGUSR1: finish the iteration, write a checkpoint, leave with exit code 75 (EX_TEMPFAIL).

    ``preempted.pth`` in the work directory is the checkpoint, and what ``resume`` takes next. If any process was
    signalled, all leave after the same iteration. With gradient accumulation they leave after the next step of the
    optimizer; a validation that is due, or has begun, is finished first; a training that ends meanwhile leaves with 0.

    Raises:
        ValueError: before training, if there is no ExactResumeHook: data of the epoch would be repeated.
    """

    priority = 'HIGHEST'  # before other hooks begin with the next iteration

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}
        self.group: Any = None

    def before_train(self, runner: Any) -> None:
        _need_exact_resumption(runner, self, 'or a resumed epoch would start again')
        if threading.current_thread() is not threading.main_thread():
            print_log('PreemptionHook: the training does not run in the main thread, so signals are not caught',
                      logger='current', level=logging.WARNING)
            return
        if dist.is_distributed():
            # On the CPU: NCCL would wait for the GPU in every iteration.
            self.group = torch.distributed.new_group(backend='gloo')
        for loader in _loaders(runner):
            loader.worker_init_fn = partial(_shield_worker, loader.worker_init_fn)
            loader._get_iterator = partial(_start_shielded, loader._get_iterator)
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        # Not where the last iteration ends: what follows it, a validation or the end of the epoch, would be lost.
        if self._signalled() and runner.optim_wrapper.should_update():
            self._leave(runner)

    def _leave(self, runner: Any) -> None:
        path = os.path.join(runner.work_dir, PREEMPTED_FILE)
        runner.save_checkpoint(runner.work_dir, PREEMPTED_FILE, by_epoch=False,
                               meta=dict(epoch=runner.epoch, iter=runner.iter),
                               backend_args=dict(backend='whole_files'))
        if dist.is_main_process():
            write_whole(os.path.join(runner.work_dir, 'last_checkpoint'), path)
        if self.group is not None:
            torch.distributed.barrier(self.group)  # a launcher ends all processes once the first has gone
        print_log(f'preempted after iteration {runner.iter}; resume from {path}', logger='current',
                  level=logging.WARNING)
        _end_workers(runner)
        self.after_train(runner)
        runner.visualizer.close()
        sys.exit(EXIT_PREEMPTED)

    def _signalled(self) -> bool:
        if self.group is None:
            return self.signal is not None
        flag = torch.tensor(self.signal is not None, dtype=torch.uint8)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self.group)
        return bool(flag)

    def after_train(self, runner: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ---- numbers that are none ----

def _sample_names(batch: Any) -> list[dict]:
    """What a batch of the mm* repositories says of its samples, as far as it says something."""
    samples = batch.get('data_samples', ()) if isinstance(batch, dict) else ()
    names = []
    for sample in samples or ():
        meta = getattr(sample, 'metainfo', {})
        names.append({key: meta[key] for key in ('img_path', 'img_id', 'sample_idx') if key in meta})
    return names


@HOOKS.register_module()
class NumericalGuardHook(Hook):
    """Stops a training before a loss or gradient that is NaN or infinite reaches the weights.

    ``nonfinite_iter{N}_rank{R}.json`` in the work directory names the iteration, the loss, the parameters with such
    gradients and the samples (img_path, img_id) of the batches since the last step. All processes decide alike. Inf in
    gradients that a loss scaler (float16) has scaled is left to the scaler, which skips the step and scales down.

    Args:
        skip: leave out the optimizer's step up to so many times before stopping. It is of no use, and the training
            stops, if a buffer (a BatchNorm's statistics) has taken up the numbers.

    Raises:
        FloatingPointError: in training, with the above.
    """

    priority = 'LOWEST'

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f'skip must be at least 0, got {skip}')
        self.skip, self.skipped = skip, 0
        self.batches: list[Any] = []
        self.losses: list[torch.Tensor] = []

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume:
            self.skipped = checkpoint.get(_GUARD, 0)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[_GUARD] = self.skipped

    def before_train(self, runner: Any) -> None:
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            raise TypeError(f'NumericalGuardHook guards one OptimWrapper, got {type(wrapper).__name__}')
        # MMEngine has no hook between the gradients and the step.
        self.backward, self.step = wrapper.backward, wrapper.step
        wrapper.backward, wrapper.step = self._backward, partial(self._step, runner)
        wrapper.step._with_counter = True  # MMEngine's schedulers count steps, and miss their own wrapper otherwise

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(data_batch)

    def _backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self.losses.append(loss.detach().float())
        self.backward(loss, **kwargs)

    def _step(self, runner: Any, **kwargs: Any) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        values = list(self.losses)
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        if scaler is None or not scaler.is_enabled():
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            values.append(nn.utils.get_total_norm(gradients, norm_type=float('inf')).float())
        if not self._any(runner, not torch.stack(values).isfinite().all()):
            self.step(**kwargs)
        else:
            self._report(runner, model)
        self.batches.clear()
        self.losses.clear()

    @staticmethod
    def _any(runner: Any, mine: bool) -> bool:
        """Whether it is so on any process."""
        flag = torch.tensor(float(mine), device=next(runner.model.parameters()).device)
        dist.all_reduce(flag, op='max')
        return bool(flag)

    def _report(self, runner: Any, model: nn.Module) -> None:
        parameters = [name for name, parameter in model.named_parameters()
                      if parameter.grad is not None and not parameter.grad.isfinite().all()]
        buffers = [name for name, buffer in model.named_buffers()
                   if buffer.is_floating_point() and not buffer.isfinite().all()]
        losses = [loss.item() for loss in self.losses]
        samples = [name for batch in self.batches for name in _sample_names(batch)]
        rank = dist.get_rank()
        record = dict(iteration=runner.iter + 1, epoch=runner.epoch + 1, rank=rank, losses=[str(x) for x in losses],
                      parameters=parameters, buffers=buffers, samples=samples)
        path = os.path.join(runner.work_dir, f'nonfinite_iter{runner.iter + 1}_rank{rank}.json')
        write_whole(path, json.dumps(record, indent=1, default=str))
        message = (f'iteration {runner.iter + 1}: NaN or Inf in the loss ({", ".join(map(str, losses))}) or in the '
                   f'gradients of {len(parameters)} parameters ({", ".join(parameters[:4])}'
                   f'{", ..." if len(parameters) > 4 else ""}). The samples of the batch: {path}')
        if self._any(runner, bool(buffers)):
            raise FloatingPointError(f'{message}. Buffers have it, too: {", ".join(buffers[:4])}')
        if self.skipped >= self.skip:
            raise FloatingPointError(f'{message}. {self.skipped} such steps were skipped before; '
                                     'NumericalGuardHook(skip=...) says how many may be')
        self.skipped += 1
        print_log(f'{message}. The step is skipped, {self.skipped} of {self.skip}', logger='current',
                  level=logging.WARNING)

    def after_train(self, runner: Any) -> None:
        runner.optim_wrapper.backward, runner.optim_wrapper.step = self.backward, self.step


# ---- files that cannot be read ----

def _can_be_read(path: str) -> bool:
    """By all that may read it: images are decoded by OpenCV, label images by Pillow."""
    try:
        content = get(path)
        return all(mmcv.imfrombytes(content, flag='unchanged', backend=backend) is not None
                   for backend in ('cv2', 'pillow'))
    except Exception:  # whatever a decoder stumbles over
        return False


class _Reader:
    """Takes the place of a dataset's ``prepare_data``."""

    def __init__(self, dataset: Any, record: str = '', skip: int = 0) -> None:
        self.dataset, self.record, self.skip = dataset, record, skip

    def __call__(self, index: int) -> Any:
        try:
            return type(self.dataset).prepare_data(self.dataset, index)
        except Exception as error:
            files = [value for key, value in self.dataset.get_data_info(index).items()
                     if key.endswith('_path') and isinstance(value, str)]
            broken = [path for path in files if not _can_be_read(path)]
            message = (f'sample {index} of {type(self.dataset).__name__} was not loaded: '
                       + (f'{" and ".join(broken)} cannot be read' if broken else f'its files are {", ".join(files)}')
                       + f' ({type(error).__name__}: {error})')
            if broken and self.skip:
                self._leave_out(broken, message)
                return None  # the dataset draws another sample
            raise RuntimeError(message) from error

    def _leave_out(self, broken: list[str], message: str) -> None:
        with open(self.record, 'a+') as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of other workers and processes
            file.seek(0)
            known = set(file.read().splitlines())
            new = [path for path in broken if path not in known]
            if len(known) + len(new) > self.skip:
                raise RuntimeError(f'{message}. {len(known)} files were left out before, see {self.record}; '
                                   'BrokenFilesHook(skip=...) says how many may be')
            file.writelines(f'{path}\n' for path in new)
        if new:
            print_log(f'{message}. Another sample takes its place', logger='current', level=logging.WARNING)


def _datasets(dataset: Any) -> Iterator[Any]:
    """What wrappers hold, or the dataset itself."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner[0] is None:
        yield dataset
    else:
        for part in inner:
            yield from _datasets(part)


@HOOKS.register_module()
class BrokenFilesHook(Hook):
    """Names the sample that cannot be loaded, and which of its files is missing or damaged.

    Args:
        skip: a training leaves out up to so many different files, and takes other samples of the dataset, drawn at
            random, in their place. Each is logged as a warning and listed in ``skipped_files.txt`` in the work
            directory. Validation and test always stop.

    Raises:
        RuntimeError: while data are loaded, with the above.
        ValueError: before training, if there is no ExactResumeHook: workers may have begun already.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f'skip must be at least 0, got {skip}')
        self.skip = skip

    @staticmethod
    def _watch(loop: Any, *args: Any) -> None:
        if loop is not None:
            for dataset in _datasets(loop.dataloader.dataset):
                if hasattr(dataset, 'prepare_data') and not isinstance(dataset.prepare_data, _Reader):
                    dataset.prepare_data = _Reader(dataset, *args)

    def before_train(self, runner: Any) -> None:
        _need_exact_resumption(runner, self, 'or workers that have begun already do not know of it')
        self.record = os.path.join(runner.work_dir, SKIPPED_FILE)
        if not runner._resume and dist.is_main_process() and os.path.exists(self.record):
            os.remove(self.record)
        dist.barrier()
        self._watch(runner.train_loop, self.record, self.skip)
        self._watch(runner.val_loop)

    def before_val(self, runner: Any) -> None:
        self._watch(runner.val_loop)

    def before_test(self, runner: Any) -> None:
        self._watch(runner.test_loop)

    def after_train(self, runner: Any) -> None:
        if os.path.exists(self.record):
            with open(self.record) as file:
                count = len(file.read().splitlines())
            print_log(f'{count} files were left out of the training, see {self.record}', logger='current',
                      level=logging.WARNING)
