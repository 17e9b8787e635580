"""Files that are broken, or that somebody has made to do harm: a clear error that names the file, and nothing else."""
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import job_task
import pytest
import torch
from loss_task import build_runner, configure
from mmengine.registry import DATASETS, init_default_scope

from mmlocalmamba.backbones import LocalVMamba
from mmlocalmamba.compat import load_checkpoint
from mmlocalmamba.engine import broken_files

ROOT = Path(__file__).parents[1]
ARCH = dict(embed_dims=[8, 16], depths=[1, 1], d_state=1)


class Payload:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint with a payload, and the folder that it would make."""
    weights = LocalVMamba(ARCH, directions=['h']).state_dict()
    torch.save(dict(state_dict={f'backbone.{name}': value for name, value in weights.items()},
                    extra=Payload(tmp_path / 'executed')), tmp_path / 'hostile.pth')
    yield tmp_path / 'hostile.pth'
    assert not (tmp_path / 'executed').exists()


@pytest.fixture
def truncated(tmp_path):
    torch.save(dict(state_dict=LocalVMamba(ARCH, directions=['h']).state_dict()), tmp_path / 'truncated.pth')
    content = (tmp_path / 'truncated.pth').read_bytes()
    (tmp_path / 'truncated.pth').write_bytes(content[:len(content) // 2])
    return tmp_path / 'truncated.pth'


def test_the_payload_works(tmp_path):
    """So that the tests below can fail."""
    torch.save(Payload(tmp_path / 'executed'), tmp_path / 'hostile.pth')
    torch.load(tmp_path / 'hostile.pth', weights_only=False)
    assert (tmp_path / 'executed').is_dir()


def pretrained(path):
    model = LocalVMamba(ARCH, directions=['h'], init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()


def work_dir(path):
    return Path(path).parent / 'work' if os.path.exists(path) else Path(tempfile.mkdtemp())


def resume(path):
    job_task.build(work_dir(path), resume=True, epochs=1, load_from=str(path)).train()


def load_from(path):
    job_task.build(work_dir(path), epochs=1, load_from=str(path)).train()


def own_configuration(path):
    """Of somebody who has MMEngine's checkpoint hook, and ours for load_from."""
    runner = job_task.build(work_dir(path), epochs=1, load_from=str(path))
    runner._hooks = [hook for hook in runner.hooks if type(hook).__name__ != 'CheckpointHook']
    runner.train()


def resume_latest(path):
    folder = work_dir(path)
    folder.mkdir()
    (folder / 'last_checkpoint').write_text(str(path))
    with zipfile.ZipFile(path, 'a'):  # the truncated one gets an end again: no other is looked for
        pass
    job_task.build(folder, resume=True, epochs=1).train()


