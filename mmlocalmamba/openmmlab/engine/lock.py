"""One training at a time in a work directory.

``training.lock`` names the training that owns the directory: host, process, start of the process. Its modification time
is a sign of life. Nothing here needs locks of the file system, or clocks that agree.
"""
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

LOCK_FILE = 'training.lock'
# Seconds between two signs of life; without a sign after which an owner on another host counts as dead; that a training
# waits for a living owner to leave; and before a taken lock is read again.
BEAT, SILENCE, PATIENCE, SETTLE = 10., 60., 300., 0.2


@cache
def _host() -> str:
    """Return the scope in which a process number is unique: the host, its boot and its container. '' if unknown."""
    try:
        return ' '.join([socket.gethostname(), Path('/proc/sys/kernel/random/boot_id').read_text().strip(),
                         os.readlink('/proc/self/ns/pid')])
    except OSError:
        return ''


def _start_of(pid: int) -> str | None:
    """Return when a process of this host started, in ticks since the boot; None if it does not run."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return None if fields[0] in 'ZX' else fields[19]


class WorkDirLock:
    """The right of one training to write into a work directory.

    A dead owner loses the lock: on the same host, when its process has ended; on another host or in another container,
    when the lock shows no sign of life for :data:`SILENCE` seconds. A lock that was copied with its directory has no
    owner. An earlier training of the same process has ended.

    Args:
        folder: the work directory.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, LOCK_FILE)
        self.note: dict[str, Any] = dict(host=_host(), name=socket.gethostname(), pid=os.getpid(),
                                         start=_start_of(os.getpid()), since=time.strftime('%Y-%m-%d %H:%M:%S'),
                                         token=uuid.uuid4().hex)
        self._seen: tuple[Any, float] = None, 0.
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock. Wait up to :data:`PATIENCE` seconds for a living owner.

        Raises:
            RuntimeError: if the owner still lives then. The message names it.
        """
        deadline, told = time.monotonic() + PATIENCE, False
        while True:
            note = self._read()
            if note is None or self._is_dead(note):
                if self._claim(note):
                    break
                continue
            if not told:
                print_log(f'waiting up to {PATIENCE:.0f} s: {self._owner(note)}', logger='current',
                          level=logging.WARNING)
                told = True
            if time.monotonic() > deadline:
                raise RuntimeError(f'{self._owner(note)}. Choose another --work-dir, or wait until it has ended. If no '
                                   f'such training runs, remove {self.path}')
            time.sleep(min(1., PATIENCE / 10))
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Make sure that no other training has taken the lock, as after a long standstill of this process.

        Raises:
            RuntimeError: if another training has it.
        """
        note = self._read()
        if note is None:  # removed by hand
            self._claim()
            note = self._read() or self.note
        if note.get('token') != self.note['token']:
            raise RuntimeError(f'{self._owner(note)}. It took the work directory from this training, which stops and '
                               'writes nothing more')

    def release(self) -> None:
        """Give the lock back. Does nothing if another training has it."""
        self._released.set()
        if self._is_mine():
            with suppress(OSError):
                os.unlink(self.path)

    def _owner(self, note: dict) -> str:
        return (f'{os.path.dirname(self.path)} belongs to another training, process {note.get("pid", "?")} on '
                f'{note.get("name", "an unknown host")}, since {note.get("since", "?")}')

    def _read(self) -> dict | None:
        """Return the owner's note with its sign of life, and whether it was copied here; None if there is none."""
        try:
            with open(self.path, encoding='utf-8', errors='replace') as file:  # on NFS, open() asks the server
                text, info = file.read(), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        try:
            note = dict(json.loads(text))
        except (ValueError, TypeError):
            note = {}
        return {**note, 'beat': info.st_mtime_ns, 'copied': note.get('inode', info.st_ino) != info.st_ino}

    def _is_mine(self) -> bool:
        return (self._read() or {}).get('token') == self.note['token']

    def _is_dead(self, note: dict) -> bool:
        if note['copied'] or all(note.get(name) == self.note[name] for name in ('host', 'name', 'pid', 'start')):
            return True  # a copy, or an earlier training of this process
        if note.get('host') and note['host'] == self.note['host']:
            return _start_of(note['pid']) != note['start']
        sign = note.get('token'), note['beat']
        if sign != self._seen[0]:
            self._seen = sign, time.monotonic()
        return time.monotonic() - self._seen[1] > SILENCE

    def _claim(self, dead: dict | None = None) -> bool:
        """Create the lock, or replace that of a dead owner. Return False if another training was quicker."""
        temporary = f'{self.path}.{self.note["token"]}.tmp'
        try:
            with open(temporary, 'w', encoding='utf-8') as file:
                json.dump(dict(self.note, inode=os.fstat(file.fileno()).st_ino), file)
            if dead is not None and (self._read() or {}).get('token') != dead.get('token'):
                return False
            if dead is not None or not self._link(temporary):
                os.replace(temporary, self.path)
                time.sleep(SETTLE)  # another training may do the same at this moment
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        return self._is_mine()

    def _link(self, temporary: str) -> bool:
        """Create the lock unless it exists. Return False if the file system has no hard links."""
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            pass
        except OSError:
            return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):
                if self._is_mine():
                    os.utime(self.path)
