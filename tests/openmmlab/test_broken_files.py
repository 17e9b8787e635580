"""Files of the data that are missing or damaged: named, or left out."""
import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from loss_task import build_runner, configure
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import IterBasedTrainLoop
from PIL import Image
from processes import ROOT
from torch.utils.data import ConcatDataset, DataLoader

from mmlocalmamba.files import write_whole
from mmlocalmamba.openmmlab.engine import BrokenFilesHook, broken_files
from mmlocalmamba.openmmlab.engine.broken_files import SkippedFiles
from mmlocalmamba.openmmlab.engine.data import naming_annotation_files

CONFIGS = dict(classification='localvim-nano_digits', detection='mask-rcnn_localvmamba-nano_digits',
               segmentation='upernet_localvmamba-nano_digits')
IMAGES = dict(classification='imagenet/train', detection='coco/train', segmentation='ade/images/training')
INSTANCES = 'coco/annotations/instances_train.json'


@pytest.fixture
def digits(tiny_digits, tmp_path):
    return Path(shutil.copytree(tiny_digits, tmp_path / 'digits'))


def dataset(digits, task):
    cfg = configure(digits, CONFIGS[task], digits.parent / 'work', iterations=1)
    init_default_scope(cfg.default_scope)
    return DATASETS.build(cfg.train_dataloader.dataset)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def write_floats(path):
    """A TIFF that OpenCV reads as it is, but not in colour as the pipeline does."""
    Image.fromarray(np.ones((32, 32), np.float32)).save(path, format='TIFF')


DAMAGE = dict(missing=Path.unlink, truncated=truncate, empty=lambda path: path.write_bytes(b''),
              text=lambda path: path.write_text('404: not found'))


def watched(data, **kwargs):
    """Watch the dataset with the hook, as at the start of a test."""
    hook = BrokenFilesHook(**kwargs)
    loop = SimpleNamespace(dataloader=DataLoader(ConcatDataset([data])))  # in a wrapper
    hook.before_test(SimpleNamespace(test_loop=loop))
    return hook


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('task,key', [*((task, 'img_path') for task in CONFIGS), ('segmentation', 'seg_map_path')])
def test_an_image_that_cannot_be_read_is_named(digits, task, key, damage):
    data = dataset(digits, task)
    watched(data)
    assert data[0] and data[1]
    path = data.get_data_info(1)[key]
    DAMAGE[damage](Path(path))
    assert data[0]
    with pytest.raises(RuntimeError, match=f'^{re.escape(path)} cannot be read: sample 1 of {type(data).__name__} '):
        data[1]


@pytest.mark.parametrize('task', CONFIGS)
def test_a_picture_that_the_pipeline_cannot_read_is_skipped(digits, task, tmp_path):
    data = dataset(digits, task)
    path = data.get_data_info(1)['img_path']
    write_floats(path)
    data.prepare_data = broken_files._Reader(data, SkippedFiles(str(tmp_path / 'skipped.txt')), 1)
    assert data[1]
    assert (tmp_path / 'skipped.txt').read_text() == f'{path}\n'


BROKEN_ANNOTATIONS = [
    truncate, lambda path: path.write_text(''), lambda path: path.write_text('[]'),
    lambda path: path.write_text('{"images": []}'), lambda path: path.write_bytes(b'\xff\xfe'),
    lambda path: path.write_text(path.read_text().replace('bbox', 'box'))]


@pytest.mark.parametrize('damage', BROKEN_ANNOTATIONS, ids=range(6))
def test_annotations_that_cannot_be_read_are_named(digits, damage):
    path = digits / INSTANCES
    damage(path)
    with pytest.raises(RuntimeError, match=f'^{re.escape(str(path))} cannot be read as annotations '), \
            naming_annotation_files(), naming_annotation_files():
        dataset(digits, 'detection')
    with pytest.raises(Exception) as error:  # for other packages, it is their error
        dataset(digits, 'detection')
    assert 'instances_train.json' not in str(error.value)


def test_missing_annotations_are_named(digits):
    (digits / INSTANCES).unlink()
    with pytest.raises(FileNotFoundError, match='instances_train.json'), naming_annotation_files():
        dataset(digits, 'detection')


def test_other_errors_stay_what_they_are():
    with pytest.raises(KeyError, match='mine'), naming_annotation_files():
        raise KeyError('mine')


@pytest.mark.slow
@pytest.mark.parametrize('part', ['train', 'val'])
def test_a_training_names_its_annotations(digits, part):
    """The loop names files of the training data in any program; tools/train.py and tools/test.py name the others."""
    path = digits / f'coco/annotations/instances_{part}.json'
    truncate(path)
    if part == 'train':
        with pytest.raises(RuntimeError, match=f'^{re.escape(str(path))} cannot be read as annotations'):
            runner(digits, 'detection', 'work', skip=0).train()
    else:
        config = digits.parent / 'config.py'
        config.write_text(f"_base_ = __import__('mmlocalmamba').config_path('{CONFIGS['detection']}')\n"
                          f'train_dataloader = dict(dataset=dict(data_root={str(digits / "coco")!r}))\n'
                          f'val_dataloader = dict(dataset=dict(data_root={str(digits / "coco")!r}))\n')
        done = subprocess.run([sys.executable, str(ROOT / 'tools/train.py'), str(config), '--work-dir', 'work'],
                              cwd=digits.parent, capture_output=True, text=True)
        assert f'RuntimeError: {path} cannot be read as annotations' in done.stderr, done.stderr[-2000:]


