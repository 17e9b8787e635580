"""Exact resumption, preemption, checkpoints that are whole, the numerical guard."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import job_task
import numpy as np
import pytest
import soak
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from processes import PYTHON, ROOT, finish, start
from search_task import Images
from torch.utils.data import BatchSampler, DataLoader

from mmlocalmamba.files import write_whole
from mmlocalmamba.openmmlab import engine


def train(*args, **kwargs):
    runner = job_task.build(*args, **kwargs)
    runner.train()
    return runner


def same(first, second):
    return not soak.differences(first, second)


def start_jobs(*tasks, **env):
    """Trainings one after the other, in a process that leads a group of its own."""
    return start(*PYTHON, ROOT / 'tests/helpers/job_task.py', *map(json.dumps, tasks), new_session=True, **env)


# ---- data ----

def stream(sampler=None, rank=0, world_size=1, done=(0, 0), data=None, **kwargs):
    """Stream of 12 images in batches of three. ``done``: finished epochs, and batches of the next one."""
    data = data or Images()
    options = dict(batch_size=3, sampler=sampler) if 'batch_sampler' not in kwargs else {}
    result = engine.DataStream(SimpleNamespace(seed=7), 'train', DataLoader(data, **options, **kwargs))
    result.rank, result.world_size = rank, world_size
    result.epoch, result.batches = done
    result.samples = done[1] * 3 * world_size
    return result


def images(stream, count):
    return [next(stream)['inputs'] for _ in range(count)]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['default', 'infinite', 'endless', 'shuffle', 'generator', 'aspect'])
@pytest.mark.slow
def test_data_start_at_any_batch(kind, workers):
    """Noise on the images is drawn by the dataset: that, too, is the same. Samplers without epochs, torch's own, and
    one that collects images of a kind go on where they were."""
    def make(done=(0, 0), workers=0):
        torch.manual_seed(sum(done))  # what happened before does not matter
        options = dict(num_workers=workers, done=done)
        if kind == 'aspect':
            batches = AspectRatioBatchSampler(DefaultSampler(Shapes(), seed=1), 3)
            return stream(data=Shapes(), batch_sampler=batches, **options)
        if kind == 'shuffle':
            return stream(shuffle=True, **options)
        if kind == 'generator':
            return stream(shuffle=True, generator=torch.Generator(), **options)
        if kind == 'endless':
            return stream(Endless(), **options)
        return stream(dict(default=DefaultSampler, infinite=InfiniteSampler)[kind](Images(), seed=1), **options)

    whole = images(make(), 11)
    at = (0, 7) if kind in ('infinite', 'endless') else (1, 3)
    assert same(whole[7:], images(make(at, workers), 4))
    assert not same(whole[:4], whole[4:8])


class Endless(torch.utils.data.Sampler):
    """Says that it has 12 images, as those of several sources do."""

    def __len__(self):
        return 12

    def __iter__(self):
        numbers = np.random.RandomState(1)
        while True:
            yield int(numbers.randint(12))


class Shapes(Images):
    """Upright and wide images by turns."""

    def get_data_info(self, index):
        return dict(width=1 + index % 2, height=2 - index % 2)


def test_batches_before_the_position_are_not_loaded(tmp_path):
    data = job_task.Log(tmp_path)
    images(stream(InfiniteSampler(data, seed=1), data=data, done=(0, 40)), 2)
    assert len((tmp_path / 'loaded').read_text().split()) == 6


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one():
    single = next(stream(DefaultSampler(Images(), seed=1)))['inputs']
    parts = []
    for rank in range(3):
        sampler = DefaultSampler(Images(), seed=1)
        sampler.rank, sampler.world_size = rank, 3
        parts += images(stream(rank=rank, world_size=3, batch_sampler=BatchSampler(sampler, 1, False)), 1)
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), single)


def test_a_position_is_that_of_the_same_batches():
    first = stream(DefaultSampler(Images(), seed=1))
    images(first, 6)
    state = first.state_dict()
    assert (state['epoch'], state['batches'], state['samples']) == (1, 2, 6)
    state['samples'] = 5  # as if another sampler had made smaller batches
    first.load_state_dict(state)
    with pytest.raises(RuntimeError, match='first 2 batches of epoch 2 .* had 5 samples .* have 6 now'):
        next(first)


def test_data_that_cannot_be_repeated_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield 1

    class Loader(DataLoader):
        pass

    runner = SimpleNamespace(seed=7)
    with pytest.raises(TypeError, match='train data cannot be resumed: Stream is an IterableDataset'):
        engine.DataStream(runner, 'train', DataLoader(Stream()))
    with pytest.raises(TypeError, match='data is a Loader'):
        engine.DataStream(runner, 'train', Loader(Images()))
    with pytest.raises(ValueError, match='have no batches'):
        engine.DataStream(runner, 'train', DataLoader(Images(), batch_size=20, drop_last=True))
    loaders = engine.Loaders(runner)
    loaders.add('train', DataLoader(Images()))
    with pytest.raises(ValueError, match="stream 'train' exists already"):
        loaders.add('train', DataLoader(Images()))


# ---- preemption and resumption ----

CASES = {  # 12 images in batches of 2
    'in-an-epoch': dict(signal_at=8),
    'end-of-an-epoch': dict(signal_at=6),
    'workers': dict(signal_at=9, workers=2),
    'persistent-workers': dict(signal_at=9, workers=1, persistent=True, ema=True),
    'accumulation': dict(signal_at=7, accumulate=3),
    'iterations': dict(signal_at=8, iterations=14),
    'iterations-workers': dict(signal_at=8, iterations=14, workers=1),
    'iterations-in-epochs': dict(signal_at=8, iterations=14, infinite=False),
}


@pytest.mark.parametrize('case', CASES)
def test_preempted_training_equals_the_uninterrupted_one(tmp_path, case):
    """Weights, optimizer, schedulers, random numbers, and each image loaded as often."""
    options = dict(CASES[case])
    at = options.pop('signal_at')
    handler = signal.getsignal(signal.SIGTERM)
    whole = train(tmp_path / 'whole', **options)
    for signal_at in (at, at + 3):  # twice
        with pytest.raises(SystemExit) as left:
            train(tmp_path / 'parts', resume=True, signal_at=signal_at, **options)
        assert left.value.code == engine.EXIT_PREEMPTED == 75
        saved = torch.load(tmp_path / 'parts' / 'preempted.pth', weights_only=True)['meta']
        assert saved['iter'] == signal_at
        assert (tmp_path / 'parts' / 'last_checkpoint').read_text() == str(tmp_path / 'parts' / 'preempted.pth')
    resumed = train(tmp_path / 'parts', resume=True, **options)
    assert whole.iter == resumed.iter == options.get('iterations', 18)
    assert same(job_task.state(whole), job_task.state(resumed))
    if not options.get('workers'):  # they load ahead
        assert len((tmp_path / 'parts' / 'loaded').read_text().split()) <= 2 * (whole.iter + 2)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_without_the_position_resumption_differs(tmp_path, monkeypatch):
    """The comparisons above find a difference."""
    whole = train(tmp_path / 'whole')
    with pytest.raises(SystemExit):
        train(tmp_path / 'parts', signal_at=8)
    monkeypatch.setattr(engine.EpochBasedTrainLoop, 'load_state_dict', lambda self, state: None)
    assert not same(job_task.state(whole)['model'], job_task.state(train(tmp_path / 'parts', resume=True))['model'])


def test_signals_may_be_left_alone(tmp_path):
    runner = train(tmp_path, epochs=1, hooks=[HandlerIs(signal.getsignal(signal.SIGTERM))], preemptible=False)
    assert runner.iter == 6


class HandlerIs(Hook):
    """Assert the handler of SIGTERM during a training."""

    def __init__(self, handler):
        self.handler = handler

    def after_train_iter(self, runner, **kwargs):
        assert signal.getsignal(signal.SIGTERM) == self.handler


def test_handlers_are_restored_after_an_error(tmp_path):
    def fail():
        assert signal.getsignal(signal.SIGTERM) != handler
        raise Killed

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Killed):
        train(tmp_path, interrupt=(3, fail))
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize('options,message', [
    (dict(batch=4), '2 samples in an iteration of the train data, this training has 4'),
    (dict(data=[dict(inputs=torch.zeros(3, 16, 16), labels=0)] * 10),
     '12 samples in the dataset .*, this training has 10')])
@pytest.mark.parametrize('iterations', [None, 18])
def test_other_batches_are_refused(tmp_path, options, message, iterations):
    with pytest.raises(SystemExit):
        train(tmp_path, signal_at=8, iterations=iterations)
    with pytest.raises(ValueError, match=message + '.*load_from=CHECKPOINT'):
        train(tmp_path, resume=True, iterations=iterations, **options)


def test_a_checkpoint_of_another_loop_begins_the_epoch_anew(tmp_path, caplog):
    train(tmp_path, epochs=1)
    checkpoint = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    del checkpoint['loop']
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')
    assert train(tmp_path, epochs=2, resume=True).iter == 12


@pytest.mark.slow
def test_signals_to_a_whole_process_group(tmp_path):
    """Schedulers and torchrun signal dataloader workers, too, which would take the training with them."""
    options = dict(work_dir=str(tmp_path / 'parts'), workers=2, persistent=True)
    begin = time.time()
    finish(start_jobs(dict(options, signal_at=8, signal_group=True, slow=0.05)), returncode=75)
    assert time.time() - begin < 60
    saved = torch.load(tmp_path / 'parts' / 'preempted.pth', weights_only=True)['meta']
    assert (saved['epoch'], saved['iter']) == (1, 8)


class SignalledWorkers(Hook):
    priority = 'HIGHEST'

    def before_train(self, runner):
        runner.train_loop.dataloader.worker_init_fn = self.signal_itself

    @staticmethod
    def signal_itself(worker):
        for number in engine.preemption.SIGNALS:
            os.kill(os.getpid(), number)


def test_workers_are_shielded_from_their_first_moment(tmp_path):
    runner = train(tmp_path, workers=1, epochs=2, hooks=[SignalledWorkers()])
    assert runner.iter == 12 and not (tmp_path / 'preempted.pth').exists()


class Shielded(Images):
    """Says whether its process ignores SIGUSR1."""

    def __getitem__(self, index):
        return int(signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN)


def note(folder, worker):
    (folder / str(worker)).touch()


def test_a_worker_obeys_its_parent_alone(tmp_path):
    data = stream(DefaultSampler(Shielded(), shuffle=False), data=Shielded(), num_workers=2,
                  worker_init_fn=partial(note, tmp_path))
    assert [next(data).tolist() for _ in range(2)] == [[1, 1, 1]] * 2  # a batch of each worker
    assert {path.name for path in tmp_path.iterdir()} == {'0', '1'}  # whose own initialisation is kept
    workers = data._iterator._workers
    try:
        subprocess.run(['kill', '-TERM', str(workers[0].pid)], check=True)
        workers[0].join(0.5)
        assert workers[0].is_alive()
        os.kill(workers[0].pid, signal.SIGTERM)
        workers[0].join(20)
        assert workers[0].exitcode == 0
    except AssertionError:
        for worker in workers:  # the interpreter would wait for those that do not obey
            worker.kill()
        raise
    data.close()


# ---- SIGKILL ----

@pytest.mark.slow
def test_killed_at_a_random_iteration(tmp_path):
    kill_at = int(np.random.default_rng().integers(1, 18))
    options = dict(work_dir=str(tmp_path / 'parts'), workers=1)
    finish(start_jobs(dict(options, kill_at=kill_at)), returncode=-signal.SIGKILL)
    finish(start_jobs(dict(options, resume=True), dict(options, work_dir=str(tmp_path / 'whole'))))
    whole, resumed = (torch.load(tmp_path / name / 'state0.pt') for name in ('whole', 'parts'))
    assert same(whole, resumed), f'killed at iteration {kill_at}'


KILLED_WRITER = '''
import os, runpy, signal, sys, threading, time
write_whole = runpy.run_path(sys.argv[1])['write_whole']  # without the package, which would import torch
path, delay = sys.argv[2], float(sys.argv[3])
def kill():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
number = 0
while True:
    number += 1
    write_whole(path, str(number % 10).encode() * 3_000_000)
'''


def test_killed_while_it_writes(tmp_path):
    """After a kill at any time, the file is whole and one of those that were written."""
    path = tmp_path / 'file'
    for delay in np.linspace(0.01, 0.1, 6):
        arguments = [str(ROOT / 'mmlocalmamba' / 'files.py'), str(path), str(delay)]
        assert subprocess.run([sys.executable, '-c', KILLED_WRITER, *arguments]).returncode == -signal.SIGKILL
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 3_000_000 and len(set(content)) == 1
    assert path.exists()


def checkpoints(folder):
    return sorted(path.name for path in folder.glob('*.pth*'))


class Killed(Exception):
    pass


@pytest.mark.parametrize('moment', ['replace', 'fsync'])
def test_the_previous_checkpoint_outlives_the_writing_of_the_next(tmp_path, monkeypatch, moment):
    """max_keep_ckpts is 1: MMEngine's hook removes the only one before it writes the next."""
    def killed(*args):
        raise Killed

    train(tmp_path, epochs=1)
    assert checkpoints(tmp_path) == ['epoch_1.pth']
    runner = job_task.build(tmp_path, epochs=2, resume=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, moment, killed)
        patch.setattr(os, 'remove', lambda path: None)  # a killed process does not clean up
        runner.train()
    left = checkpoints(tmp_path)
    assert left[0] == 'epoch_1.pth' and len(left) == 2 and left[1].endswith('.tmp')
    assert train(tmp_path, epochs=2, resume=True).iter == 12
    assert checkpoints(tmp_path) == ['epoch_2.pth']


