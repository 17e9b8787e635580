"""Nothing is changed by an import; checkpoints are read by every process, and none that executes code by ours."""
import subprocess
import sys
import threading

import job_task
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from mmengine.runner import load_checkpoint as mmengine_load
from processes import ROOT

from mmlocalmamba import config_path
from mmlocalmamba.files import allow_checkpoints, load_checkpoint
from mmlocalmamba.openmmlab.compat import BEFORE_MIM, weights_only
from mmlocalmamba.openmmlab.engine.checkpoints import histories, to_plain_values

# What the package of the first version replaced, by identity.
STATE = '''
import sys, torch
import mmengine.runner.checkpoint as checkpoint
from mmengine.config import utils
from mmengine.registry import DATASETS
def state():
    return [id(checkpoint.load_url), id(getattr(checkpoint, '_safe_torch_load', None)), id(DATASETS.build_func),
            {name: id(loader) for name, loader in checkpoint.CheckpointLoader._schemes.items()},
            list(utils.MODULE2PACKAGE.items()), id(torch.load),
            {item for item in torch.serialization.get_safe_globals()  # torch's parts add their own
             if not getattr(item, '__module__', '').startswith('torch.')}]
before = state()
import mmlocalmamba, mmlocalmamba.ops, mmlocalmamba.backbones, mmlocalmamba.weights
import mmlocalmamba.openmmlab.engine, mmlocalmamba.openmmlab.search_hook
assert state() == before, (before, state())
'''
LIGHT = '''
import sys
import mmlocalmamba, mmlocalmamba.ops, mmlocalmamba.directions
loaded = [name for name in sys.modules if name.split('.')[0] in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')]
assert not loaded, loaded
'''


@pytest.mark.parametrize('code', [STATE, LIGHT], ids=['patches', 'imports'])
@pytest.mark.slow
def test_an_import_changes_nothing(code):
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_a_configuration_changes_nothing():
    """Reading one of ours is no reason to treat other packages' checkpoints in another way. What it adds are names and
    addresses that nothing else reads."""
    code = STATE.replace('import mmlocalmamba, ', 'from mmengine.config import Config\n'
                         'import mmlocalmamba\n'
                         "Config.fromfile(mmlocalmamba.config_path('mask-rcnn_localvmamba-t_1x_coco'))\n"
                         'import re\nfrom mmlocalmamba.weights.released import NAMED\n'
                         'addresses = [re.escape(entry.file) for entry in NAMED.values() if not entry.packaged]\n'
                         "for name in ('weights_only:', 'mmlocalmamba://', r'.*\\.safetensors$', *addresses):\n"
                         '    del checkpoint.CheckpointLoader._schemes[name]\n'
                         'import ')
    assert 'Config.fromfile' in code and 'safetensors' in code
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


# ---- mim's own traceback ----

STARTER = """
import subprocess, sys
subprocess.check_call([sys.executable, '-c', sys.argv[1]])
"""
TRAINING = """
from mmlocalmamba.openmmlab.checks import TrainingChecksHook
TrainingChecksHook()
TrainingChecksHook()
raise ValueError('the reason')
"""


@pytest.mark.parametrize('name', ['mim', 'other'])
@pytest.mark.slow
def test_an_error_under_mim_says_where_it_is(name, tmp_path):
    """mim, whose program this stands for, prints a traceback of its own after that of the training."""
    (tmp_path / name).write_text(STARTER)
    done = subprocess.run([sys.executable, tmp_path / name, TRAINING], cwd=ROOT, capture_output=True, text=True)
    pointer = f'{BEFORE_MIM}\n' if name == 'mim' else ''
    assert f'ValueError: the reason\n{pointer}Traceback (most recent call last):\n' in done.stderr
    assert 'CalledProcessError' in done.stderr.splitlines()[-1]


# ---- what torch may read ----

def mmengine_checkpoint(path):
    """As MMEngine's own hook writes it."""
    hub = dict(log_scalars=dict(loss=HistoryBuffer([1., 2.], [1, 1])))
    torch.save(dict(message_hub=hub, score=np.float64(3)), path)
    return path


def test_allowed_in_a_scope_that_ends(tmp_path):
    path = mmengine_checkpoint(tmp_path / 'x.pth')
    torch.serialization.add_safe_globals([np.ndarray])  # somebody else's
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(Exception, match='(?i)weights.only'):
        torch.load(path, weights_only=True)
    with allow_checkpoints():
        assert torch.load(path, weights_only=True)['score'] == 3
    assert load_checkpoint(path)['message_hub']['log_scalars']['loss'].mean(2) == 1.5
    assert set(torch.serialization.get_safe_globals()) == before >= {np.ndarray}
    with pytest.raises(RuntimeError), allow_checkpoints():
        raise RuntimeError
    assert set(torch.serialization.get_safe_globals()) == before
    with allow_checkpoints():  # by inferencers, too; OneDL's loader then takes away what others have allowed
        assert CheckpointLoader.load_checkpoint(str(path), 'cpu')['score'] == 3


