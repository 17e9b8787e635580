"""Interrupt a training at random moments for some time, and compare the result with an uninterrupted training.

    python tests/stress/soak.py --minutes 30
    python tests/stress/soak.py --minutes 30 --processes 2

1. Images of 1,000 sizes go through both backbones. Their caches must stay bounded and the memory must stay flat.
2. A short training measures the time of an epoch and of a validation.
3. The training is interrupted by SIGTERM, SIGUSR1, SIGKILL, SIGKILL while it writes a checkpoint, and SIGTERM and
   SIGKILL in a validation. Each time it is started again with --resume. A process that has not exited some time after a
   signal is killed, as schedulers do; a validation takes longer than that time. When the minutes are over, the current
   epoch becomes the last one.
4. A training of as many epochs runs without interruption, and its memory is sampled.
5. All checkpoints of both trainings must be equal bit for bit: weights, optimizer, schedulers, position in the data,
   and each loss since the first iteration.

The script prints a table, writes WORK_DIR/soak.json, and exits with 1 if a check fails. If a training is too short to
check its memory, the table says so. `make demo` or tools/dataset_converters/digits.py data/digits writes the data.
"""
import argparse
import functools
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine import Config

import mmlocalmamba
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.openmmlab.engine import EXIT_PREEMPTED
from mmlocalmamba.openmmlab.engine.checkpoints import BEFORE_VALIDATION_FILE, PREEMPTED_FILE

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 80  # 10 iterations an epoch, so that there are many checkpoints
VAL_INTERVAL, VAL_IMAGES = 2, 60
SIZES = 1000
# A leak of a few tables per size or iteration is far above this growth, and the allocator's noise is below it.
MAX_GROWTH = 0.05
# {how a life ends: (the signal, the moment it waits for)}; a life is a process of the training.
ENDS = {'SIGTERM': (signal.SIGTERM, None), 'SIGUSR1': (signal.SIGUSR1, None), 'SIGKILL': (signal.SIGKILL, None),
        'SIGKILL while writing': (signal.SIGKILL, 'writing'), 'SIGTERM in a validation': (signal.SIGTERM, 'validation'),
        'SIGKILL in a validation': (signal.SIGKILL, 'validation')}
SAVED, VALIDATED = re.compile(r'Saving checkpoint at (\d+) epochs'), re.compile(r'Epoch\(val\) \[\d+\]\[(\d+)/\1\]')


def rss(pid='self'):
    """Return the resident memory of a process in MB, or 0 if it has ended."""
    try:
        return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
    except OSError:
        return 0.