def test_what_was_outdated_when_it_was_killed_is_removed(tmp_path, monkeypatch):
    def killed(path):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, 'remove', killed)
        train(tmp_path, epochs=2)
    assert checkpoints(tmp_path) == ['epoch_1.pth', 'epoch_2.pth']
    train(tmp_path, epochs=2, resume=True)
    assert checkpoints(tmp_path) == ['epoch_2.pth']


@pytest.mark.parametrize('record', ['', 'epoch_2.pth', 'gone.pth', None])
def test_resumption_takes_the_newest_whole_checkpoint(tmp_path, record):
    train(tmp_path, epochs=1)
    content = (tmp_path / 'epoch_1.pth').read_bytes()
    (tmp_path / 'epoch_2.pth').write_bytes(content[:len(content) // 2])
    (tmp_path / 'last_checkpoint').unlink()
    if record is not None:
        write_whole(str(tmp_path / 'last_checkpoint'), record and str(tmp_path / record))
    runner = job_task.build(tmp_path, epochs=1, resume=True)
    runner.train()
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_1.pth')
    assert runner.iter == 6


def test_the_latest_position_counts_and_not_the_latest_file(tmp_path):
    """A copy gives files new times. preempted.pth of an early life must not win."""
    with pytest.raises(SystemExit):
        train(tmp_path, epochs=2, signal_at=4)
    train(tmp_path, epochs=2, resume=True)
    (tmp_path / 'last_checkpoint').write_text('/nowhere/gone.pth')
    os.utime(tmp_path / 'preempted.pth', (2 ** 33, 2 ** 33))
    assert train(tmp_path, epochs=2, resume=True).iter == 12
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_2.pth')
    assert engine.checkpoints.progress(tmp_path / 'preempted.pth') == (0, 4, True)
    (tmp_path / 'epoch_3.pth').write_bytes(b'PK')
    assert engine.checkpoints.progress(tmp_path / 'epoch_3.pth') == (-1, -1, False)


def test_without_any_checkpoint_the_training_begins(tmp_path):
    """An empty last_checkpoint is what a killed MMEngine leaves. One that names a file is an error if that is gone."""
    (tmp_path / 'last_checkpoint').touch()
    assert train(tmp_path, epochs=1, resume=True).iter == 6
    (tmp_path / 'epoch_1.pth').unlink()
    with pytest.raises(FileNotFoundError, match='epoch_1.pth'):
        train(tmp_path, epochs=1, resume=True)


class Files(Images):
    """Images in files, whose content plays no part."""

    def __init__(self, folder, names='abcdefghijkl', size=1):
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f'{name}.png' for name in names]
        for path in self.paths:
            path.write_bytes(b'x' * size)

    def get_data_info(self, index):
        return dict(img_path=str(self.paths[index]), label=1)


@pytest.mark.parametrize('other,told', [
    (dict(folder='moved'), False), (dict(names='abcdefghijkz'), True), (dict(size=2), True)])
def test_other_images_of_the_same_number_are_told(tmp_path, other, told, monkeypatch):
    messages = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: messages.append(record.getMessage()))
    with pytest.raises(SystemExit):
        train(tmp_path, epochs=1, data=Files(tmp_path / 'images'), signal_at=4)
    folder = tmp_path / other.pop('folder', 'images')
    assert train(tmp_path, epochs=1, data=Files(folder, **other), resume=True).iter == 6
    assert any('the names or sizes of the files of the train data differ' in message for message in messages) == told


