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
from mmengine.runner import find_latest_checkpoint

from mmlocalmamba.files import write_whole
from mmlocalmamba.openmmlab.compat import weights_only
from mmlocalmamba.registry import HOOKS

# Checkpoints that the loops write; CheckpointHook writes the others.
PREEMPTED_FILE = 'preempted.pth'
BEFORE_VALIDATION_FILE = 'before_validation.pth'


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


# Key in a checkpoint's meta: paths of the files to remove after the checkpoint is written.
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
    ``load_from`` uses the newest whole checkpoint if ``last_checkpoint`` does not name a whole one.

    Checkpoints hold only numbers and tensors. The hook loads them, and those of MMEngine, with ``weights_only=True`` on
    every torch version (:func:`mmlocalmamba.files.load_checkpoint`): to resume, to test and as ``load_from``.

    All arguments are MMEngine's.
    """

    def before_run(self, runner: Any) -> None:
        if runner._resume and runner._load_from is None:
            self._repair_last_checkpoint(runner)
            dist.barrier()
            runner._load_from = find_latest_checkpoint(runner.work_dir)
        if runner._load_from is not None:
            runner._load_from = weights_only(runner._load_from)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint.update({key: to_plain_values(checkpoint[key]) for key in ('meta', 'message_hub')})
        checkpoint['meta'][_OUTDATED] = list(getattr(self, 'outdated', ()))

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self.outdated: list[str] = checkpoint.get('meta', {}).get(_OUTDATED, []) if runner._resume else []
        hub = checkpoint.get('message_hub')
        if hub:
            hub['log_scalars'] = histories(hub.get('log_scalars', {}))

    @dist.master_only
    def _repair_last_checkpoint(self, runner: Any) -> None:
        folder = str(runner.work_dir)
        if self.out_dir is not None:
            folder = os.path.join(str(self.out_dir), os.path.basename(folder.rstrip(os.sep)))
        for path in glob.glob(os.path.join(glob.escape(folder), '*.pth.*.tmp')):
            os.remove(path)  # left by a process that was killed while writing
        record = os.path.join(runner.work_dir, 'last_checkpoint')
        last = ''
        if os.path.isfile(record):
            with open(record) as file:
                last = file.read().strip()
        if '://' in last or is_whole(last):
            return
        own = re.sub(r'\{[^{}]*\}', '*', glob.escape(self.filename_tmpl))
        patterns = [(folder, own), (str(runner.work_dir), PREEMPTED_FILE),
                    (str(runner.work_dir), BEFORE_VALIDATION_FILE)]
        names = [path for place, name in patterns for path in glob.glob(os.path.join(glob.escape(place), name))]
        whole = sorted(filter(is_whole, names), key=os.path.getmtime)
        if whole:
            print_log(f'last_checkpoint names no whole checkpoint ({last or "nothing"}); resuming from {whole[-1]}',
                      logger='current', level=logging.WARNING)
            write_whole(record, whole[-1])

    backend_args: dict | None

    def before_train(self, runner: Any) -> None:
        if self.backend_args is None and self.file_client_args is None and '://' not in str(self.out_dir or ''):
            self.backend_args = dict(backend='whole_files')
        super().before_train(runner)
        if runner._resume:  # otherwise MMEngine does not copy it after a validation with the best score
            self.last_ckpt = runner.message_hub.get_info('last_ckpt', None)
        self.metrics: dict = {}
        self.outdated = getattr(self, 'outdated', [])
        self._remove_outdated()
        if isinstance(self.file_backend, WholeFileBackend):
            # MMEngine removes old checkpoints before it writes the new one.
            self.file_backend.remove = self.outdated.append

    def after_val_epoch(self, runner: Any, metrics: dict) -> None:
        self.metrics = metrics

    def after_val(self, runner: Any) -> None:
        # Save after EarlyStoppingHook has counted in after_val_epoch; MMEngine's hook would save before that.
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
        current = {self.last_ckpt, getattr(self, 'best_ckpt_path', None),
                   *getattr(self, 'best_ckpt_path_dict', {}).values()}
        while self.outdated:
            path = self.outdated.pop()
            if dist.is_main_process() and path not in current and os.path.isfile(path):
                os.remove(path)
