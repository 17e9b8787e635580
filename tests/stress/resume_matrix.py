"""Interrupt tiny trainings in every way, resume them, and compare them with uninterrupted trainings.

    python tests/stress/resume_matrix.py --jobs 2 --csv work_dirs/resume_matrix/matrix.csv

A cell is {epoch, iteration} x {preempted, killed} x {training, validation, save} x {1, 2 processes} x {accumulate 1, 3}
x {plain, EMA, loss scaler, joint search, bilevel search}: 240 cells. 48 more are {epoch, iteration} x {preempted,
killed} x {training, validation} x {1, 2 processes} x {copied, overlapping, stopping}: the work directory is copied and
the copy resumed; the next life starts while this one still runs; early stopping stops the training in the validation,
which is struck at its end. Signals are real: SIGTERM, or SIGKILL, which also strikes in the middle of writing a file.
This process imports everything and forks the trainings. Checkpoints must be equal bit for bit: weights, optimizer,
schedulers, averages, positions, statistics of processes, and each loss and score.

The script writes the table after each cell and does not repeat cells that the table has. It exits with 1 if a cell is
not equal.
"""
import argparse
import csv
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import matplotlib.backends.backend_agg
import matplotlib.pyplot  # noqa: F401
import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from soak import compare
from torch import nn

import mmlocalmamba.openmmlab.search_hook  # noqa: F401
from mmlocalmamba.backbones import LocalVMamba
from mmlocalmamba.openmmlab.engine import EXIT_PREEMPTED
from mmlocalmamba.openmmlab.engine.lock import LOCK_FILE

BATCHES = 5  # per epoch; not a multiple of the accumulation
EPOCHS, ITERATIONS = 3, 13
# The moments of interruption: after this iteration, in the second batch of the validation after this iteration, and in
# the save after this iteration.
TRAINING_AT = 8
VALIDATION_AT = 10
SAVE_AT = dict(epoch=10, iteration=8)
SAMPLE_SEED = 1452


class Cell(NamedTuple):
    unit: str
    end: str
    moment: str
    processes: int
    accumulate: int
    kind: str
    way: str = 'alone'

    @property
    def name(self):
        return '-'.join(map(str, self))

    @property
    def reference(self):
        return f'{self.unit}-{self.processes}-{self.accumulate}-{self.kind}' + '-stopping' * (self.way == 'stopping')


CELLS = [Cell(*values) for values in itertools.product(
    ('epoch', 'iteration'), ('preempted', 'killed'), ('training', 'validation', 'save'), (1, 2), (1, 3),
    ('plain', 'ema', 'scaler', 'joint', 'bilevel'))]
CELLS += [Cell(*values) for values in itertools.product(
    ('epoch', 'iteration'), ('preempted', 'killed'), ('training', 'validation'), (1, 2), (1, ), ('plain', ),
    ('copied', 'overlapping', 'stopping'))]


def sample(count):
    """Return a sample of cells, the same each time."""
    return sorted(random.Random(SAMPLE_SEED).sample(CELLS, count))


# ---- a training of a second ----

class Images(torch.utils.data.Dataset):
    """Images with new noise each time."""

    def __init__(self, count, first=0):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.random.RandomState(self.first + index).standard_normal((3, 8, 8))
        return dict(inputs=torch.from_numpy(image + 0.1 * np.random.standard_normal((3, 8, 8))).float(),
                    labels=index % 3)