def test_what_has_no_files_has_no_fingerprint():
    class Broken(Images):
        def get_data_info(self, index):
            raise KeyError

    assert engine.data.fingerprint(Images()) is None and engine.data.fingerprint(Broken()) is None


def test_best_checkpoints_are_replaced_after_they_are_written(tmp_path, monkeypatch):
    hook = engine.CheckpointHook(save_best='score', rule='greater', max_keep_ckpts=1)
    runner = job_task.build(tmp_path, epochs=1)
    runner.train()
    hook.before_train(runner)
    order = []
    monkeypatch.setattr(engine.checkpoints, 'write_whole',
                        lambda path, content: order.append(path) or write_whole(path, content))
    monkeypatch.setattr(os, 'remove', lambda path, remove=os.remove: order.append(path) or remove(path))

    def validated(score):
        hook.after_val_epoch(runner, dict(score=score))
        hook.after_val(runner)

    validated(1.)
    first = hook.best_ckpt_path
    validated(2.)  # the same epoch, so the same file: it must stay
    assert Path(first).exists() and order == [first, first]
    runner.train_loop._epoch = 5
    validated(3.)
    assert order[2:] == [str(tmp_path / 'best_score_epoch_5.pth'), first] and not Path(first).exists()


def test_the_soak_sees_every_difference(tmp_path):
    for name in ('first', 'second'):
        train(tmp_path / name, epochs=1)
    assert soak.compare(tmp_path / 'first', tmp_path / 'second') == (['epoch_1.pth'], [])
    path = tmp_path / 'second' / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['state_dict']['fc.2.bias'][0] = checkpoint['state_dict']['fc.2.bias'][0].nextafter(torch.tensor(1e9))
    checkpoint['optimizer']['state'][0]['step'] += 1
    checkpoint['message_hub']['log_scalars']['train/loss']['log_history'][2] += 1e-7
    torch.save(checkpoint, path)
    assert soak.compare(tmp_path / 'first', tmp_path / 'second')[1] == [
        'epoch_1.pth/state_dict/fc.2.bias', 'epoch_1.pth/optimizer/state/0/step', 'epoch_1.pth/losses/train/loss/0/2']


