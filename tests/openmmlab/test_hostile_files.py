"""Files that are broken, or that somebody has made to do harm: a clear error that names the file, and nothing else."""
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import job_task
import pytest
import torch

from mmlocalmamba.backbones import LocalVMamba
from mmlocalmamba.files import load_checkpoint

ROOT = Path(__file__).parents[2]
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
    """A configuration with MMEngine's checkpoint hook, and ours for load_from."""
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
               derive_directions=tool('derive_directions.py'))


@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.slow
def test_a_file_that_executes_is_refused(loader, hostile):
    with pytest.raises(RuntimeError, match='hostile.pth was not loaded.*Files that execute code are refused'):
        LOADERS[loader](hostile)


@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.slow
def test_a_truncated_checkpoint_is_named(loader, truncated):
    with pytest.raises(RuntimeError, match='truncated.pth was not loaded.*is damaged'):
        LOADERS[loader](truncated)


def test_addresses_of_other_loaders_are_named():
    for load in (load_checkpoint, pretrained):
        with pytest.raises(RuntimeError, match='open-mmlab://resnet50 was not loaded: addresses begin with http://.* '
                                               "For weights of MMEngine's model zoo, download the file"):
            load('open-mmlab://resnet50')


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
    with pytest.raises(RuntimeError, match='(?s)patch_embed.*belongs to another backbone|of another model'):
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