def processor_seconds(pid):
    """Return the processor time of a process. Moments are counted in it, so they do not depend on a busy machine."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return 0.
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def children(pid):
    try:
        return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []


def growth(samples):
    """Return the growth from the median of the second quarter to that of the last, or None for too few samples."""
    def median(values):
        return sorted(values)[len(values) // 2]

    quarter = len(samples) // 4
    if quarter < 15:
        return None
    return median(samples[-quarter:]) / median(samples[quarter:2 * quarter]) - 1


def percent(growth):
    return 'too few samples' if growth is None else f'{growth:+.1%}'


def flat(growth):
    return None if growth is None else growth <= MAX_GROWTH


# ---- sizes ----

def through_sizes(seed):
    """Run forward and backward passes with SIZES different token grids H x W."""
    generator = random.Random(seed)
    sizes = generator.sample([(H, W) for H in range(1, 65) for W in range(1, 65)], SIZES)
    directions = ['h', 'v_flip', 'w3', 'hilbert']
    backbones = [LocalVMamba(dict(embed_dims=[8, 16], depths=[1, 1], d_state=1), directions=directions, patch_size=1),
                 LocalVim(dict(embed_dims=8, num_layers=1, d_state=1), directions=directions, patch_size=1,
                          img_size=8)]
    caches = [cache for cache in gc.get_objects() if type(cache) is functools._lru_cache_wrapper
              and cache.__module__.startswith('mmlocalmamba')]
    samples = []
    for H, W in sizes:
        for backbone in backbones:
            sum(out.sum() for out in backbone(torch.rand(1, 3, H, W))).backward()
        samples.append(rss())
    info = {f'{cache.__module__}.{cache.__name__}': cache.cache_info() for cache in caches}
    return dict(rss_mb=dict(after_100=samples[99], after_500=samples[499], after_1000=samples[-1]),
                growth=growth(samples),
                caches={name: dict(entries=entry.currsize, limit=entry.maxsize) for name, entry in info.items()},
                # Caches without a limit do not depend on sizes, so they hold few entries.
                bounded=all(entry.currsize <= (entry.maxsize or 8) for entry in info.values()))


# ---- lives of a training ----

class Job:
    """A training in a folder. Each ``life`` is a process."""

    def __init__(self, config, folder, epochs, horizon, args):
        """Set the schedule for ``horizon`` epochs, so that it does not depend on the last epoch."""
        self.folder, self.epochs, self.args = folder, epochs, args
        schedulers = Config.fromfile(config).param_scheduler
        options = [f'train_dataloader.dataset.indices={IMAGES}', f'val_dataloader.dataset.indices={VAL_IMAGES}',
                   f'train_cfg.val_interval={VAL_INTERVAL}', f'randomness.seed={args.seed}',
                   *[f'param_scheduler.{number}.end={horizon}' for number, scheduler in enumerate(schedulers)
                     if 'end' not in scheduler]]
        launcher, several = [], []
        if self.args.processes > 1:
            launcher = [str(ROOT / 'tools/launch.py'), '--standalone', '--nproc-per-node', str(self.args.processes)]
            several = ['--launcher', 'pytorch']
            os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
        self.command = [sys.executable, *launcher, str(ROOT / 'tools' / 'train.py'), str(config), '--work-dir',
                        str(folder), '--resume', *several, '--cfg-options', *options]
        self.log = folder / 'output.txt'
        self.samples, self.worker_samples = [], []
        # Processor seconds of the longest life, and of the first life until its first checkpoint.
        self.used = self.until_checkpoint = 0.
        # Where the log of this life begins, and whether a validation was due at its start.
        self.log_begin, self.due = 0, False

    def trainings(self, process):
        """Return the processes that a launcher has started, or the process itself."""
        return [process.pid] if self.args.processes == 1 else list(map(int, children(process.pid)))

    def kill(self, process):
        """Kill all processes of the training, including workers."""
        for group in {*self.trainings(process), process.pid}:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def life(self, end=None, moment=float('inf'), patience=0., delay=0.):
        """Run the training until it ends or is interrupted.

        Interrupt it after ``moment`` seconds of processor time (in a validation, ``delay`` seconds after its start),
        and kill it ``patience`` seconds later. Return (exit code, seconds, seconds from the signal to the end).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_begin, self.due = self.log.stat().st_size if self.log.exists() else 0, self.validation_due()
        begin = time.monotonic()
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
        with open(self.log, 'ab') as log:
            process = subprocess.Popen([*self.command, f'train_cfg.max_epochs={self.epochs}'], cwd=ROOT, env=env,
                                       stdout=log, stderr=log, start_new_session=True)
        left = None
        try:
            if self._watch(process, moment):
                number, place = ENDS[end]
                if self._catch(process, place, delay):
                    left = time.monotonic()
                    if number == signal.SIGKILL:
                        self.kill(process)
                    else:
                        os.killpg(process.pid, number)
                    try:
                        process.wait(patience)
                    except subprocess.TimeoutExpired:
                        self.kill(process)
            self._watch(process)
        finally:
            now = time.monotonic()
            self.kill(process)
            process.wait()
        return process.returncode, now - begin, left and now - left

    def _watch(self, process, moment=float('inf')):
        """Sample the memory. Return True if the moment comes before the end of the process."""
        while process.poll() is None:
            used = max(map(processor_seconds, self.trainings(process)), default=0.)
            if used >= moment:
                return True
            self.used = max(self.used, used)
            if self.until_checkpoint:
                pids = self.trainings(process)
                self.samples.append(sum(map(rss, pids)))
                self.worker_samples.append(sum(rss(worker) for pid in pids for worker in children(pid)))
            elif (self.folder / 'last_checkpoint').exists():
                self.until_checkpoint = used
            try:
                process.wait(min(1., max(0.01, moment - used)))
            except subprocess.TimeoutExpired:
                pass
        return False

    def _catch(self, process, place, delay):
        """Wait for the place. Return True if the training reaches it before it ends."""
        there = dict(writing=self._writing, validation=self._validating).get(place, lambda: True)
        while process.poll() is None:
            if there():
                time.sleep(delay if place == 'validation' else 0)
                return process.poll() is None
            time.sleep(0.1 if place == 'validation' else 0.002)
        return False

    def _writing(self):
        return any(name.endswith('.tmp') for name in os.listdir(self.folder))

    def _validating(self):
        """Return True if the log of this life shows a validation: a checkpoint is written before each validation."""
        with open(self.log, errors='replace') as log:
            log.seek(self.log_begin)
            lines = log.readlines()
        for line in reversed(lines):
            saved = SAVED.search(line)
            if saved or VALIDATED.search(line):
                return bool(saved) and int(saved[1]) % VAL_INTERVAL == 0
        return self.due

    def last_checkpoint(self):
        record = self.folder / 'last_checkpoint'
        return Path(record.read_text()).name if record.exists() else ''

    def _last(self):
        return torch.load(self.folder / self.last_checkpoint(), weights_only=True) if self.last_checkpoint() else None

    def validation_due(self):
        """Return True if a validation is due at the start of the next life."""
        last = self._last()
        return bool(last and last['loop']['validation_due'])

    def epochs_done(self):
        last = self._last()
        return last['meta']['epoch'] if last else 0

    def validation_seconds(self):
        """Return the seconds of the validations in the log, from the checkpoint before each to its result."""
        found, begun = [], None
        for line in self.log.read_text(errors='replace').splitlines():
            try:
                now = time.mktime(time.strptime(f'2000/{line[:14]}', '%Y/%m/%d %H:%M:%S'))
            except ValueError:
                continue
            if SAVED.search(line):
                begun = now
            elif VALIDATED.search(line) and begun is not None:
                found.append(now - begun)
                begun = None
        return found

    def fail(self, code):
        lines = self.log.read_text(errors='replace').splitlines()[-30:]
        raise SystemExit('\n'.join([*lines, f'the training exited with {code}; its output: {self.log}']))


