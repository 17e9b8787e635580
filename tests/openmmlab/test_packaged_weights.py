"""Packaged weights by every way of OpenMMLab's that takes a checkpoint, and their accuracy."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader, Runner
from processes import ROOT
from test_packaged import NANO, test_errors

from mmlocalmamba import files
from mmlocalmamba.files import load_checkpoint
from mmlocalmamba.openmmlab.compat import register_loader


def test_errors_by_mmengine(tmp_path):
    register_loader()
    test_errors(tmp_path, CheckpointLoader.load_checkpoint)


# ---- every way in ----

def same(model, path=NANO):
    expected = files.load_safetensors(path)['state_dict']
    own = model.state_dict()
    return own.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in own.items())


def test_init_cfg(configuration):
    runner = Runner.from_cfg(configuration('localvim-nano_digits', **{'model.backbone.init_cfg.checkpoint': NANO}))
    runner._train_loop = runner.build_train_loop(runner._train_loop)  # as runner.train() begins
    runner.call_hook('before_run')
    runner._init_model_weights()
    own = {f'backbone.{name}': value for name, value in runner.model.backbone.state_dict().items()}
    expected = files.load_safetensors(NANO)['state_dict']
    assert own and all(torch.equal(value, expected[name]) for name, value in own.items())


def test_load_from(configuration):
    runner = Runner.from_cfg(configuration('localvim-nano_digits', load_from=NANO))
    metrics = runner.test()
    assert same(runner.model) and metrics['accuracy/top1'] > 80  # 20 images or so


@pytest.mark.slow
def test_in_a_new_process(tmp_path):
    """The configuration alone brings the reader of the name."""
    program = f"""
from mmpretrain import ImageClassificationInferencer
infer = ImageClassificationInferencer({str(ROOT / 'configs/localvim-nano_digits.py')!r}, pretrained={NANO!r},
                                      device='cpu')
print(infer.classes)
"""
    printed = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, text=True, capture_output=True)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.splitlines()[-1] == str(tuple('0123456789'))


def test_by_name(no_scope, monkeypatch):
    from mmpretrain import get_model
    from mmpretrain.apis.model import ModelHub
    monkeypatch.setattr(ModelHub, '_models_dict', dict(ModelHub._models_dict))
    ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
    assert same(get_model('localvim-nano_digits', pretrained=True))


def test_detector(no_scope):
    from mmdet.apis import DetInferencer
    name = 'mask-rcnn_localvmamba-nano_digits'
    infer = DetInferencer(str(ROOT / f'configs/{name}.py'), files.SCHEME + name, device='cpu')
    assert same(infer.model, files.SCHEME + name) and infer.model.dataset_meta['classes'] == tuple('0123456789')


def test_segmentor(no_scope):
    from mmseg.apis import MMSegInferencer
    name = 'upernet_localvim-nano_digits'
    infer = MMSegInferencer(str(ROOT / f'configs/{name}.py'), files.SCHEME + name, device='cpu')
    assert same(infer.model, files.SCHEME + name)
    assert infer.model.dataset_meta['classes'] == ('background', *'0123456789')


# ---- what is in the package ----

def entries():
    models = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())['Models']
    return {entry['Name']: entry for entry in models if str(entry.get('Weights')).startswith(files.SCHEME)}


def test_the_model_zoo_lists_them():
    assert sorted(entries()) == files.packaged_names()
    assert all(entry['Weights'] == files.SCHEME + name and entry['Results'] for name, entry in entries().items())


@pytest.mark.parametrize('name', files.packaged_names())
def test_they_fill_their_models(name):
    """Not one weight is missing or left over, and class names are there."""
    from mmengine.registry import MODELS
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build({'data_preprocessor': cfg.get('data_preprocessor'), **cfg.model})
    loaded = load_checkpoint(files.SCHEME + name)
    model.load_state_dict(loaded['state_dict'], strict=True)
    assert loaded['meta']['dataset_meta']['classes']


METRICS = {'Top 1 Accuracy': 'accuracy/top1', 'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP', 'mIoU': 'mIoU'}
# Processors differ in their last digits, and a box at a threshold, or one image of 359, may fall the other way.
TOLERANCE = {'Top 1 Accuracy': 0.6, 'box AP': 0.5, 'mask AP': 0.5, 'mIoU': 0.3}


def results(config, checkpoint, options, folder):
    """Run the configuration's test and return its metrics."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    cfg.load_from, cfg.work_dir = checkpoint, folder
    cfg.experiment_name = f'{Path(config).stem}_packaged'
    return Runner.from_cfg(cfg).test()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    from dataset_converters import digits
    folder = tmp_path_factory.mktemp('digits') / 'digits'
    digits.generate(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', files.packaged_names())
def test_they_are_worth_what_is_said(name, request, tmp_path):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    root = Path(cfg.test_dataloader.dataset.data_root)
    if root.parts[1] == 'digits':
        folder = Path(request.getfixturevalue('digits'), *root.parts[2:])
    elif not (folder := ROOT / root).is_dir():
        pytest.skip(f'{root} is not here (docs/data.md)')
    options = {'test_dataloader.dataset.data_root': str(folder)}
    if 'ann_file' in cfg.test_evaluator:
        options['test_evaluator.ann_file'] = str(folder / 'annotations/instances_val.json')
    found = results(ROOT / f'configs/{name}.py', files.SCHEME + name, options, str(tmp_path))
    said = {metric: value for result in entries()[name]['Results'] for metric, value in result['Metrics'].items()}
    assert said
    for metric, value in said.items():
        scale = 100 if metric.endswith('AP') else 1
        assert scale * found[METRICS[metric]] == pytest.approx(value, abs=TOLERANCE[metric]), metric
