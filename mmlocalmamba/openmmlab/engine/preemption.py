"""Handle SIGTERM and SIGUSR1 from the start of ``tools/train.py`` to its end.

While the script starts, and after a training that can be preempted, they exit with 75; the script sets that handler
before its imports. A training that can be preempted records them by :class:`Preemption`. In any other training they do
what they did before the script, by :class:`StartUpHook`. Workers of dataloaders are shielded from them.
"""
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log

# EX_TEMPFAIL ("temporary failure") of sysexits.h, by which batch systems requeue a job. Windows lacks os.EX_TEMPFAIL.
EXIT_PREEMPTED = 75
# Windows has only SIGTERM.
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name))


class Preemption:
    """Context manager that records SIGTERM and SIGUSR1, and restores the previous handlers at its end.

    Args:
        enabled: False does not handle the signals.

    Attributes:
        signal: number of the last signal, or None.
        group: gloo process group, if there are several processes.
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
            print_log('the training does not run in the main thread, so it cannot be preempted by signals',
                      logger='current', level=logging.WARNING)
            self.enabled = False
            return self
        if dist.is_distributed():
            # gloo exchanges on the CPU; NCCL would wait for the GPU in every iteration.
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
        """Return True if any process was signalled. All processes must call it at the same point."""
        return bool(self.reduce(self.signal is not None, torch.distributed.ReduceOp.MAX))

    def reduce(self, value: int, operation: Any) -> int:
        """Reduce an integer over all processes with a ``torch.distributed.ReduceOp``, on the CPU."""
        if self.group is None:
            return value
        shared = torch.tensor(int(value))
        torch.distributed.all_reduce(shared, operation, self.group)
        return int(shared)

    def wait(self) -> None:
        """Wait until all processes call it, because a launcher ends all of them after the first has exited."""
        if self.group is not None:
            torch.distributed.barrier(self.group)


class StartUpHook(Hook):
    """Restore the handlers of the signals when a training begins that does not handle them itself.

    Without it, such a training would exit with 75 and no checkpoint, and a scheduler would start it again for ever.

    Args:
        previous: number of a signal -> its handler before the start. The present handlers are those of the start.
    """

    priority = 'HIGHEST'

    def __init__(self, previous: Mapping[int, Any]) -> None:
        self.previous = previous
        self.start_up = {number: signal.getsignal(number) for number in previous}

    def before_train(self, runner: Any) -> None:
        for number, handler in self.previous.items():
            if signal.getsignal(number) is self.start_up[number]:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


# ---- workers of dataloaders ----

@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block SIGTERM and SIGUSR1. Workers started meanwhile inherit the block until they shield themselves."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _exit_on_parent_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def shield_worker(init: Any, worker: int) -> None:
    """Initialise a dataloader worker so that only its parent's SIGTERM ends it.

    Schedulers signal all processes of a job. A worker that exited would break the training, which still finishes its
    iteration.

    Args:
        init: wrapped ``worker_init_fn``, or None.
        worker: number of the worker.
    """
    if init is not None:
        init(worker)
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_signal, daemon=True).start()
