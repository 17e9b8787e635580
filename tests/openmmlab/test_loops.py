"""Validations that are due, the matrix of interruptions, runners and systems that are different."""
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from types import SimpleNamespace

import job_task
import pytest
import resume_matrix
import soak
import stop_under_checks
import torch
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner, Runner
from processes import PYTHON, ROOT, finish, start
from resume_matrix import Cell
from search_task import Classifier, loader

from mmlocalmamba.openmmlab.engine import EpochBasedTrainLoop, loops
from mmlocalmamba.openmmlab.engine.checkpoints import BEFORE_VALIDATION_FILE, LOOP_STATE, CheckpointHook
from mmlocalmamba.openmmlab.engine.lock import LOCK_FILE
from mmlocalmamba.openmmlab.engine.preemption import Preemption

MATRIX = ROOT / 'tests/stress/resume_matrix.py'
IN_PROCESS = Cell('epoch', 'killed', 'validation', 1, 3, 'plain')  # without workers


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
    """The validation is the last one; without it, another checkpoint would be the best."""
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


def test_a_copy_of_a_work_directory_is_a_training_of_its_own(tmp_path):
    """Resumption in the copy reads, writes and removes nothing of the original, and ends as the original would."""
    def score(value):
        class Better(Hook):
            priority = 'HIGHEST'

            def after_val_epoch(self, runner, metrics=None):
                metrics['score'] = value + runner.iter  # each is the best so far

        return Better()

    whole, _ = train(tmp_path / 'whole', hooks=[score(0.)], max_epochs=6)
    with pytest.raises(OSError):
        train(tmp_path / 'first', hooks=[score(0.), Fail(20)], max_epochs=6)
    shutil.copytree(tmp_path / 'first', tmp_path / 'copy')
    before = {path: path.read_bytes() for path in (tmp_path / 'first').glob('*') if path.is_file()}
    assert any('best' in path.name for path in before)
    train(tmp_path / 'copy', True, [score(0.)], max_epochs=6)
    assert {path: path.read_bytes() for path in (tmp_path / 'first').glob('*') if path.is_file()} == before
    assert (tmp_path / 'copy/last_checkpoint').read_text() == str(tmp_path / 'copy/epoch_6.pth')
    assert not resume_matrix.compare(tmp_path / 'whole', tmp_path / 'copy')[1]
    assert len(list((tmp_path / 'copy').glob('best*'))) == 1  # the one before, which was copied, is removed
    hub = torch.load(tmp_path / 'copy/epoch_6.pth', weights_only=True)['message_hub']['runtime_info']
    assert hub['best_ckpt'] == str(next((tmp_path / 'copy').glob('best*')))


def test_the_best_checkpoint_comes_after_its_validation(tmp_path):
    """A training that resumes from it runs no validation, and its log histories are MMEngine's HistoryBuffers again."""
    from mmengine.logging import HistoryBuffer

    from mmlocalmamba.files import load_checkpoint
    train(tmp_path)
    best, = tmp_path.glob('best*.pth')
    state = load_checkpoint(best)
    assert state[LOOP_STATE]['validation_due'] is False
    assert state['message_hub']['log_scalars'] and not any(
        isinstance(value, HistoryBuffer) for value in state['message_hub']['log_scalars'].values())
    resumed, _ = train(tmp_path, resume=True)
    scalars = resumed.message_hub.log_scalars
    assert 'train/loss' in scalars and all(isinstance(value, HistoryBuffer) for value in scalars.values())


def test_patience_goes_on(tmp_path):
    """EarlyStoppingHook goes on, though MMEngine saves nothing of it."""
    def stop():
        return EarlyStoppingHook('score', rule='greater', min_delta=100., patience=2)

    whole, _ = train(tmp_path / 'whole', hooks=[stop()], max_epochs=6, val_interval=1)
    assert whole.epoch == 3  # the first has the best score
    with pytest.raises(OSError):
        train(tmp_path / 'parts', hooks=[stop(), Fail(15)], max_epochs=6, val_interval=1)
    resumed, done = train(tmp_path / 'parts', True, [stop()], max_epochs=6, val_interval=1)
    assert (resumed.epoch, done) == (3, [15])