class Classifier(BaseModel):
    """A classifier with layers that have a state or draw random numbers: BatchNorm, drop path, dropout."""

    def __init__(self, search):
        super().__init__()
        directions = dict(candidates=['h', 'v', 'w2']) if search else ['h', 'w2']
        self.backbone = LocalVMamba(dict(embed_dims=[4, 8], depths=[1, 1], d_state=1), drop_path_rate=0.2,
                                    directions='search' if search else directions)
        self.fc = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, inputs, labels, mode='loss'):
        logits = self.fc(self.backbone(inputs)[-1].mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return list(logits.softmax(1)[:, 0].tolist())


class Score(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(score=sum(results))


@OPTIM_WRAPPERS.register_module()
class CPUScaler(AmpOptimWrapper):
    """A loss scaler for CPUs, which MMEngine's refuses. The scale changes every few steps."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 8, growth_interval=2)

    optim_context = OptimWrapper.optim_context


class Interrupt(Hook):
    """End the process at the moment of a cell."""

    priority = 'LOWEST'

    def __init__(self, cell):
        self.cell = cell
        self.number = signal.SIGKILL if cell.end == 'killed' else signal.SIGTERM
        self.replace = os.replace

    def strike(self):
        """Signal the whole process group from outside, as a scheduler does. Workers react to the sender of a signal."""
        if self.number == signal.SIGKILL:
            os.kill(os.getpid(), self.number)
        subprocess.run(['kill', f'-{self.number:d}', '--', f'-{os.getpgid(0)}'], start_new_session=True)

    def after_train_iter(self, runner, **kwargs):
        if self.cell.moment == 'training' and runner.iter + 1 == TRAINING_AT:
            self.strike()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.in_validation(runner, 'alone', 'copied', 'overlapping') and batch_idx == 1:
            self.strike()

    def after_val_epoch(self, runner, metrics=None):
        if self.in_validation(runner, 'stopping'):
            self.strike()

    def in_validation(self, runner, *ways):
        return self.cell.moment == 'validation' and runner.iter == VALIDATION_AT and self.cell.way in ways

    def before_save_checkpoint(self, runner, checkpoint):
        if self.cell.moment == 'save' and checkpoint['meta']['iter'] == SAVE_AT[self.cell.unit]:
            os.replace = self.in_the_middle

    def in_the_middle(self, source, target):
        os.replace = self.replace
        self.strike()  # the file is written but not yet renamed
        self.replace(source, target)


def loader(cell, count, batch, infinite=False, first=0, shuffle=True):
    return dict(batch_size=batch, num_workers=int(cell.accumulate == 1), dataset=Images(count, first),
                collate_fn=dict(type='default_collate'),
                sampler=dict(type='InfiniteSampler' if infinite else 'DefaultSampler', shuffle=shuffle))


def build(cell, folder, resume, interrupt):
    by_epoch, search, stopping = cell.unit == 'epoch', cell.kind in ('joint', 'bilevel'), cell.way == 'stopping'
    torch.manual_seed(0)
    hooks = [Interrupt(cell)] if interrupt else []
    if cell.kind == 'ema':
        hooks.append(dict(type='EMAHook', momentum=0.3))
    if search:
        hook = dict(type='mmlocalmamba.ScanSearchHook', mode=cell.kind, k=2, interval=100)
        if cell.kind == 'bilevel':
            hook.update(held_out=loader(cell, 6 * cell.processes, 2, first=1000), optimizer=dict(type='Adam', lr=0.05))
        hooks.append(hook)
    # 'stopping' ends by the validation after 10 iterations, the second one.
    hooks.append(dict(type='EarlyStoppingHook', monitor='score', rule='greater', min_delta=100.,
                      patience=1 if stopping else 100))
    train_cfg = (dict(type='mmlocalmamba.EpochBasedTrainLoop', max_epochs=EPOCHS, val_interval=2 - stopping)
                 if by_epoch else
                 dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=ITERATIONS, val_interval=5))
    return Runner(
        model=Classifier(search), work_dir=str(folder),
        # Runners of the same name that start within a second share a message hub, and so the best score.
        experiment_name=f'{cell.name}{os.path.basename(folder)}{resume}{os.getpid()}{time.monotonic_ns()}',
        default_scope='mmengine', train_cfg=train_cfg, val_cfg=dict(), val_evaluator=[Score()],
        train_dataloader=loader(cell, 2 * BATCHES * cell.processes, 2, infinite=not by_epoch),
        val_dataloader=loader(cell, 5, 1, first=2000, shuffle=False),  # the first process gets more than the second
        optim_wrapper=dict(type='CPUScaler' if cell.kind == 'scaler' else 'OptimWrapper',
                           optimizer=dict(type='AdamW', lr=0.02, weight_decay=0.05), clip_grad=dict(max_norm=5.),
                           accumulative_counts=cell.accumulate,
                           paramwise_cfg=dict(custom_keys={'alphas': dict(decay_mult=0.)})),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5),
                         dict(type='MultiStepLR', by_epoch=by_epoch, milestones=[2])],
        default_hooks=dict(checkpoint=dict(
            type='mmlocalmamba.CheckpointHook', interval=1 if by_epoch else 4, by_epoch=by_epoch, max_keep_ckpts=2,
            save_best='score', rule='greater')),
        custom_hooks=[dict(type='mmlocalmamba.NumericalGuardHook'), *hooks], resume=resume, randomness=dict(seed=7),
        launcher='pytorch' if cell.processes > 1 else 'none', log_level='WARNING',
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)))


# ---- lives ----

def live(cell, folder, resume, interrupt, rank):
    """Train in this process, which leads a process group, as torchrun's processes do."""
    os.setsid()
    with open(folder / f'log{rank}.txt', 'a') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 1
    try:
        if cell.processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(cell.processes))
            torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store{resume}', rank=rank,
                                                 world_size=cell.processes)
        # The first process writes checkpoints, so it is struck in a save. Otherwise the last process is struck.
        struck = interrupt and rank == (0 if cell.moment == 'save' else cell.processes - 1)
        build(cell, folder, resume, struck).train()
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def begin(cell, folder, resume=False, interrupt=False):
    """Start the processes of a cell and return their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    pids = []
    for rank in range(cell.processes):
        pid = os.fork()
        if pid == 0:
            live(cell, folder, resume, interrupt, rank)
        pids.append(pid)
    return pids


def end(pids):
    """Return the exit codes of processes. If one is killed, kill the others, as a launcher does."""
    codes = {}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] not in (0, EXIT_PREEMPTED):
                    for other in set(pids) - set(codes):
                        os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run(cell, folder, **kwargs):
    """Run a cell and return the exit codes of its processes."""
    return end(begin(cell, folder, **kwargs))


def content(folder):
    """Return the bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def reference(cell, folder):
    """Return the folder of the uninterrupted training. Run the training if the folder is missing."""
    place = folder / 'references' / cell.reference
    if not (place / 'done').exists():
        shutil.rmtree(place, ignore_errors=True)
        codes = run(cell, place)
        if any(codes):
            raise RuntimeError(f'an uninterrupted training exited with {codes}: {place}')
        (place / 'done').touch()
    return place


