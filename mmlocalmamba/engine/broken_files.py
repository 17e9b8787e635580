"""Files of the data that cannot be read: named, or left out."""
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import mmcv
from mmengine import dist
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log

from mmlocalmamba.engine.loops import need_own_loop
from mmlocalmamba.files import write_whole
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


class SkippedFiles:
    """A list of files that processes and workers add to, up to a number.

    No lock, which some file systems and systems have not: a line is appended, and the first lines count.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def names(self) -> list[str]:
        """In the order in which they were added."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding='utf-8') as file:
            return list(dict.fromkeys(file.read().splitlines()))

    def add(self, new: Iterable[str], limit: int) -> tuple[bool, bool]:
        """Whether all of them are among the first ``limit``, and whether any was not on the list."""
        missing = [name for name in new if name not in self.names()]
        if len(self.names()) + len(missing) > limit:
            return False, True
        while left := [name for name in missing if name not in self.names()]:  # over a network lines may get lost
            with open(self.path, 'ab', buffering=0) as file:
                file.write(''.join(f'{name}\n' for name in left).encode())
        return set(missing) <= set(self.names()[:limit]), bool(missing)


class _Reader:
    """Takes the place of a dataset's ``prepare_data`` while a hook watches it."""

    def __init__(self, dataset: Any, skipped: SkippedFiles | None = None, limit: int = 0) -> None:
        self.dataset, self.skipped, self.limit = dataset, skipped, limit

    def __call__(self, index: int) -> Any:
        try:
            return type(self.dataset).prepare_data(self.dataset, index)
        except Exception as error:
            files = [value for key, value in self.dataset.get_data_info(index).items()
                     if key.endswith('_path') and isinstance(value, str)]
            broken = [path for path in files if not _can_be_read(path)]
            sample = f'sample {index} of {type(self.dataset).__name__}'
            message = (f'{" and ".join(broken)} cannot be read: {sample}' if broken
                       else f'{sample} cannot be made of {" and ".join(files)}')
            message += f' ({type(error).__name__}: {error})'
            if isinstance(error, KeyError) and error.args == ('mask', ):
                message += (": one of its objects has a box but no polygon ('segmentation'). For boxes alone there are "
                            'configurations without masks, faster-rcnn_localvmamba-* and retinanet_localvmamba-*')
            if not broken or not self.limit or self.skipped is None:
                raise RuntimeError(message) from error
            allowed, new = self.skipped.add(broken, self.limit)
            if not allowed:
                raise RuntimeError(f'{message}. {len(self.skipped.names())} files were left out before, see '
                                   f'{self.skipped.path}; BrokenFilesHook(skip=...) says how many may be') from error
            if new:
                print_log(f'{message}. Another sample takes its place', logger='current', level=logging.WARNING)
            return None  # the dataset draws another sample


def parts(dataset: Any) -> Iterator[Any]:
    """Datasets inside of wrappers, or the dataset itself."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner[0] is None:
        yield dataset
    else:
        for part in inner:
            yield from parts(part)


@HOOKS.register_module()
class BrokenFilesHook(Hook):
    """Names the sample that cannot be loaded, and which of its files is missing or damaged: in all data of a training,
    those that a direction search holds out, too, and in validation and test.

    Args:
        skip: a training leaves out up to so many different files, and takes other samples of the dataset, drawn at
            random, in their place. Each is logged as a warning and listed in ``skipped_files.txt`` in the work
            directory. Validation and test always stop.

    Raises:
        RuntimeError: while data are loaded, with the above.
        ValueError: before training, if its loop is none of mmlocalmamba: workers may have begun already.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f'skip must be at least 0, got {skip}')
        self.skip = skip
        self.watched: list[Any] = []

    def _watch(self, loader: Any, *args: Any) -> None:
        for dataset in parts(loader.dataset):
            if hasattr(dataset, 'prepare_data') and dataset not in self.watched:
                dataset.prepare_data = _Reader(dataset, *args)
                self.watched.append(dataset)

    def _release(self) -> None:
        while self.watched:
            del self.watched.pop().prepare_data

    def before_train(self, runner: Any) -> None:
        loop = need_own_loop(runner, self, 'or workers that have begun already do not know of it')
        skipped = SkippedFiles(os.path.join(runner.work_dir, SKIPPED_FILE))
        if not runner._resume and dist.is_main_process() and os.path.exists(skipped.path):
            os.remove(skipped.path)
        dist.barrier()
        loop.at_end.callback(self._release)
        for stream in loop.loaders.streams.values():
            self._watch(stream.loader, skipped, self.skip)
        if runner.val_loop is not None:
            self._watch(runner.val_loop.dataloader)

    def before_val(self, runner: Any) -> None:
        self._watch(runner.val_loop.dataloader)

    def before_test(self, runner: Any) -> None:
        self._watch(runner.test_loop.dataloader)

    def after_val(self, runner: Any) -> None:
        if runner._train_loop is None or isinstance(runner._train_loop, dict):  # no training that will go on
            self._release()

    def after_test(self, runner: Any) -> None:
        self._release()

    @dist.master_only
    def after_train(self, runner: Any) -> None:
        skipped = SkippedFiles(os.path.join(runner.work_dir, SKIPPED_FILE))
        if names := skipped.names():
            write_whole(skipped.path, ''.join(f'{name}\n' for name in names))  # without what two added at once
            print_log(f'{len(names)} files were left out of the training, see {skipped.path}', logger='current',
                      level=logging.WARNING)
