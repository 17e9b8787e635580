"""``python -m mmlocalmamba check``: its output for good and for wrong configurations."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlocalmamba.openmmlab.checks import trial

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Return the output of ``check``; assert that it agrees with the result, and that no files are left."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')

    def run(cfg):
        good = trial.check(cfg)
        assert not list((tmp_path / 'here').iterdir()), 'files are left'
        assert not (tmp_path / 'work').exists()
        output = capsys.readouterr().out
        assert good == ('No problems found.' in output) == ('problem ' not in output)
        return output

    return run


@pytest.mark.parametrize('name, phrases', [
    ('localvmamba-nano_digits', ['pictures, 10 classes', '│   9 ', 'step of 2 images on cpu: ', 'losses loss ',
                                 'note    LocalVMamba starts from scratch']),
    ('retinanet_localvmamba-nano_digits', ['boxes, 10 classes', 'loss_bbox']),
    ('upernet_localvim-nano_digits', ['pixels, 11 classes', 'decode.loss_dice']),
])
def test_a_good_configuration(name, phrases, configuration, said):
    output = said(configuration(name))
    for phrase in phrases:
        assert phrase in output


def test_all_problems_at_once(configuration, said, tmp_path):
    """Weights that are not there, and heads of another number of classes."""
    output = said(configuration('localvmamba-nano_digits', 'model = dict(head=dict(num_classes=7))',
                                **{'model.backbone.init_cfg.checkpoint': str(tmp_path / 'none.pth')}))
    assert 'none.pth' in output and 'head num_classes=7' in output
    assert '\n2 problems' in output


def test_an_image_that_is_not_there(configuration, said, tiny_digits, tmp_path):
    cfg = configuration('faster-rcnn_localvmamba-nano_digits')
    content = json.loads((tiny_digits / 'coco/annotations/instances_train.json').read_text())
    content['images'][0]['file_name'] = 'nobody.png'
    (tmp_path / 'train.json').write_text(json.dumps(content))
    cfg.train_dataloader.dataset.ann_file = str(tmp_path / 'train.json')
    assert 'nobody.png' in said(cfg).split('problem ', 1)[1]


def test_class_names_that_no_object_has(configuration, said):
    cfg = configuration('faster-rcnn_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.metainfo = dict(classes=tuple('abcdefghij'))
    assert 'problem training data: ' in said(cfg)


def test_pixels_of_no_class(configuration, said, tiny_digits, tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'labels').mkdir()
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(tmp_path / 'images/a.png')
    Image.fromarray(np.full((128, 128), 40, np.uint8)).save(tmp_path / 'labels/a.png')
    cfg = configuration('upernet_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path),
                                        data_prefix=dict(img_path='images', seg_map_path='labels'))
    assert '1 label image' in (output := said(cfg)) and 'has the labels 40' in output


def test_a_metric_that_the_model_cannot_serve(configuration, said):
    """Validation is tried, too: it comes an epoch later in a training."""
    output = said(configuration('faster-rcnn_localvmamba-nano_digits', "val_evaluator = dict(metric=['bbox', 'segm'])"))
    assert 'problem a step of validation: ' in output and 'segm is not in results' in output


def test_a_loss_that_is_no_number(configuration, said):
    assert 'NaN or Inf in loss' in said(configuration(
        'localvmamba-nano_digits', 'model = dict(head=dict(loss=dict(loss_weight=float("nan"))))'))


def test_learning_rate_and_batch(configuration, said):
    output = said(configuration('localvmamba-nano_digits', auto_scale_lr=dict(base_batch_size=8)))
    assert 'the learning rate 0.002 is for 8 images a step, one process has 2: train on 4 GPUs, or set ' \
           'optim_wrapper.optimizer.lr=0.0005' in output


def test_the_given_configuration_stays(configuration, said):
    cfg = configuration('localvmamba-nano_digits')
    before = cfg.to_dict()
    said(cfg)
    assert cfg.to_dict() == before


@pytest.mark.slow
@pytest.mark.parametrize('command', [['-m', 'mmlocalmamba', 'check'], [str(ROOT / 'tools/check.py')]])
def test_commands(command, tiny_digits, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(tiny_digits)
    for options, returncode in ([], 0), (['--cfg-options', 'model.head.num_classes=3'], 1):
        done = subprocess.run([sys.executable, *command, str(ROOT / 'configs/localvmamba-nano_digits.py'), *options],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == returncode, done.stdout + done.stderr
        assert ('problem ' in done.stdout) == bool(returncode)
