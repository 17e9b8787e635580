"""Checkpoints are read without executing code; files are written whole or not at all.

Readable are files of ``torch.save``, safetensors files, their http(s) URLs, and ``mmlocalmamba://NAME`` for the weights
that come with the package. A safetensors file of this package holds one state dict and, as JSON in its header, the
state dict's own metadata (scan directions and the like) and the checkpoint's ``meta`` (class names). It is small:
matrices have 16 bits. URLs are downloaded once, into torch's hub cache.
"""
import difflib
import errno
import json
import logging
import os
import shutil
import ssl
import threading
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

# torch and safetensors are imported by the functions that need them, so that a tool which only writes a file starts at
# once.

_LOGGER = logging.getLogger(__name__)
SCHEME = 'mmlocalmamba://'
SUFFIX = '.safetensors'
_ADDRESSES = ('http://', 'https://', 'file://')
_PACKAGED = Path(__file__).parent / 'weights' / 'packaged'
_HEADER = 'mmlocalmamba'  # key in the header of a safetensors file
_TIMEOUT = 60  # seconds that a server may be silent
_CHUNK = 1 << 20  # bytes

# ---- writing ----

# Errors of file systems that cannot sync, folders above all, and of Windows for any folder. A failing disk reports EIO.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF,
                errno.EISDIR)


def _sync(path: str) -> None:
    try:
        file = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def write_whole(path: str, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, and a crash at any moment, finds either the old file or the new one.

    Args:
        path: its folder is created if it does not exist.
        content: text, bytes, or a function that writes to the open binary file.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(os.path.dirname(os.path.abspath(path)))  # the new name is on disk before anybody removes an older file
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---- names of packaged weights ----


def packaged_names() -> list[str]:
    """Names that can follow ``mmlocalmamba://``: those of configurations whose weights come with the package."""
    return sorted(path.stem for path in _PACKAGED.glob(f'*{SUFFIX}'))


def meant(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'X'? `` for the known name that is most similar to a misspelt one, or ''."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f'did you mean {found[0]!r}? ' if found else ''


def locate(path: str) -> str:
    """Return the file that a path or ``mmlocalmamba://NAME`` means.

    Raises:
        FileNotFoundError: the package has no weights of that name.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME)
    if name not in packaged_names():
        raise FileNotFoundError(2, f'{meant(name, packaged_names())}no weights of this name come with the package; it '
                                f'has {", ".join(packaged_names())}', path)
    return str(_PACKAGED / f'{name}{SUFFIX}')


# ---- downloads ----


class _NotTheFile(Exception):
    """What a server sends is not the file."""


def cached(url: str) -> str:
    """Return the path in torch's hub cache at which :func:`fetch`, as torch.hub, keeps the file of a URL."""
    from torch.hub import get_dir
    return os.path.join(get_dir(), 'checkpoints', os.path.basename(urlsplit(url).path))


def _too_small(size: int, least: int) -> str:
    return f'has {size:,} bytes, but the weights alone are {least:,}'


def _receive(answer: Any, least: int, folder: str, file: BinaryIO) -> None:
    """Write the body of a server's answer to an open file."""
    length = answer.headers.get('Content-Length')
    expected = int(length) if length and not answer.headers.get('Content-Encoding') else None
    chunk = answer.read(_CHUNK)
    if answer.headers.get_content_type() == 'text/html' or chunk.lstrip()[:1] == b'<':
        raise _NotTheFile('the answer is a web page, not a file')
    if expected is not None and expected < least:
        raise _NotTheFile(f'the file {_too_small(expected, least)}')
    if expected is not None and expected > (free := shutil.disk_usage(folder).free):
        raise OSError(errno.ENOSPC, f'{expected:,} bytes are needed, {free:,} are free')
    received = 0
    while chunk:
        file.write(chunk)
        received += len(chunk)
        chunk = answer.read(_CHUNK)
    if expected is not None and received != expected:
        raise _NotTheFile(f'the download ended after {received:,} of {expected:,} bytes')
    if received < least:
        raise _NotTheFile(f'the file {_too_small(received, least)}')


def fetch(url: str, least: int = 0) -> str:
    """Return the file of a URL: from torch's hub cache, or downloaded into it, whole or not at all.

    Args:
        url: http(s) URL.
        least: number of bytes that the file has at least.

    Raises:
        RuntimeError: there is no network, the server sends a page or a file of another size, the download is
            interrupted, or the file cannot be written. The message names the remedy.
    """
    path = cached(url)
    if os.path.isfile(path):
        if os.path.getsize(path) < least:
            raise RuntimeError(f'{path} {_too_small(os.path.getsize(path), least)}: remove it, and it is downloaded '
                               f'again from {url}')
        return path
    folder = os.path.dirname(path)
    by_hand = f'download {url} by other means and save it as {path}'
    try:
        os.makedirs(folder, exist_ok=True)
        with urlopen(Request(url, headers={'User-Agent': 'mmlocalmamba'}), timeout=_TIMEOUT) as answer:
            _LOGGER.info('downloading %s to %s', url, path)
            write_whole(path, lambda file: _receive(answer, least, folder, file))
    except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError, ValueError) as error:
        raise RuntimeError(f'{url} was not fetched ({type(error).__name__}: {error}). Check the address and the '
                           f'network, or {by_hand}') from error
    except _NotTheFile as error:
        raise RuntimeError(f'{url} was not fetched: {error}. Try again, or {by_hand}') from None
    except OSError as error:
        raise RuntimeError(f'{url} was not saved in {folder} ({error}). Free space there, or set TORCH_HOME to another '
                           'folder') from error
    return path


# ---- safetensors ----


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise RuntimeError('weights in safetensors files need their package: pip install safetensors') from error
    return safetensors


def save_safetensors(path: str, state_dict: Any, meta: dict[str, Any] | None = None) -> None:
    """Write weights whole or not at all: float32 matrices as float16, everything else unchanged.

    Args:
        path: file to write.
        state_dict: with its ``_metadata``, if it has any.
        meta: values that JSON can hold, such as MMEngine's ``dataset_meta``.

    Raises:
        ValueError: a value is too large for 16 bits, or is not finite.
        RuntimeError: safetensors is not installed.
    """
    import torch

    package = _safetensors()
    tensors = {}
    for name, value in state_dict.items():
        value = value.detach().cpu()
        stored = value.to(torch.float16) if value.dtype == torch.float32 and value.ndim > 1 else value
        if stored.is_floating_point() and not stored.isfinite().all():
            raise ValueError(f'{name}: its largest value, {value.abs().max():.4g}, does not fit into {stored.dtype}')
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)  # safetensors refuses shared memory
    header = dict(meta=meta or {}, metadata=getattr(state_dict, '_metadata', {}))
    write_whole(path, package.torch.save(tensors, metadata={'format': 'pt', _HEADER: json.dumps(header)}))


