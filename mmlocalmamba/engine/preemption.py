"""SIGTERM and SIGUSR1: a checkpoint, and an exit code that says so."""
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log

from mmlocalmamba.engine.checkpoints import PREEMPTED_FILE
from mmlocalmamba.engine.loops import end_workers, loaders_of, need_exact_resumption
from mmlocalmamba.files import write_whole
from mmlocalmamba.registry import HOOKS

# "Temporary failure, try again" of sysexits.h: 75. Batch systems take it as: requeue.
EXIT_PREEMPTED = os.EX_TEMPFAIL


def _obey_parent_alone() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _shield_worker(init: Any, worker: int) -> None:
    """Schedulers signal all processes of a job. A dataloader's worker that obeys breaks the training, which has yet to
    finish its iteration; only the training may end it."""
    if init is not None:
        init(worker)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent_alone, daemon=True).start()


def _start_shielded(start: Callable[[], Any]) -> Any:
    """Start workers with signals blocked, until each has shielded itself. Those to the training wait meanwhile."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, PreemptionHook.SIGNALS)
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """SIGTERM or SIGUSR1: finish the iteration, write a checkpoint, leave with exit code 75 (EX_TEMPFAIL).

    ``preempted.pth`` in the work directory is the checkpoint, and what ``resume`` takes next. If any process was
    signalled, all leave after the same iteration. With gradient accumulation they leave after the next step of the
    optimizer; a validation that is due, or has begun, is finished first; a training that ends meanwhile leaves with 0.

    Raises:
        ValueError: before training, if there is no ExactResumeHook: data of the epoch would be repeated.
    """

    priority = 'HIGHEST'  # before other hooks begin with the next iteration

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}
        self.group: Any = None

    def before_train(self, runner: Any) -> None:
        need_exact_resumption(runner, self, 'or a resumed epoch would start again')
        if threading.current_thread() is not threading.main_thread():
            print_log('PreemptionHook: the training does not run in the main thread, so signals are not caught',
                      logger='current', level=logging.WARNING)
            return
        if dist.is_distributed():
            # On the CPU: NCCL would wait for the GPU in every iteration.
            self.group = torch.distributed.new_group(backend='gloo')
        for loader in loaders_of(runner):
            loader.worker_init_fn = partial(_shield_worker, loader.worker_init_fn)
            loader._get_iterator = partial(_start_shielded, loader._get_iterator)
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        # Not where the last iteration ends: what follows it, a validation or the end of the epoch, would be lost.
        if self._signalled() and runner.optim_wrapper.should_update():
            self._leave(runner)

    def _leave(self, runner: Any) -> None:
        path = os.path.join(runner.work_dir, PREEMPTED_FILE)
        runner.save_checkpoint(runner.work_dir, PREEMPTED_FILE, by_epoch=False,
                               meta=dict(epoch=runner.epoch, iter=runner.iter),
                               backend_args=dict(backend='whole_files'))
        if dist.is_main_process():
            write_whole(os.path.join(runner.work_dir, 'last_checkpoint'), path)
        if self.group is not None:
            torch.distributed.barrier(self.group)  # a launcher ends all processes once the first has gone
        print_log(f'preempted after iteration {runner.iter}; resume from {path}', logger='current',
                  level=logging.WARNING)
        end_workers(runner)
        self.after_train(runner)
        runner.visualizer.close()
        sys.exit(EXIT_PREEMPTED)

    def _signalled(self) -> bool:
        if self.group is None:
            return self.signal is not None
        flag = torch.tensor(self.signal is not None, dtype=torch.uint8)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self.group)
        return bool(flag)

    def after_train(self, runner: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
