"""Checkpoints on their way into a whole model: `mim test`, load_from, resuming, with and without an average."""
import copy
import importlib.util
import pickle
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from file_server import saved, serving
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint
from processes import PYTHON, ROOT, finish, start
from torch import nn

from mmlocalmamba import files
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.layers import resize_pos_embed
from mmlocalmamba.openmmlab.checkpoint_hook import other_classes
from mmlocalmamba.weights import to_official
from mmlocalmamba.weights.released import NAMED, Weights

KEYS = ['state_dict', 'model', 'state_dict_ema', None]
ARCH = dict(embed_dims=16, num_layers=2, d_state=2)


def random(model):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in model.state_dict().items()}


def wrapped(weights, key):
    return weights if key is None else {key: weights, 'epoch': 3}


# `mim test` with a configuration of ImageNet, its average included, on other data.
CONFIG = """
_base_ = '{root}/configs/localvim-t_8xb128_in1k.py'
model = dict(backbone=dict(arch={arch}, img_size=32, patch_size=8, directions=['h', 'w2']),
             head=dict(in_channels=16, num_classes=10))
data_preprocessor = dict(num_classes=10)
test_dataloader = dict(
    _delete_=True, batch_size=32, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='{data}', data_prefix='imagenet/val',
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
{more}
"""
NO_AVERAGE = 'custom_hooks = []'


@pytest.fixture(scope='module')
def classifier(tiny_digits, tmp_path_factory):
    """(configuration, one without an average, our weights, the scores that they give)."""
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('in1k')
    configs = {}
    for name, more in (('average', ''), ('plain', NO_AVERAGE)):
        configs[name] = folder / f'{name}.py'
        configs[name].write_text(CONFIG.format(root=ROOT, arch=dict(ARCH, _delete_=True), data=tiny_digits, more=more))
    assert any(hook.type == 'EMAHook' for hook in Config.fromfile(configs['average']).custom_hooks)
    cfg = Config.fromfile(configs['average'])
    runner = Runner.from_cfg(Config(dict(cfg, work_dir=str(folder), experiment_name='expected', custom_hooks=[])))
    weights = random(runner.model)
    runner.model.load_state_dict(weights)
    runner.model.eval()
    scores = [sample.pred_score for batch in runner.test_dataloader for sample in runner.model.test_step(batch)]
    return configs, weights, torch.stack(scores)


def by_mim(config, checkpoint, folder):
    """`mim test` as a user types it."""
    pytest.importorskip('mim')
    finish(start(*PYTHON, '-m', 'mim', 'test', 'mmpretrain', config, '--checkpoint', checkpoint, '--launcher', 'none',
                 '--out', folder / 'scores.pkl', '--out-item', 'pred', '--work-dir', folder / 'work'))


def by_its_script(config, checkpoint, folder):
    """Run the script of `mim test` in this process: a new one takes half a minute."""
    script = Path(importlib.util.find_spec('mmpretrain').origin).parent / '.mim' / 'tools' / 'test.py'
    arguments = [script, config, checkpoint, '--out', folder / 'scores.pkl', '--out-item', 'pred',
                 '--work-dir', folder / 'work', '--cfg-options', f'experiment_name={folder.name}']
    with mock.patch.object(sys, 'argv', list(map(str, arguments))):
        runpy.run_path(str(script), run_name='__main__')


# All entries, with an average and without, into a training: test_load_from_takes_the_authors_files.
@pytest.mark.parametrize('run, config, key', [
    (by_its_script, 'average', 'state_dict'), (by_its_script, 'average', None), (by_its_script, 'plain', 'model'),
    (by_its_script, 'plain', 'state_dict_ema'), pytest.param(by_mim, 'average', 'state_dict', marks=pytest.mark.slow)])
def test_mim_test_takes_the_authors_files(classifier, tmp_path, run, config, key):
    configs, weights, scores = classifier
    torch.save(wrapped(to_official(weights)[0], key), tmp_path / 'local_vim.ckpt')
    run(configs[config], tmp_path / 'local_vim.ckpt', tmp_path)
    found = torch.stack([sample['pred_score'] for sample in pickle.loads((tmp_path / 'scores.pkl').read_bytes())])
    torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-3)


