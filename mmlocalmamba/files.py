"""Files that are written whole or not at all."""
import os
from collections.abc import Callable
from typing import BinaryIO


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
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, is on the disk before anybody removes an older file
        finally:
            os.close(folder)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
