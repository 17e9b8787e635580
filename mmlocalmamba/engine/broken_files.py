"""Files of the data that cannot be read: named, or left out."""
import fcntl
import logging
import os
from collections.abc import Iterator
from typing import Any

import mmcv
from mmengine import dist
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log

from mmlocalmamba.engine.loops import need_own_loop
from mmlocalmamba.registry import HOOKS

SKIPPED_FILE = 'skipped_files.txt'


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
        ValueError: before training, with a loop of MMEngine: workers may have begun already.
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
        need_own_loop(runner, self, 'or workers that have begun already do not know of it')
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