def test_mim_test_takes_a_released_name(classifier, tmp_path, monkeypatch):
    configs, weights, scores = classifier
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('http_proxy', raising=False)
    with serving({'local_vim.ckpt': saved(dict(model=to_official(weights)[0]))}) as (address, asked):
        monkeypatch.setitem(NAMED, 'localvim_tiny.test', Weights('localvim-t_test', f'{address}/local_vim.ckpt'))
        by_its_script(configs['average'], f'{files.SCHEME}localvim_tiny.test', tmp_path)
    assert set(asked) == {'local_vim.ckpt'}
    found = torch.stack([sample['pred_score'] for sample in pickle.loads((tmp_path / 'scores.pkl').read_bytes())])
    torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_mim_test_takes_a_packaged_name(configuration, tmp_path):
    configuration('localvim-nano_digits').dump(tmp_path / 'digits.py')
    by_mim(tmp_path / 'digits.py', f'{files.SCHEME}localvim-nano_digits', tmp_path)
    samples = pickle.loads((tmp_path / 'scores.pkl').read_bytes())
    right = [bool(sample['pred_label'] == sample['gt_label']) for sample in samples]
    assert len(right) > 10 and sum(right) > 0.8 * len(right)


@pytest.mark.parametrize('lost, message', [
    (r'layers\.1\.mixer\.A_log_\d', '1 missing in the file: layers.1.mixer.ssm.A_log'),
    ('head.weight', '1 more parameters of ImageClassifier are not in .* this is a test, .*: head.fc.weight')])
@pytest.mark.slow
def test_mim_test_refuses_what_would_stay_random(classifier, tmp_path, lost, message):
    configs, weights, _ = classifier
    official = to_official(weights)[0]
    left = {name: value for name, value in official.items() if not re.fullmatch(lost, name)}
    assert len(left) < len(official)
    torch.save(left, tmp_path / 'local_vim.ckpt')
    with pytest.raises(RuntimeError, match=message):
        by_its_script(configs['average'], tmp_path / 'local_vim.ckpt', tmp_path)
    assert not (tmp_path / 'scores.pkl').exists()


class Classifier(BaseModel):
    """The least model that MMEngine trains: our backbone and a linear head."""

    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = LocalVim(ARCH, **{**dict(img_size=32, patch_size=8, directions=['h', 'w2']), **kwargs})
        self.head = nn.Module()
        self.head.fc = nn.Linear(16, 3)

    def forward(self, inputs, labels, mode='loss'):
        logits = self.head.fc(self.backbone(inputs)[-1])
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return logits.argmax(-1).tolist()


