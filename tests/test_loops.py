"""Validations that are due, the matrix of interruptions, runners and systems that are different."""
import os
import signal
import subprocess
import sys
import time

import job_task
import pytest
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.runner import FlexibleRunner
from processes import PYTHON, ROOT, finish, port, start
from search_task import Classifier, loader

sys.path.insert(0, str(ROOT / 'tools/dev'))
import resume_matrix
import stop_under_checks
from resume_matrix import Cell

MATRIX = ROOT / 'tools/dev/resume_matrix.py'
IN_PROCESS = Cell('epoch', 'killed', 'validation', 1, 3, 'plain')  # without workers, the names are the tool's


# ---- validations ----

class Fail(Hook):

    def __init__(self, iteration):
        self.iteration = iteration

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise OSError('the disk of the validation images has gone')


class Validations(Hook):

    def __init__(self):
        self.after = []

    def after_val_epoch(self, runner, metrics=None):
        self.after.append(runner.iter)


def train(folder, resume=False, hooks=(), cell=IN_PROCESS, **changes):
    runner = resume_matrix.build(cell, folder, resume, interrupt=False)
    for name, value in changes.items():
        runner._train_loop[name] = value
    validations = Validations()
    for hook in (*hooks, validations):
        runner.register_hook(hook)
    runner.train()
    return runner, validations.after


@pytest.mark.parametrize('unit,after', [('epoch', [10, 15]), ('iteration', [5, 10, 13])])
def test_a_validation_that_failed_is_run_on_resumption(tmp_path, unit, after):
    """The last one, without which another checkpoint would be the best."""
    cell = IN_PROCESS._replace(unit=unit)
    whole, done = train(tmp_path / 'whole', cell=cell)
    assert done == after
    with pytest.raises(OSError, match='has gone'):
        train(tmp_path / 'parts', hooks=[Fail(after[-1])], cell=cell)
    resumed, done = train(tmp_path / 'parts', resume=True, cell=cell)
    assert done == after[-1:]
    names, different = resume_matrix.compare(tmp_path / 'whole', tmp_path / 'parts')
    assert not different and any('best' in name for name in names)
    assert whole.message_hub.get_info('best_score') == resumed.message_hub.get_info('best_score')


def test_patience_goes_on(tmp_path):
    """EarlyStoppingHook, of which MMEngine saves nothing."""
    def stop():
        return EarlyStoppingHook('score', rule='greater', min_delta=100., patience=2)

    whole, _ = train(tmp_path / 'whole', hooks=[stop()], max_epochs=6, val_interval=1)
    assert whole.epoch == 3  # the first has the best score
    with pytest.raises(OSError):
        train(tmp_path / 'parts', hooks=[stop(), Fail(15)], max_epochs=6, val_interval=1)
    resumed, done = train(tmp_path / 'parts', True, [stop()], max_epochs=6, val_interval=1)
    assert (resumed.epoch, done) == (3, [15])


# ---- the matrix ----

def test_a_sample_of_the_matrix(tmp_path):
    """Every value of every axis. All of it: python tools/dev/resume_matrix.py"""
    sample = resume_matrix.sample(9)
    assert [set(values) for values in zip(*sample)] == [set(values) for values in zip(*resume_matrix.CELLS)]
    assert any(cell[1:3] + cell[5:] == ('preempted', 'training', 'bilevel') for cell in sample)
    command = [*PYTHON, MATRIX, '--csv', tmp_path / 'matrix.csv', '--sample', '9', '--jobs', '2']
    done = subprocess.run(command, capture_output=True, text=True)
    assert '9 of 9 cells are equal' in done.stdout, done.stdout + done.stderr


BROKEN = '''
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
import resume_matrix
from mmlocalmamba.engine import data, loops
breaks = dict(
    gradients=lambda: setattr(loops.ResumableLoop, '_restore_rank', lambda self: None),
    position=lambda: setattr(data.Loaders, 'load_state_dict', lambda self, state: None),
    validation=lambda: setattr(loops.ResumableLoop, '_validate_if_due', lambda self: None))
cell = resume_matrix.Cell('epoch', 'preempted', 'training', 1, 3, 'plain')
folder = Path(sys.argv[1])
resume_matrix.reference(cell, folder)
for name, broken in breaks.items():
    originals = loops.ResumableLoop._restore_rank, data.Loaders.load_state_dict, loops.ResumableLoop._validate_if_due
    broken()
    print(name, resume_matrix.check(cell, folder) or 'equal', flush=True)
    (loops.ResumableLoop._restore_rank, data.Loaders.load_state_dict,
     loops.ResumableLoop._validate_if_due) = originals
'''


