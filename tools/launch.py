"""torchrun for jobs that may be preempted: all its arguments, and an exit code that says whether to try again.

    python tools/launch.py --nproc-per-node 8 tools/train.py CONFIG --launcher pytorch --resume

SIGTERM and SIGUSR1 go on to the training, which finishes an iteration and writes its checkpoint; it has as long as it
needs, not torchrun's 30 s. Exit code 75 (EX_TEMPFAIL): the training left with it, start the same command again. Others
are the training's or torchrun's.
"""
import os
import signal
import sys
import time
from pathlib import Path

import cluster

# As mmlocalmamba.engine.EXIT_PREEMPTED, whose import would take seconds.
EXIT_PREEMPTED = 75
# For the other processes, once one has failed.
GRACE_SECONDS = 30


def trainings():
    """Processes that torchrun has started: each leads a session."""
    children = [pid for task in Path('/proc/self/task').glob('*/children') for pid in task.read_text().split()]
    return [pid for pid in map(int, children) if os.getsid(pid) == pid]


def exit_codes(pids):
    """Wait for their end, and leave it to torchrun to reap them."""
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
    """A signal. Before there is a training, nothing is lost: start again."""
    pids = trainings()
    for pid in pids:
        os.kill(pid, number)
    codes = exit_codes(pids)
    # One process alone leaves with this code only after all have agreed, and the checkpoint is there.
    sys.exit(EXIT_PREEMPTED if EXIT_PREEMPTED in codes or not codes else max(codes))


def main():
    if len(sys.argv) == 1 or sys.argv[1] in ('-h', '--help'):
        print(__doc__)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    sys.argv[1:1] = ['--signals-to-handle', 'SIGINT,SIGHUP,SIGQUIT']  # SIGTERM is ours
    # Or the processes find each other through a store that outlives them, and after a restart read the addresses of
    # those that died: https://github.com/pytorch/pytorch/issues/135712
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    from torch.distributed import run  # after the handlers, since it takes seconds
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    args = run.parse_args(sys.argv[1:])
    cluster.prepare(args)
    try:
        record(run.run)(args)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        if any(failure.exitcode == EXIT_PREEMPTED for failure in error.failures.values()):
            sys.exit(EXIT_PREEMPTED)
        raise


if __name__ == '__main__':
    main()
