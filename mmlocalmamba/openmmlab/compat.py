"""The differences between the OpenMMLab and OneDL packages, and between MMEngine's ways to load a checkpoint."""
import logging
import os
import re
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import DATASETS
from mmengine.runner import CheckpointLoader

from mmlocalmamba import files
from mmlocalmamba.files import SCHEME, SUFFIX
from mmlocalmamba.weights import load_checkpoint, released

# The last line of an error under mim.
BEFORE_MIM = "The error is above this line. What follows is mim's traceback, which only says that its command failed."
# A scheme of MMEngine's checkpoint loader: what follows is loaded by load_checkpoint.
WEIGHTS_ONLY = 'weights_only:'


def mim_package(scope: str) -> str:
    """Return the name that mim gives to the package of a scope: 'mmsegmentation' for 'mmseg'."""
    if scope == 'mmdet' and [*distributions(name='onedl-mmdetection')]:
        return 'mmdetection'
    return 'mmsegmentation' if scope == 'mmseg' else scope


# ---- messages of the core ----


class _ToMMEngine(logging.Handler):
    """Hand log records on to MMEngine's current logger."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), logger='current', level=record.levelno)


def send_messages_to_mmengine() -> None:
    """Send the messages of the core to MMEngine's log, once however often it is called."""
    logger = logging.getLogger('mmlocalmamba')
    if not any(isinstance(handler, _ToMMEngine) for handler in logger.handlers):
        logger.addHandler(_ToMMEngine())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _parent_is_mim() -> bool:
    try:
        command = Path(f'/proc/{os.getppid()}/cmdline').read_bytes().split(b'\0')
    except OSError:  # the system has no such file, or the parent has ended
        return False
    return any(word.rpartition(b'/')[2] == b'mim' for word in command[:2])  # of `python /.../bin/mim train ...`


def point_at_errors_under_mim() -> None:
    """If mim has started this process, write a last line after the traceback of an uncaught error.

    mim then prints a traceback of its own, which hides the error from a reader who looks at the end.
    """
    previous = sys.excepthook
    if getattr(previous, 'under_mim', False) or not _parent_is_mim():
        return

    def excepthook(*error: Any) -> None:
        previous(*error)
        print(BEFORE_MIM, file=sys.stderr)

    excepthook.under_mim = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


# ---- checkpoints ----


def _getattr_of_history(owner: Any, name: str) -> Any:
    """Stand in for getattr in pickles: it returns statistics methods of HistoryBuffer and nothing else."""
    HistoryBuffer()  # the first instance in a process fills the table
    if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
        return getattr(HistoryBuffer, name)
    raise RuntimeError(f'a checkpoint asks for attribute {name!r} of {owner!r}: refused')


# Our own way to read checkpoints gives MMEngine's HistoryBuffers instead of stand-ins.
files.replace_in_pickles(**{'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
                            'builtins.getattr': _getattr_of_history})


def load_from_weights_only(name: str, map_location: Any = None) -> Any:
    """Load for MMEngine, see :func:`register_loader`. MMEngine shows users the end of this function's name."""
    name = name.removeprefix(WEIGHTS_ONLY)
    loaded = load_checkpoint(name, map_location)
    named = released.find(name) if '://' in name else None
    if named is not None and named[1].dataset is not None:  # else the file knows its classes
        meta = loaded['meta'] = loaded.get('meta') or {}
        meta.setdefault('dataset_meta', class_names(named[1].dataset))
    return loaded


def class_names(dataset: str) -> dict[str, Any]:
    """Return ``classes``, and ``palette`` if there is one, of a type of data set, such as 'mmdet.CocoDataset'."""
    known = getattr(DATASETS.get(dataset), 'METAINFO', {})
    return {key: known[key] for key in ('classes', 'palette') if key in known}


def register_loader() -> None:
    """Let MMEngine load by :func:`mmlocalmamba.weights.load_checkpoint`: names of :func:`weights_only`, names and
    addresses of released weights, and safetensors files."""
    # MMEngine takes the beginning of a path for a regular expression.
    addresses = [re.escape(entry.file) for entry in released.NAMED.values() if not entry.packaged]
    CheckpointLoader.register_scheme([WEIGHTS_ONLY, SCHEME, rf'.*\{SUFFIX}$', *addresses], load_from_weights_only,
                                     force=True)


def weights_only(path: str) -> str:
    """Return the name under which MMEngine loads a file or http(s) URL by :func:`mmlocalmamba.weights.load_checkpoint`.

    Both stacks load URLs without weights_only, and OneDL's loader tries again without it when a file was refused.
    Neither names the file in its errors. Paths of other schemes are returned as they are.
    """
    path = str(path)
    if path.startswith(WEIGHTS_ONLY) or '://' in path and not path.startswith(('http://', 'https://', SCHEME)):
        return path
    register_loader()
    return f'{WEIGHTS_ONLY}{path}'