def load_safetensors(path: str, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a safetensors file or ``mmlocalmamba://NAME``.

    Files of other programs can be read, too; their metadata are empty.

    Returns:
        ``dict(state_dict=..., meta=...)``. float16 weights become float32.

    Raises:
        FileNotFoundError: there is no such file or name.
        RuntimeError: the file is damaged, or safetensors is not installed.
    """
    import torch

    package = _safetensors()
    try:
        with package.safe_open(locate(path), framework='pt') as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, '{}'))
            weights = OrderedDict((name, file.get_tensor(name)) for name in file.keys())
    except (package.SafetensorError, ValueError) as error:
        raise RuntimeError(f'{path} was not loaded: it is damaged, or no safetensors file ({error})') from error
    for name, value in weights.items():
        value = value.float() if value.dtype == torch.float16 else value
        weights[name] = value if map_location is None else value.to(map_location)
    weights._metadata = OrderedDict(header.get('metadata', {}))  # type: ignore[attr-defined]
    meta = header.get('meta', {})
    if 'classes' in meta.get('dataset_meta', {}):
        meta['dataset_meta']['classes'] = tuple(meta['dataset_meta']['classes'])  # as data sets have it
    return dict(state_dict=weights, meta=meta)


# ---- checkpoints of torch.save ----


class _History:
    """Stand in for MMEngine's HistoryBuffer in pickles: it keeps the fields and has no methods."""


def _getattr_of_history(owner: Any, name: str) -> Any:
    """Stand in for getattr in pickles: HistoryBuffer stores its statistics methods through it."""
    if owner is _History:
        return name
    raise RuntimeError(f'a checkpoint asks for attribute {name!r} of {owner!r}: refused')


class _PlainDict:
    """Stand in for yacs' configuration in pickles: a dictionary without methods of its own."""

    def __new__(cls) -> Any:
        return OrderedDict()


# Callables that pickles may name beside those of tensors and numpy's arrays: name -> callable used in its place.
_REPLACED: dict[str, Callable] = {'yacs.config.CfgNode': _PlainDict,
                                  'mmengine.logging.history_buffer.HistoryBuffer': _History,
                                  'builtins.getattr': _getattr_of_history}


def replace_in_pickles(**callables: Callable) -> None:
    """Let checkpoints name further callables, or others than before. Each is called with what the file says.

    Args:
        callables: by the dotted name that the file holds: ``**{'package.module.Class': Class}``.
    """
    _REPLACED.update(callables)


def _harmless_globals() -> list:
    import numpy as np
    core = np._core if hasattr(np, '_core') else np.core
    # numpy pickles a scalar with the class of its dtype; the module was renamed in numpy 2.
    return [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, Namespace,
            (core.multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
            (core.multiarray.scalar, 'numpy.core.multiarray.scalar'),
            *(type(np.dtype(kind)) for kind in ('float64', 'float32', 'float16', 'int64', 'int32', 'bool')),
            *((function, name) for name, function in _REPLACED.items())]


_allowing = ExitStack()  # takes away again what torch allows
_users, _users_lock = 0, threading.Lock()


@contextmanager
def allow_checkpoints() -> Iterator[None]:
    """A context in which ``torch.load(weights_only=True)`` reads the files of MMEngine, Vim and VMamba.

    MMEngine's message hub holds HistoryBuffers of numpy scalars, Vim's files hold an argparse.Namespace, VMamba's a
    yacs configuration. Only these are allowed, and a getattr that serves HistoryBuffer alone. torch has one list for
    all threads: when the last one leaves the context, the process allows what it allowed before. Where
    :mod:`mmlocalmamba.openmmlab` is imported, HistoryBuffers are MMEngine's; elsewhere a stand-in holds their fields.
    """
    import torch

    global _users
    with _users_lock:
        if not _users:
            known = torch.serialization.get_safe_globals()
            _allowing.enter_context(torch.serialization.safe_globals(
                [item for item in _harmless_globals() if item not in known]))
        _users += 1
    try:
        yield
    finally:
        with _users_lock:
            _users -= 1
            if not _users:
                _allowing.close()


def of_the_same_ending(file: str) -> list[str]:
    """Return the names of the folder's files that end as a file does, which need not exist."""
    ending = os.path.splitext(file)[1]
    try:
        return sorted(name for name in os.listdir(os.path.dirname(file) or '.') if ending and name.endswith(ending))
    except OSError:
        return []


def load_checkpoint(path: str, map_location: Any = 'cpu', least: int = 0) -> Any:
    """Load a checkpoint from a file, an http(s) URL or ``mmlocalmamba://NAME``. No code in it is executed.

    :func:`mmlocalmamba.weights.load_checkpoint` also knows the names of weights that others have released.

    Args:
        path: file, URL or name of packaged weights.
        map_location: as for torch.load.
        least: as for :func:`fetch`.

    Raises:
        RuntimeError: the file needs code to be executed, is not a checkpoint, or was not fetched.
        FileNotFoundError: there is no such file or name.
    """
    import torch

    path = str(path)
    if '://' in path and not path.startswith((SCHEME, *_ADDRESSES)):
        raise RuntimeError(f'{path} was not loaded: addresses begin with {", ".join(_ADDRESSES)} or {SCHEME}. For '
                           "weights of MMEngine's model zoo, download the file and name it")
    file = path if path.startswith(SCHEME) else fetch(path, least) if '://' in path else os.path.expanduser(path)
    if not file.startswith(SCHEME) and not os.path.exists(file):
        names = of_the_same_ending(file)
        beside = f'; its folder has {", ".join(names[:8])}' if names else ''
        raise FileNotFoundError(errno.ENOENT, f'No such file or directory{beside}', file)
    if file.startswith(SCHEME) or file.endswith(SUFFIX):
        return load_safetensors(file, map_location)
    try:
        with allow_checkpoints():
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler stumbles over
        if isinstance(error, OSError) and error.filename is not None:
            raise  # no such file, no permission: the error names the file
        again = f' If it is damaged, remove {file} and it is downloaded again.' if '://' in path else ''
        raise RuntimeError(f'{path} was not loaded: it is not a plain checkpoint of tensors and numbers, or it is '
                           f'damaged. Files that execute code are refused.{again} ({error})') from error