def test_threads_load_at_the_same_time(tmp_path):
    """torch has one list of what files may name, for all threads."""
    path = mmengine_checkpoint(tmp_path / 'x.pth')
    before = set(torch.serialization.get_safe_globals())
    begun, ended = threading.Event(), threading.Event()

    def load():
        with allow_checkpoints():
            begun.set()
            ended.wait()

    thread = threading.Thread(target=load)
    thread.start()
    begun.wait()
    with allow_checkpoints():
        ended.set()
        thread.join()  # it leaves first
        assert torch.load(path, weights_only=True)['score'] == 3
    assert set(torch.serialization.get_safe_globals()) == before


class Steal:

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_only_history_buffers_use_getattr(tmp_path):
    torch.save(Steal(), tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match='x.pth was not loaded.*refused'):
        load_checkpoint(tmp_path / 'x.pth')


def test_other_schemes_stay_mmengines(tmp_path):
    for path in ('s3://bucket/x.pth', 'torchvision://resnet50', 'weights_only:x.pth'):
        assert weights_only(path) == path
    for path in ('x.pth', 'https://example.org/x.pth', tmp_path / 'x.pth'):
        assert weights_only(path) == f'weights_only:{path}'
        assert CheckpointLoader._get_checkpoint_loader(weights_only(path)).__module__ == 'mmlocalmamba.openmmlab.compat'
        assert CheckpointLoader._get_checkpoint_loader(str(path)).__module__ != 'mmlocalmamba.openmmlab.compat'
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        CheckpointLoader.load_checkpoint(weights_only(tmp_path / 'nowhere.pth'))


# ---- checkpoints of numbers and tensors ----

def test_plain_and_back():
    buffer = HistoryBuffer([0.1, float('nan'), 3.], [1, 2, 3], max_length=5)
    hub = dict(log_scalars={'train/loss': buffer, 'empty': HistoryBuffer(), 'odd': 3},
               runtime_info=dict(best=np.float32(0.1), palette=np.eye(2), names=('a', [np.int64(3)]), epoch=1))
    stored = to_plain_values(hub)
    assert stored['runtime_info'] == dict(best=float(np.float32(0.1)), palette=[[1., 0.], [0., 1.]],
                                          names=('a', [3]), epoch=1)
    assert type(stored['runtime_info']['names'][1][0]) is int
    back = histories(stored['log_scalars'])
    assert back['odd'] == 3 and len(back['empty'].data[0]) == 0
    for ours, theirs in zip(back['train/loss'].data, buffer.data):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert back['train/loss'].max_length == 5
    back['train/loss'].update(4.)
    assert len(buffer.data[0]) == 3  # nothing is shared


def test_any_process_reads_what_a_training_writes(tmp_path):
    """With torch alone, and as MMEngine's inferencers do: they load before they build anything of ours."""
    runner = job_task.build(tmp_path, epochs=1)
    runner.train()
    code = f"import torch; print(sorted(torch.load('{tmp_path}/epoch_1.pth', weights_only=True)['message_hub']))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['log_scalars', 'resumed_keys', 'runtime_info']"
    mmengine_load(runner.model, str(tmp_path / 'epoch_1.pth'), map_location='cpu')

    resumed = job_task.build(tmp_path, epochs=2, resume=True)
    history = runner.message_hub.get_scalar('train/loss').data[0].copy()
    MessageHub._instance_dict.pop(resumed.message_hub.instance_name, None)
    resumed.train()
    longer = resumed.message_hub.get_scalar('train/loss').data[0]
    assert len(longer) == 12 and np.array_equal(longer[:6], history)


def test_checkpoints_of_mmengine_are_resumed(tmp_path):
    """Written by its own hook: with HistoryBuffers."""
    first = job_task.build(tmp_path, epochs=1)
    for hook in first.hooks:
        type(hook).__name__ == 'CheckpointHook' and vars(hook).update(before_save_checkpoint=lambda *args, **kwargs: 0)
    first.train()
    with pytest.raises(Exception, match='(?i)weights.only'):
        torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    resumed = job_task.build(tmp_path, epochs=2, resume=True)
    resumed.train()
    assert resumed.iter == 12 and len(resumed.message_hub.get_scalar('train/loss').data[0]) == 12


# ---- configurations ----

def test_a_scope_of_configurations_is_not_promised(tmp_path):
    """MMEngine knows a fixed list of scopes, and wants a folder in the name; config_path is the way."""
    path = tmp_path / 'mine.py'
    name = 'localvim-nano_digits'
    path.write_text(f"_base_ = 'mmlocalmamba::{name}.py'\n")
    with pytest.raises(ValueError, match='package name and relative config path'):
        Config.fromfile(path)
    path.write_text(f"_base_ = __import__('mmlocalmamba').config_path('{name}')\n")
    assert Config.fromfile(path).model == Config.fromfile(config_path(name)).model


def test_scope_is_found_without_custom_imports():
    code = ('from mmengine.registry import MODELS, HOOKS\n'
            "model = MODELS.build(dict(type='mmlocalmamba.LocalVMamba', arch='nano'))\n"
            "MODELS.build(dict(type='mmlocalmamba.SCAttn', channels=16))\n"
            "HOOKS.build(dict(type='mmlocalmamba.LoadCheckpointHook'))\n"
            'print(type(model).__module__)')
    result = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert result.stdout.strip().endswith('mmlocalmamba.openmmlab.models')
