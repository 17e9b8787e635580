"""SIGTERM and SIGUSR1: noted, shared between processes, and kept from the workers of dataloaders."""
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine import dist
from mmengine.logging import print_log

# "Temporary failure, try again" of sysexits.h, which batch systems take as: requeue. os.EX_TEMPFAIL where there is one.
EXIT_PREEMPTED = 75
# Windows has one of them.
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name))


class Preemption:
    """Notes the signals that ask a training to leave, while the ``with`` block runs, and then restores the handlers.

    Args:
        enabled: False leaves signals alone.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.signal: int | None = None
        self.group: Any = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> 'Preemption':
        if not self.enabled:
            return self
        if threading.current_thread() is not threading.main_thread():
            print_log('the training does not run in the main thread, so it does not notice signals', logger='current',
                      level=logging.WARNING)
            self.enabled = False
            return self
        if dist.is_distributed():
            # On the CPU: NCCL would wait for the GPU in every iteration.
            self.group = torch.distributed.new_group(backend='gloo')
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def requested(self) -> bool:
        """Whether any process was signalled: the same on all, which all must ask at the same time."""
        return bool(self.reduce(self.signal is not None, torch.distributed.ReduceOp.MAX))

    def reduce(self, value: int, operation: Any) -> int:
        """A number of all processes, through the CPU."""
        if self.group is None:
            return value
        shared = torch.tensor(int(value))
        torch.distributed.all_reduce(shared, operation, self.group)
        return int(shared)

    def wait(self) -> None:
        """Until all processes have come here: a launcher ends them all once the first has gone."""
        if self.group is not None:
            torch.distributed.barrier(self.group)


# ---- workers of dataloaders ----

@contextmanager
def signals_held() -> Iterator[None]:
    """Signals wait. Workers that start meanwhile inherit that, until each has shielded itself."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _obey_parent_alone() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def shield_worker(init: Any, worker: int) -> None:
    """A ``worker_init_fn`` around another: the worker ends when the training says so, and not when a scheduler does.

    Schedulers signal all processes of a job. A worker that obeys breaks the training, which has yet to finish its
    iteration.
    """
    if init is not None:
        init(worker)
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent_alone, daemon=True).start()
