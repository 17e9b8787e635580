"""``python -m mmlocalmamba check``: its output for good and for wrong configurations."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import picture

from mmlocalmamba.backbones import LocalVMamba
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


def test_a_folder_that_is_not_there(configuration, said):
    """The message names the folders that exist. The samples are not loaded, which would say the same again."""
    cfg = configuration('faster-rcnn_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.data_prefix.img = 'trian/'
    output, root = said(cfg), cfg.train_dataloader.dataset.data_root.rstrip('/')
    assert f'nor does the folder {root}/trian; {root} has the folders annotations, train, val. Correct' in output
    assert f'{root}/trian/: ' in output and f'{root}/trian/0' not in output  # names are relative to it
    assert output.endswith('\n1 problem found, see above.\n')


def test_class_names_that_no_object_has(configuration, said):
    cfg = configuration('faster-rcnn_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.metainfo = dict(classes=tuple('abcdefghij'))
    assert 'problem training data: ' in said(cfg)


def test_an_evaluator_that_is_inherited(configuration, said, tmp_path):
    """Its file is that of the demo. A hook asks for the same loop again, which is no second problem."""
    cfg = configuration('faster-rcnn_localvmamba-nano_digits')
    cfg.val_evaluator.ann_file = str(tmp_path / 'none.json')
    output = said(cfg)
    own = f'{cfg.val_dataloader.dataset.data_root}/{cfg.val_dataloader.dataset.ann_file}'
    assert f"val_evaluator.ann_file is '{tmp_path}/none.json' (CocoMetric), which does not exist" in output
    assert f'write val_evaluator = dict(ann_file={own!r})' in output
    assert output.endswith('\n1 problem found, see above.\n')


def test_an_annotation_file_that_is_missing(configuration, said, tmp_path):
    cfg = configuration('faster-rcnn_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.ann_file = 'annotations/nope.json'
    output = said(cfg)
    file = f'{cfg.train_dataloader.dataset.data_root}/annotations/nope.json'
    assert f'problem training data: FileNotFoundError: the annotation file {file} does not exist. ' \
           'Its folder has instances_train.json, instances_val.json. Correct data_root or ann_file\n' in output
    cfg.train_dataloader.dataset.ann_file = 'nowhere/nope.json'
    assert 'does not exist, nor does its folder. Correct data_root or ann_file\n' in said(cfg)


def test_folders_of_classes_without_a_split(configuration, said, tmp_path):
    for name in ('circle', 'square', 'star'):
        (tmp_path / 'cls' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'cls' / name / 'a.png')
    data = dict(_delete_=True, type='CustomDataset', data_root=str(tmp_path / 'cls'), pipeline=[])
    output = said(configuration('localvmamba-nano_digits', **{
        f'{key}_dataloader.dataset': dict(data, data_prefix=key) for key in ('train', 'val')}))
    root = tmp_path / 'cls'
    assert f'the folder {root}/train does not exist. Its parent {root} has 3 folders of pictures (circle, square, ' \
           f'star): split the pictures into {root}/train and {root}/val' in output
    assert f'problem validation data: FileNotFoundError: the folder {root}/val does not exist.' in output
    assert '_list_dir_or_file' not in output and output.endswith('\n2 problems found, see above.\n')


def test_pictures_of_another_ending(configuration, said, tmp_path):
    """Both data sets say which endings there are."""
    for number in range(3):
        for folder in ('train', 'val'):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new('RGB', (128, 128)).save(tmp_path / folder / f'{number}.jpg')
    cfg = configuration('upernet_localvmamba-nano_digits')
    for key in ('train', 'val'):
        cfg[f'{key}_dataloader'].dataset.update(data_root=str(tmp_path), img_suffix='.png',
                                                data_prefix=dict(img_path=key, seg_map_path='labels'))
    output = said(cfg)
    for name, key in (('training', 'train'), ('validation', 'val')):
        line, = (line for line in output.splitlines() if line.startswith(f'problem {name} data: '))
        assert f"no file of {tmp_path}/{key} ends in img_suffix='.png'; its pictures are 3 .jpg" in line
        assert "Set img_suffix='.jpg' in each data set" in line


@pytest.mark.slow
def test_pixels_of_no_class(configuration, said, tiny_digits, tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'labels').mkdir()
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(tmp_path / 'images/a.png')
    Image.fromarray(np.full((128, 128), 40, np.uint8)).save(tmp_path / 'labels/a.png')
    cfg = configuration('upernet_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path),
                                        data_prefix=dict(img_path='images', seg_map_path='labels'))
    assert '1 label image' in (output := said(cfg)) and 'has the label 40' in output


@pytest.mark.slow
def test_a_metric_that_the_model_cannot_serve(configuration, said):
    """Validation is tried, too: it comes an epoch later in a training."""
    output = said(configuration('faster-rcnn_localvmamba-nano_digits', "val_evaluator = dict(metric=['bbox', 'segm'])"))
    assert 'problem a step of validation: ' in output and 'segm is not in results' in output


def search(**options):
    hook = dict(type='mmlocalmamba.ScanSearchHook', k=2, **options)
    return {'custom_hooks': [hook], 'model.backbone.directions': dict(candidates=['h', 'v', 'w2']),
            'optim_wrapper.paramwise_cfg': dict(custom_keys=dict(alphas=dict(decay_mult=0.)))}


@pytest.mark.parametrize('options, problem', [
    ({'default_hooks.checkpoint.save_best': 'accuracy/top7', 'default_hooks.checkpoint.rule': 'greater'},
     "CheckpointHook.save_best='accuracy/top7' is not a metric of val_evaluator, which has accuracy/top1"),
    ({'custom_hooks': [dict(type='EarlyStoppingHook', monitor='none', rule='less')]},
     "EarlyStoppingHook.monitor='none' is not a metric"),
    ({'param_scheduler': [dict(type='ReduceOnPlateauLR', monitor='none', rule='less')]},
     "ReduceOnPlateauLR.monitor='none' is not a metric"),
    ({'param_scheduler': [dict(type='CosinAnnealingLR', T_max=2)]}, 'param_scheduler: '),
    (dict(search(), custom_hooks=[dict(type='mmlocalmamba.ScanSearchHook', k=9)]),
     'ScanSearchHook: ValueError: k=9 directions cannot be chosen from 3'),
    ({'custom_hooks': [dict(type='mmlocalmamba.ScanSearchHook', k=2)]},
     "ScanSearchHook: ValueError: ScanSearchHook: no direction search in here"),
    ({'load_from': '/nowhere/none.pth'}, 'load_from: FileNotFoundError'),
    ({'custom_hooks': [dict(type='EMAHook', begin_epoch=10 ** 6)]}, 'EMAHook: AssertionError'),
], ids=lambda value: '' if isinstance(value, str) else None)
def test_what_a_training_would_find_out(configuration, said, options, problem):
    output = said(configuration('localvmamba-nano_digits', **options))
    assert f'problem {problem}' in output, output
    assert output.rstrip().endswith('\n1 problem found, see above.')


def test_weights_of_another_model(configuration, said, tmp_path):
    torch.save(dict(state_dict=LocalVMamba('nano').state_dict()), tmp_path / 'other.pth')
    output = said(configuration('localvim-nano_digits', load_from=str(tmp_path / 'other.pth')))
    assert 'problem load_from: RuntimeError: ' in output and 'The checkpoint is of another model' in output, output


@pytest.mark.parametrize('missing', [True, False])
@pytest.mark.slow
def test_held_out_data(configuration, said, missing, tmp_path):
    """A step on them is tried, too."""
    cfg = configuration('localvmamba-nano_digits')
    held_out = dict(cfg.train_dataloader, num_workers=2, persistent_workers=True)
    if missing:
        held_out['dataset'] = dict(held_out['dataset'], data_root=str(tmp_path / 'none'))
    output = said(configuration('localvmamba-nano_digits', **search(mode='bilevel', held_out=held_out)))
    assert ('problem ScanSearchHook: ' in output and str(tmp_path / 'none') in output) == missing


@pytest.mark.parametrize('missing', [True, False])
def test_a_configuration_that_only_tests(configuration, said, missing, tmp_path):
    cfg = configuration('localvmamba-nano_digits')
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg',
                'val_evaluator'):
        cfg[key] = None
    if missing:
        cfg.test_dataloader.dataset.data_root = str(tmp_path / 'none')
    output = said(cfg)
    assert ('problem test data: ' in output) == missing
    assert ('test: ' in output.replace('test data: ', '')) != missing


def test_a_loss_that_is_no_number(configuration, said):
    assert 'NaN or Inf in loss' in said(configuration(
        'localvmamba-nano_digits', 'model = dict(head=dict(loss=dict(loss_weight=float("nan"))))'))


@pytest.mark.parametrize('loader', ['train_dataloader', 'val_dataloader', 'test_dataloader'])
def test_pictures_of_different_sizes(configuration, said, tmp_path, loader):
    """The first batch has one size, a later one has several."""
    for number in range(40):
        picture(tmp_path / f'own/{number // 4}/{number}.png', 32, 32)
    picture(tmp_path / 'own/9/x.png', 48, 40)
    cfg = configuration('localvmamba-nano_digits')
    cfg[loader].dataset.update(data_root=str(tmp_path), data_prefix='own', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='PackInputs')])
    output = said(cfg)
    pipeline = loader.replace('val', 'test').replace('dataloader', 'pipeline')
    for phrase in (f'{loader}.batch_size=2', '32x32', '48x40', 'own/9/x.png', f'to {pipeline}', "type='Resize'"):
        assert phrase in output.split('problem ')[1], output


def test_learning_rate_and_batch(configuration, said):
    output = said(configuration('localvmamba-nano_digits', auto_scale_lr=dict(base_batch_size=8)))
    assert 'the learning rate 0.002 is for 8 images a step, one process has 2: set ' \
           'optim_wrapper.optimizer.lr=0.0005 and auto_scale_lr.base_batch_size=2, or --auto-scale-lr, or train on ' \
           '4 GPUs\n' in output


def test_the_remedy_ends_the_note(configuration, said):
    settings = {'optim_wrapper.optimizer.lr': 0.0005, 'auto_scale_lr.base_batch_size': 2}
    assert 'images a step' not in said(configuration('localvmamba-nano_digits', **settings))
    output = said(configuration('upernet_localvim-nano_digits'))
    assert 'the learning rate 0.003 is for 8 images' in output and '--auto-scale-lr (mim train mmlocalmamba)' in output


def test_more_images_a_step_than_the_schedule_has(configuration, said):
    """There is no half of a GPU."""
    output = said(configuration('localvmamba-nano_digits', auto_scale_lr=dict(base_batch_size=1)))
    assert 'set optim_wrapper.optimizer.lr=0.004 and auto_scale_lr.base_batch_size=2, or --auto-scale-lr\n' in output


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