def test_an_annotation_that_makes_no_mask_names_its_image(digits):
    content = json.loads((digits / INSTANCES).read_text())
    for annotation in content['annotations']:
        annotation['segmentation'] = dict(size=[128, 128], counts=[[1]])
    (digits / INSTANCES).write_text(json.dumps(content))
    data = dataset(digits, 'detection')
    watched(data, skip=100)  # no file is broken, so none can be skipped
    with pytest.raises(RuntimeError, match='^sample 0 of CocoDataset cannot be loaded from .*train/.*png '):
        data[0]


def runner(digits, task, name, skip, workers=1, **options):
    cfg = configure(digits, CONFIGS[task], digits.parent / name, iterations=3, batch=4, workers=workers,
                    options=options)
    cfg.launcher, cfg.default_hooks.broken_files.skip = 'none', skip
    cfg.default_hooks.checks.audit = False  # it names the files before the training
    cfg.experiment_name = f'{digits.parent.name}_{name}'
    return build_runner(cfg)


def damage_half(digits, task):
    broken = sorted((digits / IMAGES[task]).rglob('*.png'))[::2]
    for number, path in enumerate(broken):
        list(DAMAGE.values())[1 + number % 3](path)
    return broken


def untouched(data):
    return 'prepare_data' not in vars(data)


@pytest.mark.parametrize('task', CONFIGS)
@pytest.mark.slow
def test_a_training_stops_or_skips(digits, task):
    broken = damage_half(digits, task)
    stopped = runner(digits, task, 'stop', skip=0)
    with pytest.raises(RuntimeError, match=r'png cannot be read'):
        stopped.train()
    assert untouched(stopped.train_dataloader.dataset)
    assert not (digits.parent / 'stop' / 'skipped_files.txt').exists()

    done = runner(digits, task, 'skip', skip=len(broken))
    done.train()
    assert untouched(done.train_dataloader.dataset)
    skipped = (digits.parent / 'skip' / 'skipped_files.txt').read_text().splitlines()
    assert 0 < len(skipped) == len(set(skipped)) and set(map(Path, skipped)) <= set(broken)
    log = ''.join(path.read_text() for path in (digits.parent / 'skip').rglob('*.log'))
    assert all(f'{path} cannot be read' in log for path in skipped)
    assert f'{len(skipped)} files were skipped in the training' in log


@pytest.mark.slow
def test_a_training_skips_no_more_than_it_may(digits):
    damage_half(digits, 'classification')
    with pytest.raises(RuntimeError, match=r'1 file was skipped before.*BrokenFilesHook\(skip=...\)'):
        runner(digits, 'classification', 'few', skip=1).train()
    assert len((digits.parent / 'few' / 'skipped_files.txt').read_text().splitlines()) == 1
    # A new training begins a new list.
    with pytest.raises(RuntimeError, match=r'1 file was skipped before'):
        runner(digits, 'classification', 'few', skip=1).train()


@pytest.mark.parametrize('skip', [0, 100])
@pytest.mark.slow
def test_held_out_data_are_watched(digits, skip):
    """Held-out data of a direction search are trained on, too, so that files may be skipped."""
    cfg = configure(digits, CONFIGS['classification'], digits.parent / 'work', iterations=1, batch=4)
    held_out = dict(cfg.train_dataloader, dataset=dict(cfg.train_dataloader.dataset, data_prefix='imagenet/val'))
    broken = sorted((digits / 'imagenet/val').rglob('*.png'))[::2]
    for path in broken:
        truncate(path)
    search = dict(type='mmlocalmamba.ScanSearchHook', mode='bilevel', held_out=held_out)
    training = runner(digits, 'classification', 'search', skip, **{
        'model.backbone.directions': 'search', 'custom_hooks': [search]})
    if skip:
        training.train()
        skipped = (digits.parent / 'search' / 'skipped_files.txt').read_text().splitlines()
        assert skipped and set(map(Path, skipped)) <= set(broken)
    else:
        with pytest.raises(RuntimeError, match=r'imagenet/val/.*png cannot be read'):
            training.train()
    assert untouched(training.train_loop.loaders.streams['held_out'].dataset)


@pytest.mark.parametrize('moment', ['val', 'test'])
def test_a_validation_never_skips(digits, moment):
    hook = BrokenFilesHook(skip=100)
    data = dataset(digits, 'classification')
    Path(data.get_data_info(0)['img_path']).unlink()
    loop = SimpleNamespace(dataloader=DataLoader(data))
    running = SimpleNamespace(val_loop=loop, test_loop=loop, _train_loop=None)
    for _ in range(2):
        getattr(hook, f'before_{moment}')(running)
        getattr(hook, f'before_{moment}')(running)
        with pytest.raises(RuntimeError, match='cannot be read'):
            data[0]
        with pytest.raises(RuntimeError, match='cannot be read'):
            pickle.loads(pickle.dumps(data))[0]  # as in workers that are spawned
        getattr(hook, f'after_{moment}')(running)
        assert untouched(data)
    with pytest.raises(ValueError, match='skip must be at least 0, got -1'):
        BrokenFilesHook(skip=-1)


