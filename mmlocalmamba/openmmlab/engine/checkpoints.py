"""Checkpoints that are written whole or not at all, and that ``torch.load(weights_only=True)`` reads.

MMEngine stores a few Python objects in its checkpoints, and ``weights_only=True``, the default since torch 2.6, refuses
them. This module replaces them by numbers and tensors, because MMEngine's inferencers load a checkpoint before anything
of this package could allow those objects.
"""
import glob
import logging
import os
import re
import zipfile
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import BaseLoop, find_latest_checkpoint

from mmlocalmamba.files import load_checkpoint, write_whole
from mmlocalmamba.openmmlab.compat import weights_only
from mmlocalmamba.openmmlab.engine.lock import WorkDirLock
from mmlocalmamba.registry import HOOKS

# Checkpoints that the loops write; CheckpointHook writes the others.
PREEMPTED_FILE = 'preempted.pth'
BEFORE_VALIDATION_FILE = 'before_validation.pth'
# Key of the loop's state in a checkpoint.
LOOP_STATE = 'loop'


@register_backend('whole_files')
class WholeFileBackend(LocalBackend):
    """MMEngine's local file backend, which writes a file whole or not at all.

    Select it by ``backend_args=dict(backend='whole_files')``.
    """

    def put(self, obj: bytes, filepath: str) -> None:
        write_whole(str(filepath), obj)

    def put_text(self, obj: str, filepath: str, encoding: str = 'utf-8') -> None:
        write_whole(str(filepath), obj.encode(encoding))


def is_whole(path: str) -> bool:
    """Return True if a checkpoint is complete: it is a ZIP archive, whose table of contents comes last."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


def progress(path: str) -> tuple[int, int, bool]:
    """Return by what checkpoints of one training are compared: epoch, iteration, True if no validation is due.

    A file that cannot be read is before all others.
    """
    try:
        checkpoint = load_checkpoint(path)
        meta = checkpoint['meta']
        return meta['epoch'], meta['iter'], not checkpoint.get(LOOP_STATE, {}).get('validation_due', False)
    except (RuntimeError, KeyError, TypeError, AttributeError, OSError):
        return -1, -1, False


# Key in a checkpoint's meta: names of the files to remove after the checkpoint is written.
_OUTDATED = 'outdated_checkpoints'
_HISTORY = {'log_history', 'count_history', 'max_length'}


def to_plain_values(value: Any) -> Any:
    """Replace HistoryBuffers by dicts of tensors, and NumPy arrays and scalars by lists and numbers.

    Dicts, lists and tuples are copied recursively; other values are returned unchanged.
    """
    if isinstance(value, HistoryBuffer):
        log, count = value.data
        return dict(log_history=torch.tensor(log), count_history=torch.tensor(count), max_length=value.max_length)
    if isinstance(value, dict):
        return type(value)((key, to_plain_values(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(to_plain_values, value))
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def histories(scalars: dict[str, Any]) -> dict[str, Any]:
    """Restore the HistoryBuffers of a message hub's ``log_scalars`` that :func:`to_plain_values` replaced."""
    return {name: HistoryBuffer(value['log_history'].numpy(force=True), value['count_history'].numpy(force=True),
                                value['max_length'])
            if isinstance(value, dict) and value.keys() == _HISTORY else value for name, value in scalars.items()}


