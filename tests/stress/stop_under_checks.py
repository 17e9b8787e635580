"""Stop a detector's training at random moments under an allocator or a sanitizer that checks memory.

    LD_PRELOAD=libc_malloc_debug.so.0 MALLOC_CHECK_=3 MALLOC_PERTURB_=165 python tests/stress/stop_under_checks.py
    LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libstdc++.so.6)" \\
        ASAN_OPTIONS=detect_leaks=0 python tests/stress/stop_under_checks.py

Each run is a training with workers and a validation after every second epoch. SIGTERM stops it several times, and
--resume continues it each time. The script prints how each process ended. It exits with 1 at the first message of a
sanitizer or of glibc about memory, or at an exit code that a stopped training does not have.
"""
import argparse
import random
import re
import shutil
import signal
import sys
from pathlib import Path

from soak import Job

import mmlocalmamba
from mmlocalmamba.openmmlab.engine import EXIT_PREEMPTED

FOUND = re.compile(r'AddressSanitizer|corrupted size|corrupted double|free\(\): |malloc\(\): |realloc\(\): |'
                   r'double free|Segmentation fault|SIGSEGV|SIGABRT|stack smashing|munmap_chunk|memory clobbered')


def problem(code, output, lives_left):
    """Return the problem of a process, or None."""
    if line := next((line for line in output.splitlines() if FOUND.search(line)), None):
        return line
    # Before the handlers are installed, a signal ends the process like any other.
    if code not in (0, EXIT_PREEMPTED, -signal.SIGTERM):
        return f'exit code {code}'
    if code and not lives_left:
        return f'exit code {code} of a training that was not told to stop'
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='an epoch-based configuration of the digits (default: detection)',
                        default=mmlocalmamba.config_path('mask-rcnn_localvmamba-nano_digits'))
    parser.add_argument('--runs', type=int, default=10, help='trainings (default: 10)')
    parser.add_argument('--stops', type=int, default=2, help='signals to each training (default: 2)')
    parser.add_argument('--epochs', type=int, default=4, help='epochs of each training, of 10 iterations (default: 4)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the moments (default: 0)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/stop_under_checks'), help='emptied first')
    parser.set_defaults(processes=1)
    args = parser.parse_args()
    shutil.rmtree(args.work_dir, ignore_errors=True)
    config, generator = Path(args.config).resolve(), random.Random(args.seed)

    longest = 0.  # processor seconds of a whole training; moments are drawn from them
    for run in range(args.runs + 1):  # the first training is not stopped
        job = Job(config, args.work_dir.resolve() / f'run{run}', args.epochs, args.epochs, args)
        job.command += ['train_cfg.val_interval=2', 'val_dataloader.dataset.indices=20']
        stops, seen = args.stops if run else 0, 0
        for life in range(stops, -1, -1):
            moment = generator.uniform(0, longest) if life else float('inf')
            code, seconds, left = job.life('SIGTERM', moment, patience=600.)
            output = job.log.read_text(errors='replace')
            wrong = problem(code, output[seen:], life)
            seen = len(output)
            print(f'run {run}: {"stopped at" if life else "to the end"} {moment:6.1f} s, {seconds:5.1f} s, exit {code}'
                  f'{f", left after {left:.1f} s" if left else ""}', flush=True)
            if wrong:
                sys.exit(f'{wrong}: {job.log}')
            if code == 0:
                break
        longest = longest or job.used
    print(f'{args.runs} trainings, no problem')


if __name__ == '__main__':
    main()