def build(tmp_path, model=None, ema=True, epochs=1, hook=None, **kwargs):
    data = [dict(inputs=torch.randn(3, 32, 32), labels=i % 3) for i in range(4)]
    return Runner(
        model=model or Classifier(), work_dir=str(tmp_path / 'work'), default_scope='mmengine',
        experiment_name=f'{tmp_path.name}-{len(list(tmp_path.iterdir()))}-{epochs}',
        train_dataloader=dict(batch_size=2, num_workers=0, dataset=data,
                              sampler=dict(type='DefaultSampler', shuffle=True),
                              collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        default_hooks=dict(checkpoint=dict(type='mmlocalmamba.CheckpointHook', interval=1)),
        custom_hooks=[*([dict(type='EMAHook', momentum=0.1, priority='ABOVE_NORMAL')] if ema else []),
                      dict(type='mmlocalmamba.LoadCheckpointHook', **hook or {})], **kwargs)


def average_of(runner):
    return next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').ema_model.module


def load(runner):
    """Do what a training does before its first step."""
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.call_hook('before_run')
    runner.load_or_resume()


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.slow
def test_load_from_takes_safetensors(tmp_path, ema, compiled):
    """And what a training saves after them is its own: it resumes."""
    weights = random(Classifier())
    files.save_safetensors(str(tmp_path / 'x.safetensors'), weights)
    weights = files.load_safetensors(str(tmp_path / 'x.safetensors'))['state_dict']
    compile = dict(compile=dict(backend='eager')) if compiled else {}
    runner = build(tmp_path, ema=ema, load_from=str(tmp_path / 'x.safetensors'), cfg=compile)
    load(runner)
    for model in (runner.model, average_of(runner)) if ema else (runner.model, ):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    runner.train()
    assert not torch.equal(runner.model.state_dict()['head.fc.bias'], weights['head.fc.bias'])
    second = build(tmp_path, ema=ema, epochs=2, resume=True, cfg=compile)
    load(second)
    assert second.epoch == 1
    assert all(torch.equal(value, runner.model.state_dict()[name]) for name, value in second.model.state_dict().items())


@pytest.mark.parametrize('key', KEYS)
@pytest.mark.parametrize('ema', [False, True])
def test_load_from_takes_the_authors_files(tmp_path, key, ema):
    weights = random(Classifier())
    torch.save(wrapped(to_official(weights)[0], key), tmp_path / 'local_vim.ckpt')
    runner = build(tmp_path, ema=ema, load_from=str(tmp_path / 'local_vim.ckpt'))
    load(runner)
    for model in (runner.model, average_of(runner)) if ema else (runner.model, ):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class Wrapper(nn.Module):
    """A wrapper of another library, which MMEngine does not know."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrapped_models_take_the_authors_files(tmp_path):
    weights = random(Classifier())
    runner = build(tmp_path, ema=False)
    load(runner)
    runner.model = Wrapper(Wrapper(runner.model))
    checkpoint = dict(model=to_official(weights)[0])
    runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    assert checkpoint['state_dict'].keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in checkpoint['state_dict'].items())


def test_another_entry_is_taken_when_it_is_named(tmp_path):
    weights = random(Classifier())
    average = {name: value + 1 for name, value in weights.items()}
    ema = {f'module.module.{name}': value for name, value in to_official(average)[0].items()}
    torch.save(dict(model=to_official(weights)[0], model_ema=ema), tmp_path / 'x.ckpt')
    for hook, expected in ((None, weights), (dict(key='model_ema'), average)):
        runner = build(tmp_path, hook=hook, load_from=str(tmp_path / 'x.ckpt'))
        load(runner)
        assert all(torch.equal(value, expected[name]) for name, value in average_of(runner).state_dict().items())


def test_resuming_is_untouched(tmp_path):
    """The average and the weights it is of are swapped in a checkpoint; both come back as they were."""
    first = build(tmp_path)
    first.train()
    weights, average = (copy.deepcopy(model.state_dict()) for model in (first.model, average_of(first)))
    assert not all(torch.equal(value, average[name]) for name, value in weights.items())
    second = build(tmp_path, epochs=2, resume=True)
    load(second)
    assert second.epoch == 1
    assert all(torch.equal(value, weights[name]) for name, value in second.model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in average_of(second).state_dict().items())
    checkpoint = dict(state_dict=average, message_hub={})
    second.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    assert checkpoint['state_dict'] is average


def test_nobody_resumes_from_the_authors_files(tmp_path):
    torch.save(dict(model=to_official(random(Classifier()))[0]), tmp_path / 'x.ckpt')
    with pytest.raises(RuntimeError, match="LocalVim's authors: a training cannot resume"):
        load(build(tmp_path, load_from=str(tmp_path / 'x.ckpt'), resume=True))


@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors'])
@pytest.mark.parametrize('meta', [{}, dict(epoch=1, iter=2)])  # as publish.py keeps it
def test_nobody_resumes_from_weights_alone(tmp_path, name, meta):
    path, weights = str(tmp_path / name), random(Classifier())
    if name == 'x.pth':
        torch.save(dict(state_dict=weights, meta=meta), path)
    else:
        files.save_safetensors(path, weights, meta)
    with pytest.raises(RuntimeError, match='holds only weights, .*: a training cannot resume from it. To start from'):
        load(build(tmp_path, load_from=path, resume=True))


def test_another_model_is_refused(tmp_path):
    torch.save(dict(state_dict={'backbone.conv.weight': torch.zeros(1)}), tmp_path / 'other.pth')
    with pytest.raises(RuntimeError, match=r'0 of \d+ weights of LocalVim come from the checkpoint'):
        load(build(tmp_path, load_from=str(tmp_path / 'other.pth')))
    vmamba = LocalVMamba(dict(embed_dims=[8], depths=[1], d_state=1), directions=['h'])
    torch.save(dict(model=to_official(vmamba.state_dict())[0]), tmp_path / 'vmamba.pth')
    with pytest.raises(RuntimeError, match='holds a LocalVMamba of 1 blocks and 8 channels: it is not of this'):
        load(build(tmp_path, load_from=str(tmp_path / 'vmamba.pth')))


def test_an_incomplete_backbone_is_reported_when_that_is_meant(tmp_path):
    weights = random(Classifier())
    lost = 'backbone.layers.1.mixer.in_proj.weight'
    torch.save(dict(state_dict={name: value for name, value in weights.items() if name != lost}), tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match=r'1 missing in the file: layers.1.mixer.in_proj.weight[\s\S]*set '
                       r'strict=False on the LoadCheckpointHook in custom_hooks\.$'):
        load(build(tmp_path, load_from=str(tmp_path / 'x.pth')))
    runner = build(tmp_path, hook=dict(strict=False), load_from=str(tmp_path / 'x.pth'))
    load(runner)
    for name, value in runner.model.state_dict().items():
        assert torch.equal(value, weights[name]) == (name != lost)


def test_a_new_head_is_trained_and_not_tested(tmp_path):
    weights = random(Classifier())
    weights.update({'head.fc.weight': torch.zeros(7, 16), 'head.fc.bias': torch.zeros(7)})
    torch.save(dict(state_dict=weights), tmp_path / 'x.pth')
    runner = build(tmp_path, load_from=str(tmp_path / 'x.pth'))
    load(runner)
    assert torch.equal(runner.model.backbone.pos_embed, weights['backbone.pos_embed'])
    with pytest.raises(RuntimeError, match='2 more parameters of Classifier .* this is a test.*: head.fc') as error:
        build(tmp_path, load_from=str(tmp_path / 'x.pth')).load_or_resume()
    assert 'the checkpoint has 7 classes, the configuration 3: set num_classes to 7' in str(error.value)
    assert 'strict=False' not in str(error.value)


class Heads(nn.Module):
    """Layers with one row for each class, with boxes for each class, with a background."""

    def __init__(self, classes):
        super().__init__()
        self.num_classes = classes
        self.label, self.box = nn.Linear(4, classes + 1), nn.Linear(4, 4 * classes)
        self.mask = nn.Conv2d(4, classes, 1)
        self.other = nn.Linear(4, 4)


@pytest.mark.parametrize('there, here', [(3, 4), (4, 3), (1, 3), (3, 1), (80, 10)])
def test_numbers_of_classes(there, here):
    weights = Heads(there).state_dict()
    assert f'the checkpoint has {there} classes, the configuration {here}' in other_classes(Heads(here), weights)
    assert not other_classes(Heads(there), weights)
    assert not other_classes(Heads(here), {**weights, 'other.weight': torch.zeros(4, 5)})
    assert not other_classes(Heads(here), {name: value for name, value in weights.items() if name != 'other.bias'})


@pytest.mark.parametrize('loader', ['load_from', 'load_checkpoint', 'load_state_dict'])
@pytest.mark.parametrize('official', [False, True])
def test_positions_of_another_image_size(tmp_path, loader, official, caplog):
    """As init_cfg resizes them; the authors' names are for the hook alone."""
    source = Classifier(img_size=64)
    weights = random(source)
    expected = Classifier(img_size=48)
    expected.backbone.load_state_dict({name[len('backbone.'):]: value for name, value in weights.items()
                                       if name.startswith('backbone.')})
    assert not torch.equal(expected.backbone.pos_embed, torch.zeros(()))
    torch.save(dict(state_dict=to_official(weights)[0] if official else weights), tmp_path / 'x.pth')
    model = Classifier(img_size=48)
    if loader == 'load_from':
        load(build(tmp_path, model, load_from=str(tmp_path / 'x.pth')))
    elif official:
        with pytest.raises(RuntimeError, match='no weight of it under "backbone."'):
            load_checkpoint(model, str(tmp_path / 'x.pth')) if loader == 'load_checkpoint' else \
                model.load_state_dict(to_official(weights)[0])
        return
    elif loader == 'load_checkpoint':
        load_checkpoint(model, str(tmp_path / 'x.pth'))
    else:
        model.load_state_dict(weights)
    corner = weights['backbone.pos_embed'][0, 0]
    assert model.backbone.pos_embed.shape == (1, 36, 16)
    assert torch.equal(model.backbone.pos_embed, expected.backbone.pos_embed)
    assert (model.backbone.pos_embed[0, 0] - corner).norm() < corner.norm()


@pytest.mark.parametrize('loader', ['load_from', 'load_checkpoint', 'load_state_dict'])
def test_positions_of_a_grid_with_as_many_tokens(tmp_path, loader):
    """4x4 into 2x8: once, whatever loads them, the average as well."""
    source, model = Classifier(img_size=32), Classifier(img_size=(16, 64))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'x.pth')
    expected = resize_pos_embed(source.backbone.pos_embed, (4, 4), (2, 8))
    if loader == 'load_from':
        runner = build(tmp_path, model, load_from=str(tmp_path / 'x.pth'))
        load(runner)
        assert torch.equal(average_of(runner).backbone.pos_embed, expected)
    elif loader == 'load_checkpoint':
        load_checkpoint(model, str(tmp_path / 'x.pth'))
    else:
        model.load_state_dict(source.state_dict())
    assert torch.equal(model.backbone.pos_embed, expected)