def undisturbed(job):
    code, seconds, _ = job.life()
    if code:
        job.fail(code)
    return seconds


def interrupted(job, args, cycles, moments, validation):
    """Run lives and interrupt them after ``moments``, in turn, then a last life to the end of its epoch.

    The last life comes when the time is over and there were ``cycles`` interruptions.
    """
    lives, begin, generator = [], time.monotonic(), random.Random(args.seed)
    while True:
        over = time.monotonic() - begin > 60 * args.minutes and len(lives) >= cycles
        if over:
            job.epochs = job.epochs_done() + 1
        end = None if over else list(ENDS)[len(lives) % len(ENDS)]
        moment = float('inf') if over else moments[len(lives) % len(moments)]
        # Some schedulers wait for less time than an iteration takes.
        patience, delay = args.patience * generator.random(), 0.8 * validation * generator.random()
        code, seconds, left = job.life(end, moment, patience, delay)
        lives.append(dict(end=end, moment=None if over else moment, patience=patience, seconds=seconds, exit_code=code,
                          seconds_to_leave=left, last_checkpoint=job.last_checkpoint(),
                          validation_due=job.validation_due()))
        print(f'{len(lives):4}  {end or "-":24} {moment:8.1f} s {seconds:8.1f} s {code:5}  '
              f'{lives[-1]["last_checkpoint"]}{", validation due" if lives[-1]["validation_due"] else ""}', flush=True)
        if code == 0:
            return lives
        # Before the handlers are installed, a signal ends the process like any other.
        if over or code not in (EXIT_PREEMPTED, -ENDS[end][0], -signal.SIGKILL):
            job.fail(code)