def test_a_stop_that_was_decided_stays(tmp_path, messages):
    """SIGTERM in the validation that stops the training: the checkpoint after it says that nothing is left to do."""
    options = dict(max_epochs=6, val_interval=1)

    def hooks():
        return [EarlyStoppingHook('score', rule='greater', min_delta=100., patience=2), AtEndOfValidation(15)]

    with pytest.raises(SystemExit, match='75'):
        train(tmp_path, hooks=hooks(), **options)
    assert torch.load(tmp_path / 'preempted.pth', weights_only=True)['loop']['stop_training']
    resumed, done = train(tmp_path, True, hooks(), **options)
    assert (resumed.epoch, resumed.iter, done) == (3, 15, [])
    assert any('had stopped this training' in message for message in messages)


class AtEndOfValidation(Hook):
    """SIGTERM when the metrics of the validation after this iteration are known."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_val_epoch(self, runner, metrics=None):
        if runner.iter == self.iteration and not runner._resume:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('kind', ['joint', 'bilevel'])
def test_validations_outside_of_a_training(tmp_path, kind):
    """Before one, and after it, when hooks are told of a run again. What was trained stays."""
    cell = IN_PROCESS._replace(kind=kind)
    assert resume_matrix.build(cell, tmp_path / 'first', False, False).val().keys() == {'score'}
    assert not list((tmp_path / 'first').glob('*.pth'))
    runner, _ = train(tmp_path / 'second', cell=cell)
    before = deepcopy(job_task.state(runner))
    assert runner.val().keys() == {'score'}
    assert not soak.differences(dict(job_task.state(runner), rng=None), dict(before, rng=None))
    assert not (tmp_path / 'second' / LOCK_FILE).exists()


@pytest.fixture
def messages(monkeypatch):
    """Messages that are logged."""
    told = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: told.append(record.getMessage()))
    return told


def signalled(iteration, validation):
    class Signal(Hook):
        def after_train_iter(self, runner, **kwargs):
            if not validation and runner.iter + 1 == iteration:
                os.kill(os.getpid(), signal.SIGTERM)

        def before_val_iter(self, runner, **kwargs):
            if validation and runner.iter == iteration:
                os.kill(os.getpid(), signal.SIGTERM)

    return Signal()


@pytest.mark.parametrize('validation', [False, True])
def test_it_says_where_it_was_preempted(tmp_path, messages, validation):
    with pytest.raises(SystemExit, match='75'):
        train(tmp_path, hooks=[signalled(10, validation)])
    rest = (', in the validation, which restarts on resumption' if validation
            else f'; resume from {tmp_path}/preempted.pth')
    assert [message for message in messages if 'preempted' in message] == [f'preempted after iteration 10{rest}']
    assert (tmp_path / 'preempted.pth').exists() is not validation


def every(interval):
    class Every(Hook):
        def before_train(self, runner):
            hook, = [hook for hook in runner.hooks if type(hook).__name__ == 'CheckpointHook']
            hook.interval = interval

    return Every()


@pytest.mark.parametrize('interval,written', [(4, True), (5, False)])
def test_a_validation_has_one_checkpoint_before_it(tmp_path, interval, written):
    """The regular one, where there is one: validations are after 5 and 10 iterations, and at the end it is written."""
    train(tmp_path, cell=IN_PROCESS._replace(unit='iteration'), hooks=[every(interval)], max_iters=10)
    path = tmp_path / BEFORE_VALIDATION_FILE
    assert path.exists() is written
    if written:
        saved = torch.load(path, weights_only=True)
        assert saved['meta']['iter'] == 5 and saved['loop']['validation_due']


# ---- an uninterrupted training ----

@pytest.mark.parametrize('unit', ['epoch', 'iteration'])
def test_hooks_are_called_as_by_the_loops_of_mmengine(tmp_path, unit):
    """Hooks are called at the same points in the same order, with the same arguments."""
    called = {}
    for name in ('mmengine', 'own'):
        runner = resume_matrix.build(IN_PROCESS._replace(unit=unit), tmp_path / name, False, interrupt=False)
        runner._hooks = [hook for hook in runner.hooks if type(hook).__name__ != 'NumericalGuardHook']
        if name == 'mmengine':
            runner._train_loop['type'] = runner._train_loop['type'].removeprefix('mmlocalmamba.')
        calls = called[name] = []
        call = runner.call_hook

        def record(point, calls=calls, call=call, **kwargs):
            if 'checkpoint' not in point:  # this package has more of these
                calls.append((point, kwargs.get('batch_idx'), *(type(kwargs.get(name)).__name__
                                                                for name in ('data_batch', 'outputs', 'metrics'))))
            call(point, **kwargs)

        runner.call_hook = record
        runner.train()
    assert called['own'] == called['mmengine'] and len(called['own']) > 40


def test_random_numbers_belong_to_an_iteration_or_a_validation(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(loops, 'seed_everything', lambda *key: keys.append(key))
    train(tmp_path)
    iterations = [(7, 1, number) for number in range(15)]
    assert keys == [*iterations[:10], (7, 2, 10), *iterations[10:], (7, 2, 15)]
    keys.clear()
    monkeypatch.setattr(loops, 'dist', SimpleNamespace(get_rank=lambda: 2, get_world_size=lambda: 4))
    runner = SimpleNamespace(seed=7, call_hook=lambda *args, **kwargs: None,
                             model=SimpleNamespace(train_step=lambda batch, optim_wrapper: None))
    EpochBasedTrainLoop._iterate(SimpleNamespace(runner=runner, _iter=5, optim_wrapper=None), 0, None)
    assert keys == [(7, 1, 5 * 4 + 2)]


# ---- what each process has for itself ----

def one_of_two(monkeypatch, rank=1, world_size=2, others=()):
    """A loop on one process, with the gathered states of the others."""
    monkeypatch.setattr(loops, 'dist', SimpleNamespace(
        get_rank=lambda: rank, get_world_size=lambda: world_size,
        all_gather_object=lambda mine: [*map(deepcopy, others), deepcopy(mine)]))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model(torch.rand(4, 2)).square().sum().backward()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.), accumulative_counts=2)
    loop = object.__new__(EpochBasedTrainLoop)
    vars(loop).update(_runner=SimpleNamespace(model=model, optim_wrapper=wrapper, hooks=[]), validation_due=False,
                      stop_training=False, data=SimpleNamespace(epoch=1, samples=4), _ranks=[], _ranks_at=None,
                      loaders=SimpleNamespace(state_dict=dict))
    return loop, model, wrapper


def test_statistics_and_gradients_of_each_process_are_kept(monkeypatch):
    loop, model, wrapper = one_of_two(monkeypatch)
    first = dict(buffers={name: value.clone() for name, value in model.named_buffers()}, gradients={})
    first['buffers']['1.running_mean'] += 1
    loop, model, wrapper = one_of_two(monkeypatch, others=[first])
    loop.collect_ranks()
    assert [rank['gradients'] for rank in loop._ranks] == [{}, {}]  # between two steps there are none to keep
    assert loop._ranks[0]['buffers'] == {} and loop._ranks[1]['buffers'].keys() == {'1.running_mean'}
    wrapper._inner_count = 1  # of two
    loop.collect_ranks()
    names = {name for name, _ in model.named_parameters()}
    assert loop._ranks[1]['gradients'].keys() == names
    assert loop.state_dict()['ranks'] is loop._ranks
    resumed, other, _ = one_of_two(monkeypatch)
    other.zero_grad()
    other[1].running_mean.zero_()
    resumed._ranks = loop._ranks
    resumed._restore_rank()
    assert resumed._ranks == [] and torch.equal(other[1].running_mean, model[1].running_mean)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(other.parameters(), model.parameters()))
    loop.data.samples = 8  # the collected state belongs to another position
    assert loop.state_dict()['ranks'] == []


def test_another_number_of_processes_takes_the_mean_of_the_gradients(monkeypatch):
    loop, model, _ = one_of_two(monkeypatch, rank=0, world_size=1)
    gradient = model[0].weight.grad.clone()
    statistics = model[1].running_mean.clone()
    loop._ranks = [dict(buffers={'1.running_mean': torch.ones(3)}, gradients={'0.weight': factor * gradient})
                   for factor in (1., 3.)]
    loop._restore_rank()
    assert torch.equal(model[0].weight.grad, 2 * gradient) and torch.equal(model[1].running_mean, statistics)


def test_processes_that_see_different_files_stop(monkeypatch):
    """A network file system may show an older preempted.pth on one node."""
    loop, *_ = one_of_two(monkeypatch, others=[(1, 2, False)])
    loop._runner = object.__new__(Runner)
    loop._runner._hooks = []
    loop.loaders.load_state_dict = lambda state: None
    state = dict(data={}, validation_due=False, ranks=[], early_stopping=[])
    with pytest.raises(RuntimeError, match=r'different states .*\[\(1, 2, False\), \(1, 4, False\)\]: .* late'):
        loop.load_state_dict(state)
    loop.data.samples = 2
    loop.load_state_dict(state)
    assert loop.stop_training is False


def test_a_hook_that_does_not_ask_the_processes_is_named(monkeypatch, messages):
    loop, *_ = one_of_two(monkeypatch)
    assert loop.state_dict()['ranks'] == []
    assert messages == ['this checkpoint lacks the state of the other processes (BatchNorm statistics, accumulated '
                        'gradients): use mmlocalmamba.CheckpointHook, which saves it']


def test_signals_are_not_noticed_outside_of_the_main_thread(messages):
    handler, found = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Preemption() as preemption:
            found.append((preemption.enabled, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, handler)]
    assert messages == ['the training does not run in the main thread, so it cannot be preempted by signals']


# ---- the matrix ----

@pytest.mark.slow
def test_a_sample_of_the_matrix(tmp_path):
    """Every value of every axis. All of it: python tests/stress/resume_matrix.py"""
    sample = resume_matrix.sample(9)
    assert [set(values) for values in zip(*sample)] == [set(values) for values in zip(*resume_matrix.CELLS)]
    assert any(cell[1:3] + cell[5:6] == ('preempted', 'training', 'bilevel') for cell in sample)
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
from mmlocalmamba.openmmlab.engine import data, loops
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


@pytest.mark.slow
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
    assert 'a training with FlexibleRunner cannot be preempted or resumed' in capsys.readouterr().out
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


@pytest.mark.slow
def test_training_without_what_windows_has_not(tmp_path):
    assert 'iterations 6' in finish(start(*PYTHON, '-c', WINDOWS, tmp_path, ROOT / 'tests/helpers'))


# ---- the launcher ----

LEAVES = '''
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: sys.exit(int(sys.argv[1 + int(os.environ['RANK'])])))
open(os.path.join(sys.argv[3], os.environ['RANK']), 'w').close()
time.sleep(100)
'''


@pytest.mark.parametrize('codes,expected', [((3, 3), 3), ((75, 75), 75), ((0, 0), 0), ((75, 3), 75)])
@pytest.mark.slow
def test_the_launcher_takes_its_code_from_the_training(tmp_path, codes, expected):
    """After a signal nothing is started again, for any --max-restarts."""
    (tmp_path / 'task.py').write_text(LEAVES)
    process = start(*PYTHON, ROOT / 'tools/launch.py', '--nproc-per-node', 2, '--max-restarts', 1, '--rdzv-backend',
                    'c10d', '--rdzv-endpoint', '127.0.0.1:0', '--local-addr', '127.0.0.1',
                    tmp_path / 'task.py', *codes, tmp_path)
    while not all((tmp_path / rank).exists() for rank in '01'):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1 if codes == (75, 75) else signal.SIGTERM)
    finish(process, returncode=expected)


@pytest.mark.slow
def test_a_process_that_fails_is_no_preemption(tmp_path):
    """torchrun ends the others by SIGTERM. One that still starts exits with 75 then, which is not the job's code."""
    (tmp_path / 'task.py').write_text(LEAVES.replace('time.sleep(100)', 'if os.environ["RANK"] == "1":\n'
                                                     '    while not os.path.exists(os.path.join(sys.argv[3], "0")):\n'
                                                     '        time.sleep(0.01)\n'
                                                     '    sys.exit(3)\n'
                                                     'time.sleep(100)'))
    finish(start(*PYTHON, ROOT / 'tools/launch.py', '--nproc-per-node', 2, '--rdzv-backend', 'c10d', '--rdzv-endpoint',
                 '127.0.0.1:0', '--local-addr', '127.0.0.1', tmp_path / 'task.py', 75, 75, tmp_path), returncode=1)


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