def test_released_weights_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('http_proxy', raising=False)
    weights, model = random(Classifier()), Classifier()
    with serving({'x.pth': saved(dict(model=to_official(weights)[0]))}) as (address, _):
        monkeypatch.setitem(NAMED, 'of-others', Weights('of-others', f'{address}/x.pth', dataset=None))
        load(build(tmp_path, model, load_from=f'{files.SCHEME}of-others'))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_images_of_other_channels(tmp_path):
    source, model = Classifier(), Classifier(in_channels=1)
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match="channels='sum' or channels='repeat' adapts it"):
        load(build(tmp_path, Classifier(in_channels=1), load_from=str(tmp_path / 'x.pth')))
    load(build(tmp_path, model, load_from=str(tmp_path / 'x.pth'), hook=dict(channels='sum')))
    torch.testing.assert_close(model.backbone.patch_embed.projection.weight,
                               source.backbone.patch_embed.projection.weight.sum(1, keepdim=True))


@pytest.mark.parametrize('loader', ['load_from', 'load_checkpoint', 'load_state_dict', 'resume'])
def test_checkpoints_carry_their_directions(tmp_path, loader):
    first = build(tmp_path, ema=False)
    first.train()
    path = str(tmp_path / 'work' / 'epoch_1.pth')
    same, other = Classifier(), Classifier(directions=['w2', 'h'])

    def into(model, **hook):
        if loader == 'load_checkpoint':
            load_checkpoint(model, path)
        elif loader == 'load_state_dict':
            state_dict = torch.load(path, weights_only=False)['state_dict']
            model.load_state_dict(dict(state_dict) if hook else state_dict)
        else:
            load(build(tmp_path, model, hook=hook, epochs=2, load_from=path, resume=loader == 'resume'))
        return model

    trained = first.model.backbone.pos_embed
    assert torch.equal(into(same).backbone.pos_embed, trained)
    with pytest.raises(RuntimeError, match=r'trained with h, w2 in block 0, here: w2, h in block 0 \(2 of 2 blocks'):
        into(other)
    if loader != 'load_checkpoint':
        assert torch.equal(into(other, allow=['directions']).backbone.pos_embed, trained)