def test_the_soak_sees_growth():
    assert soak.flat(soak.growth([100.] * 80)) is True
    assert soak.flat(soak.growth([100.] * 40 + [106.] * 40)) is False
    assert soak.flat(soak.growth([100.] * 20 + [106.] * 20)) is None  # too few to tell


def test_the_soak_knows_a_validation_by_the_log(tmp_path):
    """The validation after every second epoch starts with a checkpoint and ends with its last log line."""
    job = soak.Job(ROOT / 'configs/mask-rcnn_localvmamba-nano_digits.py', tmp_path, 4, 9,
                   SimpleNamespace(seed=0, processes=1))
    assert 'param_scheduler.1.end=9' in job.command and 'param_scheduler.0.end=9' not in job.command
    stages = [('Saving checkpoint at 1 epochs', False), ('Saving checkpoint at 2 epochs', True),
              ('Epoch(val) [2][10/15]    eta: 0:00:01', True), ('Epoch(val) [2][15/15]    score: 1', False),
              ('Saving checkpoint at 3 epochs', False)]
    for second, (line, validating) in enumerate(stages):
        with open(job.log, 'a') as log:
            log.write(f'11/24 14:00:0{second} - mmengine - INFO - {line}\n')
        assert job._validating() is validating, line
    assert job.validation_seconds() == [2.]
    job.log_begin = job.log.stat().st_size  # the next life has logged nothing yet
    for job.due in (True, False):
        assert job._validating() is job.due
