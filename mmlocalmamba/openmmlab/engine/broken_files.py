"""Name or skip data files that cannot be read."""
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mmcv
from mmengine import dist
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log

from mmlocalmamba.files import write_whole
from mmlocalmamba.openmmlab.engine.data import leaf_datasets
from mmlocalmamba.openmmlab.engine.loops import require_resumable_loop
from mmlocalmamba.registry import HOOKS

SKIPPED_FILE = 'skipped_files.txt'


@dataclass(frozen=True)
class Loader:
    """How a pipeline reads images: mmcv's ``flag`` and ``backend``; ``known`` is False for a loader of another kind."""
    flag: str = 'color'
    backend: str = 'cv2'
    known: bool = True

    def __call__(self, path: str) -> Any:
        """Return the array. None or an exception: it cannot be read."""
        return mmcv.imfrombytes(get(path), flag=self.flag, backend=self.backend)

    def reads(self, path: str) -> bool:
        try:
            return self(path) is not None
        except Exception:  # decoders raise exceptions of many types
            return False

    @property
    def turns(self) -> bool:
        """True if images are turned by their EXIF orientation."""
        return self.flag in ('color', 'grayscale') and self.backend in ('cv2', 'pillow')


def loading_steps(dataset: Any, word: str) -> Iterator[Any]:
    """Yield the steps of a data set's pipeline whose class has the word in its name, also inside of others."""
    def walk(steps: Any) -> Iterator[Any]:
        for step in steps:
            if isinstance(step, (list, tuple)):
                yield from walk(step)
                continue
            if word in type(step).__name__:
                yield step
            yield from walk(getattr(step, 'transforms', None) or ())

    yield from walk(getattr(getattr(dataset, 'pipeline', None), 'transforms', None) or ())


def loaders(dataset: Any) -> tuple[Loader, Loader]:
    """Return how the pipeline of a data set reads pictures and label images."""
    some = bool(getattr(getattr(dataset, 'pipeline', None), 'transforms', None))
    pictures, labels = Loader(known=not some), Loader('unchanged', 'pillow', known=not some)
    for step in loading_steps(dataset, 'LoadImage'):
        if hasattr(step, 'color_type'):
            pictures = Loader(step.color_type, step.imdecode_backend or 'cv2')
    for step in loading_steps(dataset, 'LoadAnnotations'):
        if hasattr(step, 'imdecode_backend'):
            labels = Loader('unchanged', step.imdecode_backend or 'cv2')
    return pictures, labels


class SkippedFiles:
    """A text file with one skipped file a line, to which processes and workers append up to a limit.

    Some file systems and platforms have no locks. So names are appended without one, and the first ``limit`` different
    lines count.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Return the names in the order in which they were added."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding='utf-8') as file:
            return list(dict.fromkeys(file.read().splitlines()))

    def add(self, new: Iterable[str], limit: int) -> tuple[bool, bool]:
        """Add names.

        Returns:
            Whether all of ``new`` are among the first ``limit`` names, and whether any of them was not listed before.
        """
        missing = [name for name in new if name not in self.names()]
        if len(self.names()) + len(missing) > limit:
            return False, True
        while left := [name for name in missing if name not in self.names()]:  # network file systems may lose lines
            with open(self.path, 'ab', buffering=0) as file:
                file.write(''.join(f'{name}\n' for name in left).encode())
        return set(missing) <= set(self.names()[:limit]), bool(missing)


def _skipped(count: int) -> str:
    return f'{count} files were skipped' if count != 1 else '1 file was skipped'


class _Reader:
    """Replacement of a dataset's ``prepare_data`` that names or skips broken files.

    Returns None for a skipped sample; the dataset then draws another one at random.
    """

    def __init__(self, dataset: Any, skipped: SkippedFiles | None = None, limit: int = 0) -> None:
        self.dataset, self.skipped, self.limit = dataset, skipped, limit

    def __call__(self, index: int) -> Any:
        try:
            return type(self.dataset).prepare_data(self.dataset, index)
        except Exception as error:
            files = {value: key for key, value in self.dataset.get_data_info(index).items()
                     if key.endswith('_path') and isinstance(value, str)}
            pictures, labels = loaders(self.dataset)
            broken = [path for path, key in files.items()
                      if not (pictures if key == 'img_path' else labels).reads(path)]
            sample = f'sample {index} of {type(self.dataset).__name__}'
            message = (f'{" and ".join(broken)} cannot be read: {sample}' if broken
                       else f'{sample} cannot be loaded from {" and ".join(files)}')
            message += f' ({type(error).__name__}: {error})'
            if isinstance(error, KeyError) and error.args == ('mask', ):
                message += (": one of its objects has a box but no polygon ('segmentation'). To train on boxes alone, "
                            'use a configuration without masks: faster-rcnn_localvmamba-* or retinanet_localvmamba-*')
            if not broken or not self.limit or self.skipped is None:
                raise RuntimeError(message) from error
            allowed, new = self.skipped.add(broken, self.limit)
            if not allowed:
                raise RuntimeError(f'{message}. {_skipped(len(self.skipped.names()))} before, see '
                                   f'{self.skipped.path}; BrokenFilesHook(skip=...) sets the limit') from error
            if new:
                print_log(f'{message}. Another sample replaces it', logger='current', level=logging.WARNING)
            return None


@HOOKS.register_module()
class BrokenFilesHook(Hook):
    """Name the sample that cannot be loaded and its missing or damaged files.

    The hook watches the data of training, validation and test, and the held-out data of a direction search.

    Args:
        skip: number of different files that a training may skip. Random other samples of the dataset replace them.
            Each skipped file is logged as a warning and listed in ``skipped_files.txt`` in the work directory.
            Validation and test never skip files.

    Raises:
        RuntimeError: if a sample cannot be loaded.
        ValueError: if ``skip`` is negative; before training, if the training loop is not one of mmlocalmamba, whose
            workers start only after the hook.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f'skip must be at least 0, got {skip}')
        self.skip = skip
        self.watched: list[Any] = []

    def _watch(self, loader: Any, *args: Any) -> None:
        for dataset in leaf_datasets(loader.dataset):
            if hasattr(dataset, 'prepare_data') and dataset not in self.watched:
                dataset.prepare_data = _Reader(dataset, *args)
                self.watched.append(dataset)

    def _release(self) -> None:
        while self.watched:
            del self.watched.pop().prepare_data

    def before_train(self, runner: Any) -> None:
        loop = require_resumable_loop(runner, self, 'whose workers start after the hook')
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
        if runner._train_loop is None or isinstance(runner._train_loop, dict):  # no training continues
            self._release()

    def after_test(self, runner: Any) -> None:
        self._release()

    @dist.master_only
    def after_train(self, runner: Any) -> None:
        skipped = SkippedFiles(os.path.join(runner.work_dir, SKIPPED_FILE))
        if names := skipped.names():
            write_whole(skipped.path, ''.join(f'{name}\n' for name in names))  # without duplicates
            print_log(f'{_skipped(len(names))} in the training, see {skipped.path}', logger='current',
                      level=logging.WARNING)