def test_the_matrix_sees_what_is_lost(tmp_path):
    done = subprocess.run([*PYTHON, '-c', BROKEN, tmp_path, MATRIX.parent], capture_output=True, text=True)
    results = dict(line.split(' ', 1) for line in done.stdout.splitlines() if ' ' in line)
    for name in ('gradients', 'position', 'validation'):
        assert results.get(name, 'equal') != 'equal', done.stdout + done.stderr


# ---- other runners, other systems ----

def flexible(folder, iterations, resume):
    return FlexibleRunner(
        model=Classifier(directions=['h', 'w2']), work_dir=str(folder), default_scope='mmengine', resume=resume,
        experiment_name=f'flexible{resume}', train_dataloader=loader(),
        train_cfg=dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.02)), randomness=dict(seed=7),
        default_hooks=dict(checkpoint=dict(type='mmlocalmamba.CheckpointHook', by_epoch=False, interval=2)))


def test_a_flexible_runner_says_that_it_cannot_resume(tmp_path, capsys):
    flexible(tmp_path, 2, False).train()
    assert 'a training by FlexibleRunner cannot be preempted or resumed' in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot resume .* MMEngine's loop, train_cfg.type='IterBasedTrainLoop'"):
        flexible(tmp_path, 4, True).train()


def test_other_names_of_checkpoints(tmp_path):
    options = dict(checkpoint=dict(filename_tmpl='weights[{:03d}].pth'))
    job_task.build(tmp_path, epochs=1, **options).train()
    (tmp_path / 'last_checkpoint').unlink()
    runner = job_task.build(tmp_path, epochs=2, resume=True, **options)
    runner.train()
    assert runner.iter == 12 and (tmp_path / 'last_checkpoint').read_text().endswith('weights[002].pth')
    assert len((tmp_path / 'loaded').read_text().split()) == 24


WINDOWS = '''
import os, signal, sys
sys.modules['fcntl'] = None
for module, names in ((os, ['EX_TEMPFAIL']), (signal, ['SIGUSR1', 'pthread_sigmask', 'sigwaitinfo'])):
    for name in names:
        delattr(module, name)
sys.path.insert(0, sys.argv[2])
import job_task
runner = job_task.build(sys.argv[1], epochs=1, workers=1)
runner.train()
print('iterations', runner.iter)
'''


def test_training_without_what_windows_has_not(tmp_path):
    assert 'iterations 6' in finish(start(*PYTHON, '-c', WINDOWS, tmp_path, ROOT / 'tests'))


# ---- the launcher ----

LEAVES = '''
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: sys.exit(int(sys.argv[1 + int(os.environ['RANK'])])))
open(os.path.join(sys.argv[3], os.environ['RANK']), 'w').close()
time.sleep(100)
'''


@pytest.mark.parametrize('codes,expected', [((3, 3), 3), ((75, 75), 75), ((0, 0), 0), ((75, 3), 75)])
def test_the_launcher_takes_its_code_from_the_training(tmp_path, codes, expected):
    """And starts nothing again after a signal, whatever --max-restarts says."""
    (tmp_path / 'task.py').write_text(LEAVES)
    process = start(*PYTHON, ROOT / 'tools/launch.py', '--nproc-per-node', 2, '--max-restarts', 1, '--rdzv-backend',
                    'c10d', '--rdzv-endpoint', f'127.0.0.1:{port()}', '--local-addr', '127.0.0.1',
                    tmp_path / 'task.py', *codes, tmp_path)
    while not all((tmp_path / rank).exists() for rank in '01'):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1 if codes == (75, 75) else signal.SIGTERM)
    finish(process, returncode=expected)


def catches(pid, number):
    for line in open(f'/proc/{pid}/status'):
        if line.startswith('SigCgt'):
            return int(line.split()[1], 16) >> number - 1 & 1


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc')
@pytest.mark.parametrize('program', ['train.py', 'launch.py'])
def test_signals_before_the_training_lose_nothing(program):
    process = subprocess.Popen([sys.executable, str(ROOT / 'tools' / program), 'none.py'], stderr=subprocess.DEVNULL)
    while not catches(process.pid, signal.SIGTERM):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


@pytest.mark.parametrize('code, output, lives_left, wrong', [
    (0, 'Epoch(val) [4][5/5]', 0, None),
    (75, 'preempted', 1, None),
    (-15, '', 1, None),
    (75, 'preempted', 0, 'exit code 75 of a training that was not told to stop'),
    (-6, '', 1, 'exit code -6'),
    (75, 'preempted\ncorrupted size vs. prev_size', 1, 'corrupted size vs. prev_size'),
    (0, '==7==ERROR: AddressSanitizer: heap', 0, '==7==ERROR: AddressSanitizer: heap'),
])
def test_what_a_stopped_training_must_not_say(code, output, lives_left, wrong):
    assert stop_under_checks.problem(code, output, lives_left) == wrong