def tool(script, *out):
    def run(path):
        result = subprocess.run(
            [sys.executable, str(ROOT / 'tools' / script), str(path), *map(str, out)],
            cwd=path.parent, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
        assert result.returncode != 0 and 'Traceback' not in result.stderr, result.stderr
        raise RuntimeError(result.stderr)
    return run


LOADERS = dict(load=load_checkpoint, init_cfg=pretrained, resume=resume, load_from=load_from,
               own_configuration=own_configuration, resume_latest=resume_latest,
               convert=tool('model_converters/official_to_mmlocalmamba.py', 'out.pth'),
               derive_directions=tool('search/derive_directions.py'))


@pytest.mark.parametrize('loader', LOADERS)
def test_a_file_that_executes_is_refused(loader, hostile):
    with pytest.raises(RuntimeError, match='hostile.pth was not loaded.*Files that execute code are refused'):
        LOADERS[loader](hostile)


@pytest.mark.parametrize('loader', LOADERS)
def test_a_truncated_checkpoint_is_named(loader, truncated):
    with pytest.raises(RuntimeError, match='truncated.pth was not loaded.*is damaged'):
        LOADERS[loader](truncated)


def test_urls_are_loaded_without_execution(hostile, monkeypatch):
    """With a cache in place of a network."""
    monkeypatch.setenv('TORCH_HOME', str(hostile.parent))
    cache = hostile.parent / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    hostile.rename(cache / 'hostile.pth')
    for load in (load_checkpoint, load_from, resume):
        with pytest.raises(RuntimeError, match='https://example.org/hostile.pth was not loaded.*weights.only'):
            load('https://example.org/hostile.pth')


@pytest.mark.parametrize('loader', ['init_cfg', 'load_from', 'resume'])
def test_a_checkpoint_of_another_architecture_is_refused(loader, tmp_path):
    other = LocalVMamba(dict(ARCH, embed_dims=[4, 8]), directions=['h'])
    torch.save(dict(state_dict={f'backbone.{name}': value for name, value in other.state_dict().items()},
                    meta=dict(epoch=0, iter=0), message_hub={}), tmp_path / 'other.pth')
    with pytest.raises(RuntimeError, match='(?s)patch_embed.*not of this|of another model'):
        LOADERS[loader](tmp_path / 'other.pth')


# ---- directions.json ----

@pytest.mark.parametrize('content,message', [
    ('[' * 100_000, 'is not JSON.*recursion'),
    ('{"directions": ' + '[' * 5000 + ']' * 5000 + '}', 'is not JSON.*recursion|must be a list of scan names'),
    ('[' + '"h", ' * 500_000 + '"h"]', 'larger than 1048576 bytes'),
    ('{"a": ' + '9' * 5000 + '}', 'is not JSON.*digits'),
    ('\xff\xfe'.encode('latin1'), 'is not JSON'),
    ('', 'is not JSON'),
    ('{"directions": {"h": 1}}', 'must be a list of scan names'),
    ('[["h"], [1]]', 'unknown scan 1'),
    ('["w100000"]', 'K from 1 to 256'),  # 10^10 pads
    ('["w' + '9' * 5000 + '"]', 'unknown scan'),
    ('["../../../etc/passwd"]', 'unknown scan'),
    ('["__import__(\'os\').system(\'true\')"]', 'unknown scan'),
], ids=range(12))
def test_hostile_directions(content, message, tmp_path):
    path = tmp_path / 'directions.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        LocalVMamba(ARCH, directions=str(path))
    assert len(str(error.value)) < 2000 and 'directions.json' in str(error.value)


@pytest.mark.parametrize('path', ['/dev/zero', '/proc/self', '/', '~', '../nowhere/directions.json', 'a\0b'])
def test_directions_from_strange_places(path):
    with pytest.raises(ValueError, match='directions=|not JSON'):
        LocalVMamba(ARCH, directions=path)


def test_directions_from_a_pipe_do_not_wait(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ValueError, match='pipe.*not a regular file'):
        LocalVMamba(ARCH, directions=str(tmp_path / 'pipe'))


# ---- data ----

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


DAMAGE = dict(missing=Path.unlink, truncated=truncate, empty=lambda path: path.write_bytes(b''),
              text=lambda path: path.write_text('404: not found'))


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('task,key', [*((task, 'img_path') for task in CONFIGS), ('segmentation', 'seg_map_path')])
def test_an_image_that_cannot_be_read_is_named(digits, task, key, damage):
    data = dataset(digits, task)
    data.prepare_data = broken_files._Reader(data)
    assert data[0] and data[1]
    DAMAGE[damage](Path(data.get_data_info(1)[key]))
    assert data[0]
    with pytest.raises(RuntimeError, match='sample 1 of .* was not loaded') as error:
        data[1]
    assert f': {data.get_data_info(1)[key]} cannot be read' in str(error.value)


@pytest.mark.parametrize('damage', [truncate, lambda path: path.write_text(''), lambda path: path.write_text('[]'),
                                    lambda path: path.write_text('{"images": []}'),
                                    lambda path: path.write_bytes(b'\xff\xfe'),
                                    lambda path: path.write_text(path.read_text().replace('bbox', 'box'))],
                         ids=range(6))
def test_annotations_that_cannot_be_read_are_named(digits, damage):
    damage(digits / INSTANCES)
    with pytest.raises(RuntimeError, match='instances_train.json was not read as annotations'):
        dataset(digits, 'detection')


def test_missing_annotations_are_named(digits):
    (digits / INSTANCES).unlink()
    with pytest.raises(FileNotFoundError, match='instances_train.json'):
        dataset(digits, 'detection')


def test_an_annotation_that_makes_no_mask_names_its_image(digits):
    content = json.loads((digits / INSTANCES).read_text())
    for annotation in content['annotations']:
        annotation['segmentation'] = dict(size=[128, 128], counts=[[1]])
    (digits / INSTANCES).write_text(json.dumps(content))
    data = dataset(digits, 'detection')
    data.prepare_data = broken_files._Reader(data)
    with pytest.raises(RuntimeError, match='sample 0 of CocoDataset was not loaded: its files are .*train/.*png'):
        data[0]


def runner(digits, task, name, skip, workers=1):
    cfg = configure(digits, CONFIGS[task], digits.parent / name, iterations=3, batch=4, workers=workers)
    cfg.launcher, cfg.default_hooks.broken_files.skip = 'none', skip
    cfg.experiment_name = f'{digits.parent.name}_{name}'
    return build_runner(cfg)


def damage_half(digits, task):
    broken = sorted((digits / IMAGES[task]).rglob('*.png'))[::2]
    for number, path in enumerate(broken):
        list(DAMAGE.values())[1 + number % 3](path)
    return broken


@pytest.mark.parametrize('task', CONFIGS)
def test_a_training_stops_or_skips(digits, task):
    broken = damage_half(digits, task)
    with pytest.raises(RuntimeError, match=r'png cannot be read'):
        runner(digits, task, 'stop', skip=0).train()
    assert not (digits.parent / 'stop' / 'skipped_files.txt').exists()

    runner(digits, task, 'skip', skip=len(broken)).train()
    skipped = (digits.parent / 'skip' / 'skipped_files.txt').read_text().splitlines()
    assert 0 < len(skipped) == len(set(skipped)) and set(map(Path, skipped)) <= set(broken)
    log = ''.join(path.read_text() for path in (digits.parent / 'skip').rglob('*.log'))
    assert all(f'{path} cannot be read' in log for path in skipped)
    assert f'{len(skipped)} files were left out of the training' in log


def test_a_training_skips_no_more_than_it_may(digits):
    damage_half(digits, 'classification')
    with pytest.raises(RuntimeError, match=r'1 files were left out before.*BrokenFilesHook\(skip=...\)'):
        runner(digits, 'classification', 'few', skip=1).train()
    assert len((digits.parent / 'few' / 'skipped_files.txt').read_text().splitlines()) == 1


def test_a_validation_never_skips(digits, tmp_path):
    hook = broken_files.BrokenFilesHook(skip=100)
    data = dataset(digits, 'classification')
    Path(data.get_data_info(0)['img_path']).unlink()

    class Loop:
        dataloader = torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([data]))  # in a wrapper

    class Runner:
        val_loop = test_loop = Loop

    for start in (hook.before_val, hook.before_test):
        start(Runner)
        with pytest.raises(RuntimeError, match='cannot be read'):
            data[0]
    with pytest.raises(RuntimeError, match='cannot be read'):
        pickle.loads(pickle.dumps(data))[0]  # as in workers that are spawned
    with pytest.raises(ValueError, match='skip must be at least 0, got -1'):
        broken_files.BrokenFilesHook(skip=-1)