UNHANDLED = {'preemptible': {'train_cfg.preemptible': False}, 'loop': {'train_cfg.type': 'EpochBasedTrainLoop'},
             'runner': dict(runner_type='FlexibleRunner')}
SIGNALLED_CONFIG = """
_base_ = {base!r}
__import__('sys').path.append({helpers!r})
custom_imports = dict(imports=['signal_hook'])
custom_hooks = [dict(type='Signal', priority='LOWEST', folder={folder!r})]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
val_dataloader = val_cfg = val_evaluator = test_dataloader = test_cfg = test_evaluator = None
"""


@pytest.mark.slow
def test_only_a_checkpoint_asks_for_another_start(tmp_path, tiny_digits):
    """A training that does not handle signals ends by them: with 75 a scheduler would start it again for ever."""
    jobs = {}
    for name, options in (('handled', {}), *UNHANDLED.items()):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'mine.py').write_text(SIGNALLED_CONFIG.format(
            base=str(ROOT / 'configs/localvmamba-nano_digits.py'), helpers=str(ROOT / 'tests/helpers'),
            folder=str(folder), data=str(tiny_digits)))
        options = {**options, 'default_hooks.numerical_guard.type': 'mmengine.hooks.Hook',
                   'default_hooks.broken_files.type': 'mmengine.hooks.Hook'}
        jobs[folder] = start(*PYTHON, ROOT / 'tools/train.py', folder / 'mine.py', '--work-dir', folder,
                             '--cfg-options', *[f'{key}={value}' for key, value in options.items()])
    for folder, job in jobs.items():
        output = finish(job, returncode=75 if folder.name == 'handled' else -signal.SIGTERM, seconds=600)
        assert (folder / 'signalled').exists(), output
        assert (folder / 'preempted.pth').exists() == (folder.name == 'handled')


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