@dist.master_only
def save_to_resume_from(runner: Any, name: str) -> None:
    """Write a checkpoint between two iterations into the work directory, and point ``last_checkpoint`` to it.

    Args:
        name: file name of the checkpoint.
    """
    runner.save_checkpoint(runner.work_dir, name, by_epoch=False, meta=dict(epoch=runner.epoch, iter=runner.iter),
                           backend_args=dict(backend='whole_files'))
    write_whole(os.path.join(runner.work_dir, 'last_checkpoint'), os.path.join(runner.work_dir, name))


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's CheckpointHook, safe against a process that is killed while it writes.

    A local checkpoint is written beside its path, synced and renamed, so that no partial file remains. Older
    checkpoints are removed afterwards: the disk needs room for ``max_keep_ckpts`` + 1 of them. Resuming without
    ``load_from`` uses the file that ``last_checkpoint`` names, in the training's own folder; if there is no such file,
    the whole checkpoint of the latest epoch and iteration. Files of other folders are never removed, so a copy of a
    work directory is a training of its own.

    A training holds its work directory from ``before_run`` to its end, see
    :class:`~mmlocalmamba.openmmlab.engine.lock.WorkDirLock`. With several processes, the first one holds it for all.

    Checkpoints hold only numbers and tensors. The hook loads them, and those of MMEngine, with ``weights_only=True`` on
    every torch version (:func:`mmlocalmamba.files.load_checkpoint`): to resume, to test and as ``load_from``.

    All arguments are MMEngine's.

    Raises:
        RuntimeError: before training, if another training holds the work directory and does not leave it; in training,
            before a checkpoint is written, if another training has taken the work directory.
    """

    lock: WorkDirLock | None = None
    folder: str | None = None  # of the checkpoints

    def _find_folder(self, runner: Any) -> None:
        """Set ``folder`` as MMEngine's before_train sets ``out_dir``, once."""
        if self.folder is None:
            self.folder = str(runner.work_dir)
            if self.out_dir is not None and str(self.out_dir) != self.folder:
                self.folder = os.path.join(str(self.out_dir), os.path.basename(self.folder.rstrip(os.sep)))

    def before_run(self, runner: Any) -> None:
        self._find_folder(runner)
        if isinstance(runner._train_loop, BaseLoop):
            self._hold_work_dir(runner)
        if runner._resume and runner._load_from is None:
            found = [self._checkpoint_to_resume(runner) if dist.is_main_process() else None]
            dist.broadcast_object_list(found)
            runner._load_from, = found
            if runner._load_from is None:  # else MMEngine would look for it again
                runner._resume = False
        if runner._load_from is not None:
            runner._load_from = weights_only(runner._load_from)

    def _hold_work_dir(self, runner: Any) -> None:
        error: list[str | None] = [None]
        if dist.is_main_process():
            self.lock = WorkDirLock(str(runner.work_dir))
            try:
                self.lock.acquire()
            except RuntimeError as refused:
                error = [str(refused)]
        dist.broadcast_object_list(error)
        if error[0] is not None:
            raise RuntimeError(error[0])
        if hasattr(runner._train_loop, 'at_end'):  # a ResumableLoop, which calls it after an error, too
            runner._train_loop.at_end.callback(self.after_run, runner)

    def after_run(self, runner: Any) -> None:
        if self.lock is not None:
            self.lock.release()
        self.lock = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if self.lock is not None:
            self.lock.check()
        checkpoint.update({key: to_plain_values(checkpoint[key]) for key in ('meta', 'message_hub')})
        checkpoint['meta'][_OUTDATED] = list(getattr(self, 'outdated', ()))

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        outdated = checkpoint.get('meta', {}).get(_OUTDATED, []) if runner._resume else []
        self.outdated: list[str] = list(map(os.path.basename, outdated))
        hub = checkpoint.get('message_hub')
        if hub:
            hub['log_scalars'] = histories(hub.get('log_scalars', {}))

    def _checkpoint_to_resume(self, runner: Any) -> str | None:
        """Return the checkpoint to resume from, and make ``last_checkpoint`` name it. None: there is none."""
        assert self.folder is not None  # from before_run or before_train
        work_dir = str(runner.work_dir)
        for path in glob.glob(os.path.join(glob.escape(self.folder), '*.pth.*.tmp')):
            os.remove(path)  # left by a process that was killed while writing
        last = (find_latest_checkpoint(work_dir) or '').strip()
        if '://' in last:
            return last
        own = re.sub(r'\{[^{}]*\}', '*', glob.escape(self.filename_tmpl))
        places = [(self.folder, glob.escape(os.path.basename(last))), (work_dir, glob.escape(os.path.basename(last)))]
        others = [(self.folder, own), (work_dir, PREEMPTED_FILE), (work_dir, BEFORE_VALIDATION_FILE)]
        named, whole = ([path for place, name in pairs if name for path in glob.glob(os.path.join(
            glob.escape(place), name)) if is_whole(path)] for pairs in (places, others))
        if named:
            found = named[0]
        else:
            whole = [path for path in [*sorted(whole, key=os.path.getmtime, reverse=True), last]
                     if is_whole(path) and progress(path) > (-1, -1, False)]
            if not whole:
                if last:
                    return last  # loading it says what is wrong
                print_log(f'{work_dir} has no checkpoint: the training begins', logger='current')
                return None
            found = max(whole, key=progress)
            print_log(f'last_checkpoint names no whole checkpoint of this folder ({last or "nothing"}); resuming from '
                      f'{found}', logger='current', level=logging.WARNING)
        if found != last:
            write_whole(os.path.join(work_dir, 'last_checkpoint'), found)
        return found

    backend_args: dict | None

    def before_train(self, runner: Any) -> None:
        if self.backend_args is None and self.file_client_args is None and '://' not in str(self.out_dir or ''):
            self.backend_args = dict(backend='whole_files')
        self._find_folder(runner)
        if runner._resume:
            self._name_own_files(runner.message_hub)
        super().before_train(runner)
        if runner._resume:  # otherwise MMEngine does not copy it after a validation with the best score
            self.last_ckpt = runner.message_hub.get_info('last_ckpt', None)
        self.metrics: dict = {}
        self.outdated = getattr(self, 'outdated', [])
        self._remove_outdated()
        if isinstance(self.file_backend, WholeFileBackend):
            # MMEngine removes old checkpoints before it writes the new one.
            self.file_backend.remove = lambda path: self.outdated.append(os.path.basename(path))

    def _name_own_files(self, hub: Any) -> None:
        """Replace the folder of checkpoints in the message hub, since a checkpoint may have come from another one."""
        assert self.folder is not None  # from before_run or before_train
        for name in list(hub.runtime_info):
            if name == 'last_ckpt' or name.startswith('best_ckpt'):
                hub.update_info(name, os.path.join(self.folder, os.path.basename(hub.get_info(name))))

    def after_val_epoch(self, runner: Any, metrics: dict) -> None:
        self.metrics = metrics

    def after_val(self, runner: Any) -> None:
        # Save after EarlyStoppingHook has counted in after_val_epoch; MMEngine's hook would save before that. A
        # validation without a training has nothing to save.
        if hasattr(self, 'file_backend'):
            super().after_val_epoch(runner, self.metrics)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        loop = runner.train_loop
        if hasattr(loop, 'collect_ranks'):  # a ResumableLoop
            loop.collect_ranks()
        super()._save_checkpoint_with_step(runner, step, meta)
        if hasattr(loop, 'position'):
            loop.recorded = loop.position
        self._remove_outdated()

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        assert self.folder is not None  # from before_run or before_train
        current = {os.path.basename(path) for path in (
            self.last_ckpt, getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values())
            if path}
        while self.outdated:
            name = self.outdated.pop()
            path = os.path.join(self.folder, name)
            if dist.is_main_process() and name not in current and os.path.isfile(path):
                os.remove(path)