def test_a_training_watches_its_validation_to_the_end(digits):
    """Files are named in each run, also in the persistent workers of the first."""
    hook = BrokenFilesHook()
    data = dataset(digits, 'classification')
    loop = SimpleNamespace(dataloader=DataLoader(data))
    running = SimpleNamespace(val_loop=loop, _train_loop=object())
    hook.before_val(running)
    hook.after_val(running)
    assert not untouched(data)
    hook._release()
    assert untouched(data)


def test_the_loop_must_be_ours(digits):
    training = runner(digits, 'classification', 'work', skip=0)
    training._train_loop = dict(type=IterBasedTrainLoop, max_iters=1)
    training._hooks = [hook for hook in training.hooks if type(hook).__name__ != 'NumericalGuardHook']
    with pytest.raises(ValueError, match="BrokenFilesHook needs train_cfg.type='mmlocalmamba.EpochBasedTrainLoop'"):
        training.train()


# ---- the list of skipped files ----

def test_the_first_that_are_added_count(tmp_path):
    listed = SkippedFiles(str(tmp_path / 'list'))
    assert listed.names() == []
    assert listed.add(['a'], 2) == (True, True)
    assert listed.add(['a'], 2) == (True, False)
    assert listed.add(['b', 'c'], 2) == (False, True) and listed.names() == ['a']
    assert listed.add(['b'], 2) == (True, True)
    # Names that another process added meanwhile are on the list, in its order.
    with open(tmp_path / 'list', 'a') as file:
        file.write('b\nd\n')
    assert listed.names() == ['a', 'b', 'd']
    assert listed.add(['d'], 2) == (False, True) and listed.add(['d'], 3) == (True, False)


def add(path, name, out):
    out.put((name, SkippedFiles(path).add([name], 5)[0]))


def test_many_processes_share_a_list(tmp_path):
    context = multiprocessing.get_context('fork')
    out, path = context.SimpleQueue(), str(tmp_path / 'list')
    processes = [context.Process(target=add, args=(path, f'image {i}', out)) for i in range(12)]
    for process in processes:
        process.start()
    answers = dict(out.get() for _ in processes)
    for process in processes:
        process.join()
    allowed = [name for name, answer in answers.items() if answer]
    assert len(allowed) <= 5 and set(allowed) <= set(SkippedFiles(path).names()[:5])


def test_lines_that_get_lost_are_written_again(tmp_path, monkeypatch):
    """Processes on several machines that append to a file over a network write over each other."""
    path, writes = tmp_path / 'list', []

    class Losing(io.FileIO):

        def write(self, content):
            writes.append(content)
            return super().write(content) if len(writes) > 2 else len(content)

    monkeypatch.setattr(broken_files, 'open', lambda path, mode='r', **kwargs: (
        Losing(path, 'a') if 'b' in mode else open(path, mode)), raising=False)
    assert SkippedFiles(str(path)).add(['a', 'b'], 2) == (True, True)
    assert writes == [b'a\nb\n'] * 3 and path.read_text() == 'a\nb\n'


def test_another_process_may_be_quicker(tmp_path, monkeypatch):
    """Between the look at the list and the new line."""
    listed = SkippedFiles(str(tmp_path / 'list'))

    def append(path, mode='r', **kwargs):
        if 'b' in mode:
            (tmp_path / 'list').write_text('quicker\n')
        return open(path, mode, **kwargs)

    monkeypatch.setattr(broken_files, 'open', append, raising=False)
    assert listed.add(['slower'], 1) == (False, True)
    assert listed.names() == ['quicker', 'slower']


# ---- systems and file systems that lack something ----

@pytest.mark.slow
def test_configurations_run_without_locks_and_signals_of_unix():
    """As on Windows."""
    code = ('import sys, signal\n'
            'sys.modules["fcntl"] = None\n'
            'for name in ("SIGUSR1", "pthread_sigmask", "sigwaitinfo"):\n'
            '    delattr(signal, name)\n'
            'import mmlocalmamba.openmmlab.engine, mmlocalmamba.openmmlab.search_hook, mmlocalmamba.weights\n')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_file_system_that_cannot_sync_is_no_error(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, 'refused')

    monkeypatch.setattr(os, 'fsync', refuse)
    write_whole(str(tmp_path / 'file'), 'text')
    assert (tmp_path / 'file').read_text() == 'text' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('folder', [False, True])
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, folder):
    def fail(descriptor, fsync=os.fsync):
        if os.path.isdir(f'/proc/self/fd/{descriptor}') == folder:
            raise OSError(errno.EIO, 'broken disk')
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='broken disk'):
        write_whole(str(tmp_path / 'file'), 'text')
    assert (tmp_path / 'file').exists() == folder and not list(tmp_path.glob('*.tmp'))
