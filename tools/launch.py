"""torchrun for jobs that may be preempted: all its arguments, and an exit code that says whether to try again.

    python tools/launch.py --nproc-per-node 8 tools/train.py CONFIG --launcher pytorch --resume

SIGTERM and SIGUSR1 go on to the training, which then has 30 s (torchrun's limit) to finish an iteration and write its
checkpoint. Exit code 75 (EX_TEMPFAIL): preempted, start the same command again. Others are torchrun's.
"""
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# As mmlocalmamba.engine.EXIT_PREEMPTED, whose import would take seconds.
EXIT_PREEMPTED = os.EX_TEMPFAIL


def main():
    if len(sys.argv) == 1 or sys.argv[1] in ('-h', '--help'):
        print(__doc__)
    # Or the processes find each other through a store that outlives them, and after a restart read the addresses of
    # those that died: https://github.com/pytorch/pytorch/issues/135712
    os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    # torchrun itself would die of this one.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run.main()
    except SignalException as error:
        sys.exit(EXIT_PREEMPTED if error.sigval == signal.SIGTERM else 128 + error.sigval)
    except ChildFailedError as error:
        if any(failure.exitcode == EXIT_PREEMPTED for failure in error.failures.values()):
            sys.exit(EXIT_PREEMPTED)
        raise


if __name__ == '__main__':
    main()
