"""Test configuration files of a user's project that inherit ours, or take our schedules and data settings."""
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmlocalmamba

SCHEDULES = sorted(path.stem for path in Path(mmlocalmamba.config_path('_base_/schedules/1x')).parent.glob('*.py'))
SGD = """
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9))
param_scheduler = [dict(type='LinearLR')]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=9)
default_hooks = dict(logger=dict(type='LoggerHook', interval=5), checkpoint=dict(type='CheckpointHook', interval=2))
log_processor = dict(type='LogProcessor', window_size=7, by_epoch=False)
"""
CONFIG = '''
_base_ = __import__('mmlocalmamba').config_path('mask-rcnn_localvmamba-t_1x_coco')

classes = ('cat', 'dog', 'tree')
model = dict(
    backbone=dict(arch='nano'),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(
        bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))))
train_dataloader = dict(
    dataset=dict(data_root='data/mine/', metainfo=dict(classes=classes)))
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'mine.py').write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_inherit(project):
    cfg = Config.fromfile('configs/mine.py')
    assert cfg.train_dataloader.dataset.data_root == 'data/mine/'
    # The rest is ours.
    assert cfg.train_dataloader.dataset.type == 'CocoDataset'
    assert cfg.param_scheduler[1].milestones == [8, 11]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    assert model.roi_head.bbox_head.fc_cls.out_features == 4  # with the background
    assert model.roi_head.mask_head.conv_logits.out_channels == 3
    assert type(model.backbone).__name__ == 'LocalVMamba'


def test_dumped_config_is_complete(project):
    """The configuration that a training run stores beside its checkpoints loads without our files."""
    cfg = Config.fromfile('configs/mine.py')
    cfg.dump('dumped.py')
    assert '_base_' not in (project / 'dumped.py').read_text()
    assert Config.fromfile('dumped.py')._cfg_dict == cfg._cfg_dict


def test_unknown_config_names_similar_ones(project):
    (project / 'configs' / 'mine.py').write_text(CONFIG.replace('1x_coco', '1x_cocoo'))
    with pytest.raises(ValueError, match='mask-rcnn_localvmamba-t_1x_coco'):
        Config.fromfile('configs/mine.py')


# ---- schedule and without_masks in configuration files ----

def test_a_schedule_replaces_the_inherited_one(tmp_path):
    (tmp_path / 'base.py').write_text(SGD)
    (tmp_path / 'mine.py').write_text("_base_ = 'base.py'\n"
                                      "globals().update(__import__('mmlocalmamba').schedule('1x'))\n"
                                      "train_cfg['max_epochs'] = 24\n"
                                      "auto_scale_lr = dict(enable=True, base_batch_size=16)\n")
    cfg = Config.fromfile(tmp_path / 'mine.py')
    own = Config.fromfile(mmlocalmamba.config_path('_base_/schedules/1x'))
    assert (cfg.optim_wrapper, cfg.param_scheduler) == (own.optim_wrapper, own.param_scheduler)
    assert cfg.train_cfg == dict(own.train_cfg, max_epochs=24)  # and no max_iters
    assert cfg.default_hooks.checkpoint == dict(dict(type='CheckpointHook', interval=2), **own.default_hooks.checkpoint)
    assert cfg.log_processor == dict(type='LogProcessor', window_size=50, by_epoch=True)
    assert cfg.auto_scale_lr.enable is True
    assert not {key for key in cfg if key.startswith('_')} and '_delete_' not in cfg.pretty_text
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py')._cfg_dict == cfg._cfg_dict


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_are_dicts(name):
    """Unpacking into the four names of older versions fails. A dict of four entries would give its keys."""
    settings = mmlocalmamba.schedule(name)
    assert type(settings) is dict
    assert {'optim_wrapper', 'param_scheduler', 'train_cfg', 'default_hooks', 'log_processor'} == {
        *settings} - {'auto_scale_lr'}
    assert settings['optim_wrapper']['_delete_'] and settings['train_cfg']['_delete_']
    with pytest.raises(ValueError, match=r'too many values to unpack \(expected 4\)'):
        optim_wrapper, param_scheduler, train_cfg, default_hooks = settings


def test_boxes_of_a_detector_with_masks(tmp_path):
    (tmp_path / 'mine.py').write_text(
        "_base_ = __import__('mmlocalmamba').config_path('mask-rcnn_localvmamba-t_1x_coco')\n"
        "globals().update(__import__('mmlocalmamba').without_masks(_base_))\n"
        "test_dataloader['batch_size'] = 3\n")
    cfg, base = Config.fromfile(tmp_path / 'mine.py'), Config.fromfile(
        mmlocalmamba.config_path('mask-rcnn_localvmamba-t_1x_coco'))
    for pipeline in (cfg.train_pipeline, cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline,
                     cfg.test_dataloader.dataset.pipeline):
        assert [step.with_mask for step in pipeline if step.type == 'LoadAnnotations'] == [False]
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == 'bbox'
    assert cfg.val_evaluator.type == base.val_evaluator.type
    assert (cfg.val_dataloader.batch_size, cfg.test_dataloader.batch_size) == (base.val_dataloader.batch_size, 3)
    assert cfg.train_dataloader.dataset.type == base.train_dataloader.dataset.type
    with pytest.raises(ValueError, match=r'too many values to unpack \(expected 5\)'):
        train, test, train_loader, val_loader, evaluator = mmlocalmamba.without_masks(base)


def test_helpers_import_nothing_heavy():
    code = ('import sys, mmlocalmamba; mmlocalmamba.config_path("_base_/schedules/1x"); mmlocalmamba.with_backbone; '
            'print({"torch", "mmengine", "mmcv"} & set(sys.modules))')
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == 'set()'
