"""Run torchrun for jobs that may be preempted, with an exit code that asks to start again.

    python tools/launch.py --nproc-per-node 8 tools/train.py CONFIG --launcher pytorch --resume

The script takes all arguments of torchrun. It forwards SIGTERM and SIGUSR1 to the training, which finishes its
iteration and writes a checkpoint. The training has as long as it needs, and not torchrun's 30 s. Exit code 75
(EX_TEMPFAIL) means that the training was preempted: start the same command again. Other codes are the training's or
torchrun's.
"""
import os
import signal
import sys
import time
from pathlib import Path

import cluster

# This is mmlocalmamba.openmmlab.engine.EXIT_PREEMPTED, whose import would take seconds.
EXIT_PREEMPTED = 75
# The time that the other processes have after one has failed.
GRACE_SECONDS = 30


def trainings():
    """Return the processes that torchrun has started. Each leads a session."""
    children = [pid for task in Path('/proc/self/task').glob('*/children') for pid in task.read_text().split()]
    return [pid for pid in map(int, children) if os.getsid(pid) == pid]


def exit_codes(pids):
    """Wait until processes end and return their exit codes. torchrun reaps them."""
    codes, deadline = {}, float('inf')
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if end is not None:
                codes[pid] = end.si_status if end.si_code == os.CLD_EXITED else 128 + end.si_status
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return list(codes.values())


def pass_on(number, frame):
    """Forward a signal to the training. Without a training nothing is lost, so ask to start again."""
    pids = trainings()
    for pid in pids:
        os.kill(pid, number)
    codes = exit_codes(pids)
    # A process exits with this code only after all have agreed and the checkpoint is written.
    sys.exit(EXIT_PREEMPTED if EXIT_PREEMPTED in codes or not codes else max(codes))


def main():
    if len(sys.argv) == 1 or sys.argv[1] in ('-h', '--help'):
        print(__doc__)
    for number in {signal.SIGTERM, getattr(signal, 'SIGUSR1', signal.SIGTERM)}:  # Windows has no SIGUSR1
        signal.signal(number, pass_on)
    sys.argv[1:1] = ['--signals-to-handle', 'SIGINT,SIGHUP,SIGQUIT']  # SIGTERM is handled here
    # With a shared store, which outlives the processes, restarted processes would read the addresses of those that
    # died: https://github.com/pytorch/pytorch/issues/135712
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    from torch.distributed import run  # after the handlers, because this import takes seconds
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    args = run.parse_args(sys.argv[1:])
    cluster.prepare(args)
    try:
        record(run.run)(args)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        # torchrun then ends the others, which may exit with this code, too, if they had not begun to train.
        if error.get_first_failure()[1].exitcode == EXIT_PREEMPTED:
            sys.exit(EXIT_PREEMPTED)
        raise


if __name__ == '__main__':
    main()