@pytest.mark.parametrize('val_loop,due', [(None, []), (object(), [5, 6, 7, 8])])
def test_another_interval_of_validations_from_an_epoch_on(val_loop, due):
    """As MMEngine has it: dynamic_intervals=[(5, 1)] after an interval of 5: every epoch from the fifth on."""
    loop = SimpleNamespace(dynamic_milestones=[0, 6], dynamic_intervals=[5, 1], val_begin=1,
                           runner=SimpleNamespace(val_loop=val_loop))
    found = []
    for done in range(1, 9):
        EpochBasedTrainLoop._decide_on_validation(loop, done, 9)
        found += [done] * loop.validation_due
    assert found == due
    # Before it begins there is none, and there is one after the last epoch.
    loop.val_begin = 7
    EpochBasedTrainLoop._decide_on_validation(loop, 6, 9)
    assert not loop.validation_due
    loop.dynamic_intervals = [5, 4]
    EpochBasedTrainLoop._decide_on_validation(loop, 9, 9)
    assert loop.validation_due == bool(due)


def test_a_checkpoint_that_names_no_outdated_files():
    """MMEngine's loops write such checkpoints; the next one that is saved has no outdated files either."""
    hook, saved = CheckpointHook(), dict(meta={}, message_hub={})
    hook.after_load_checkpoint(SimpleNamespace(_resume=True), dict(meta={}))
    hook.before_save_checkpoint(SimpleNamespace(), saved)
    assert list(saved['meta'].values()) == [[]]