def check(cell, folder):
    """Return the problem of a cell, or an empty string."""
    place = folder / cell.name
    shutil.rmtree(place, ignore_errors=True)
    pids = begin(cell, place, interrupt=True)
    if cell.way == 'overlapping':
        while not (place / LOCK_FILE).exists():
            time.sleep(0.01)
        following = begin(cell, place, resume=True)
    codes = end(pids)
    expected = {EXIT_PREEMPTED} if cell.end == 'preempted' else {-signal.SIGKILL}
    if cell.end == 'preempted' and set(codes) != expected or not expected & set(codes):
        return f'exited with {codes}'
    partial = list(place.glob('*.tmp'))
    if cell.end == 'killed' and cell.moment == 'save' and not partial:
        return 'was not killed while it wrote a file'
    original = place
    if cell.way == 'copied':
        place = folder / f'{cell.name}-copy'
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)
        before = content(original)
    codes = end(following) if cell.way == 'overlapping' else run(cell, place, resume=True)
    if cell.way == 'copied' and content(original) != before:
        return 'changed the original of the copy'
    if any(codes):
        return f'resumed and exited with {codes}'
    names, different = compare(reference(cell, folder), place)
    if not any('best' in name for name in names):
        return f'no best checkpoint among {names}'
    if list(place.glob('*.tmp')):
        return 'a partial file remains'
    if different:
        return 'differs: ' + ' '.join(different[:4])
    for used in {original, place}:
        shutil.rmtree(used)
    return ''


def timed(cell, folder):
    begin = time.monotonic()
    try:
        wrong = check(cell, folder)
    except Exception as error:
        wrong = f'{type(error).__name__}: {error}'
    return wrong or 'equal', time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--jobs', type=int, default=1, help='cells at a time (default: 1)')
    parser.add_argument('--csv', type=Path, default=Path('work_dirs/resume_matrix/matrix.csv'),
                        help='table to extend (default: %(default)s); trainings are in its folder')
    parser.add_argument('--only', default='', help='run only cells whose name contains this, e.g. killed-validation-2')
    parser.add_argument('--sample', type=int, metavar='N', help='run N random cells, the same each time')
    args = parser.parse_args()
    torch.set_num_threads(1)  # before a fork
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    folder = args.csv.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    if args.csv.exists():
        with open(args.csv, newline='') as file:
            known = {tuple(row[:len(Cell._fields)]): row[-2] for row in csv.reader(file)}
    cells = [cell for cell in (sample(args.sample) if args.sample else CELLS) if args.only in cell.name]
    left = [cell for cell in cells if tuple(map(str, cell)) not in known]
    with (open(args.csv, 'a', newline='') as file,
          ProcessPoolExecutor(args.jobs, mp_context=get_context('fork')) as pool):
        table = csv.writer(file)
        if not known:
            table.writerow([*Cell._fields, 'result', 'seconds'])
        firsts = {cell.reference: cell for cell in left}.values()
        for _ in pool.map(reference, firsts, [folder] * len(firsts)):
            pass
        for cell, (result, seconds) in zip(left, pool.map(timed, left, [folder] * len(left))):
            known[tuple(map(str, cell))] = result
            table.writerow([*cell, result, f'{seconds:.1f}'])
            file.flush()
            print(f'{cell.name:50} {seconds:6.1f} s  {result}', flush=True)
    results = [known[tuple(map(str, cell))] for cell in cells]
    print(f'{results.count("equal")} of {len(cells)} cells are equal')
    sys.exit(results.count('equal') < len(cells))


if __name__ == '__main__':
    main()
