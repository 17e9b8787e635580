"""Files that are written whole or not at all."""
import errno
import os
from collections.abc import Callable
from typing import BinaryIO

# What file systems say that cannot sync, folders above all, and Windows of any folder. A disk that fails says EIO.
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
    """Write a file so that a reader, and a crash at any moment, finds the old one or the new one.

    Args:
        path: its folder is made if it does not exist.
        content: text, bytes, or a function that writes to the open binary file.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    beside = f'{path}.{os.getpid()}.tmp'
    try:
        with open(beside, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        _sync(beside)
        os.replace(beside, path)
        _sync(os.path.dirname(os.path.abspath(path)))  # the new name, too, before anybody removes an older file
    finally:
        if os.path.exists(beside):
            os.remove(beside)