# ---- comparison ----

def losses(checkpoint):
    """Return all logged values except times and memory."""
    history = checkpoint['message_hub']['log_scalars']
    return {name: (value['log_history'].tolist(), value['count_history'].tolist()) for name, value in history.items()
            if not name.endswith(('time', 'memory'))}


def differences(first, second, place=''):
    """Return the paths at which two nested structures are not equal bit for bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if torch.equal(first, second) and first.dtype == second.dtype else [place]
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [path for key in first for path in differences(first[key], second[key], f'{place}/{key}')]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [path for i, (a, b) in enumerate(zip(first, second)) for path in differences(a, b, f'{place}/{i}')]
    return [] if first == second else [place]


def compare(first, second):
    """Compare the checkpoints of two folders, without those of the loop. Return (names, differences)."""
    names = [sorted(path.name for path in folder.glob('*.pth')
                    if path.name not in (PREEMPTED_FILE, BEFORE_VALIDATION_FILE))
             for folder in (first, second)]
    if names[0] != names[1]:
        return names[0], [f'{names[0]} and {names[1]}']
    found = []
    for name in names[0]:
        states = []
        for folder in (first, second):
            checkpoint = torch.load(folder / name, weights_only=True)
            state = {key: value for key, value in checkpoint.items() if key not in ('meta', 'message_hub')}
            states.append(dict(state, losses=losses(checkpoint),
                               progress=[checkpoint['meta'][key] for key in ('epoch', 'iter', 'seed')]))
        found += differences(*states, place=name)
    return names[0], found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='an epoch-based configuration of the digits (default: detection)',
                        default=mmlocalmamba.config_path('mask-rcnn_localvmamba-nano_digits'))
    parser.add_argument('--minutes', type=float, default=30., help='minutes of interruptions (default: 30)')
    parser.add_argument('--cycles', type=int,
                        help='least number of interruptions (default: one per 90 s, and one of each kind)')
    parser.add_argument('--life', type=float, default=40.,
                        help='mean seconds of processor time from a start to the signal (default: 40)')
    parser.add_argument('--processes', type=int, default=1, help='processes of the training (default: 1)')
    parser.add_argument('--patience', type=float,
                        help='most seconds between a signal and SIGKILL (default: half of a validation)')
    parser.add_argument('--no-sizes', action='store_true', help='skip the first part')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of the training, the sizes and the moments (default: 0)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/soak'), help='emptied first')
    args = parser.parse_args()
    cycles = max(len(ENDS), round(args.minutes / 1.5)) if args.cycles is None else args.cycles
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # this ends the training, too
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    config, work_dir = Path(args.config).resolve(), args.work_dir.resolve()
    for folder in ('pilot', 'interrupted', 'undisturbed'):
        shutil.rmtree(work_dir / folder, ignore_errors=True)

    sizes = None if args.no_sizes else through_sizes(args.seed)
    if sizes:
        print(f'{SIZES} sizes: {json.dumps(sizes["rss_mb"])} MB, growth {percent(sizes["growth"])}', flush=True)

    pilot = Job(config, work_dir / 'pilot', 2 * VAL_INTERVAL, 2 * VAL_INTERVAL, args)
    undisturbed(pilot)
    validation = min(pilot.validation_seconds())
    if args.patience is None:
        args.patience = validation / 2
    epoch = (pilot.used - pilot.until_checkpoint) / (2 * VAL_INTERVAL - 1)
    # Moments are even quantiles in random order, so that few lives do not take much more time than expected.
    planned = max(cycles, round(60 * args.minutes / args.life))
    moments = [args.life * (0.1 + 1.8 * (number + 0.5) / planned) for number in range(planned)]
    random.Random(args.seed).shuffle(moments)
    horizon = max(VAL_INTERVAL, round(2 * args.life * planned / epoch))  # more epochs than the training reaches
    print(f'start and first epoch {pilot.until_checkpoint:.1f} s, then {epoch:.1f} s an epoch, validation '
          f'{validation:.0f} s\n\nlife  end                          moment    seconds  exit  last checkpoint',
          flush=True)

    job = Job(config, work_dir / 'interrupted', horizon, horizon, args)
    lives = interrupted(job, args, cycles, moments, validation)
    plain = Job(config, work_dir / 'undisturbed', job.epochs, horizon, args)
    seconds = undisturbed(plain)
    names, different = compare(job.folder, plain.folder)

    impatient = sum(life['end'] is not None and ENDS[life['end']][0] != signal.SIGKILL
                    and life['exit_code'] == -signal.SIGKILL for life in lives)
    due = sum(life['validation_due'] for life in lives[:-1])  # a complete training has it, too
    validations = plain.validation_seconds()
    signals = {end: sum(life['end'] == end and life['exit_code'] != 0 for life in lives) for end in ENDS}
    memory = dict(training=dict(max_mb=max(plain.samples, default=0.), growth=growth(plain.samples)),
                  workers=dict(max_mb=max(plain.worker_samples, default=0.), growth=growth(plain.worker_samples)),
                  max_mb_interrupted=max(job.samples, default=0.))
    checks = {'the checkpoints are equal': not different and len(names) > 0,
              f'{cycles} interruptions': sum(signals.values()) >= cycles,
              'validations were interrupted': due >= cycles // 4,
              'no partial file is left': not list(job.folder.glob('*.tmp')),
              'the memory is flat over the training': flat(memory['training']['growth'])}
    if sizes:
        checks.update({'the caches are bounded': sizes['bounded'],
                       'the memory is flat over the sizes': flat(sizes['growth'])})
    summary = dict(config=config.name, seed=args.seed, epochs=job.epochs, processes=args.processes,
                   patience=args.patience, validations=validations, killed_after_patience=impatient, left_due=due,
                   seconds_interrupted=sum(life['seconds'] for life in lives), seconds_undisturbed=seconds,
                   interruptions=signals, compared=names, different=different[:20], memory=memory, sizes=sizes,
                   checks=checks, lives=lives)
    (work_dir / 'soak.json').write_text(json.dumps(summary, indent=1))
    rows = [('interrupted training', f'{summary["seconds_interrupted"] / 60:.1f} min, {len(lives)} lives'),
            ('undisturbed training', f'{seconds / 60:.1f} min, {job.epochs} epochs'),
            *[(f'ended by {end}', count) for end, count in signals.items()],
            ('killed after the patience', f'{impatient}, patience up to {args.patience:.1f} s'),
            ('ended with a validation due', due),
            ('validations', f'{len(validations)} of {min(validations, default=0):.0f} to '
                            f'{max(validations, default=0):.0f} s'),
            ('compared', ', '.join(names)), ('different', ', '.join(different[:5]) or 'nothing'),
            ('memory, growth', f'{memory["training"]["max_mb"]:.0f} MB, {percent(memory["training"]["growth"])}'),
            ('workers, growth', f'{memory["workers"]["max_mb"]:.0f} MB, {percent(memory["workers"]["growth"])}'),
            *[(name, {True: 'yes', False: 'NO', None: 'too few samples'}[good]) for name, good in checks.items()]]
    print('\n' + '\n'.join(f'{name:38} {value}' for name, value in rows))
    sys.exit(1 if False in checks.values() else 0)


if __name__ == '__main__':
    main()
