"""Checks before a training, on tiny digits: wrong classes, missing masks, the weights that it starts from."""
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner

import mmlocalmamba
from mmlocalmamba.openmmlab import checks
from mmlocalmamba.openmmlab.checks.resumption import saved_settings
from mmlocalmamba.weights.released import find

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


@pytest.fixture
def messages(monkeypatch):
    """Logged messages in order: (level, text)."""
    said = []
    monkeypatch.setattr('mmlocalmamba.openmmlab.checks.hook.print_log',
                        lambda text, logger, level=logging.INFO: said.append((level, text)) if level > logging.INFO
                        else None)  # without the tables of the data
    return said


def weights(name, folder):
    """A file of the backbone's weights, unlike any initialisation."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(cfg.model.backbone)
    torch.save({key: torch.full_like(value, 0.5) for key, value in backbone.state_dict().items()}, folder / 'mine.pth')
    return str(folder / 'mine.pth')


def runner(cfg):
    """Return the runner of a training without iterations."""
    cfg.train_cfg[next(key for key in ('max_epochs', 'max_iters') if key in cfg.train_cfg)] = 0
    # a schedule over no iterations at all cannot be built
    return Runner.from_cfg(Config({**cfg.to_dict(), 'param_scheduler': None}))


def halves(model):
    return all((value == 0.5).all() for value in model.backbone.state_dict().values())


# ---- weights to start from ----

@pytest.mark.parametrize('name', ['localvmamba-nano_digits', 'faster-rcnn_localvmamba-nano_digits',
                                  'upernet_localvim-nano_digits'])
@pytest.mark.parametrize('place', ['child', 'option'])
@pytest.mark.slow
def test_the_backbone_starts_from_its_checkpoint(name, place, configuration, tmp_path, messages):
    path = weights(name, tmp_path)
    cfg = (configuration(name, f'model = dict(backbone=dict(init_cfg=dict(checkpoint={path!r})))') if place == 'child'
           else configuration(name, **{'model.backbone.init_cfg.checkpoint': path}))
    training = runner(cfg)
    training.train()
    assert halves(training.model)
    assert not messages


def test_a_variable_that_is_no_longer_read_is_refused(configuration):
    cfg = configuration('localvmamba-nano_digits', pretrained='a.pth')
    with pytest.raises(ValueError, match="pretrained='a.pth' at the top .* model.backbone.init_cfg.checkpoint=a.pth"):
        runner(cfg).train()


@pytest.mark.slow
def test_an_initialisation_of_the_users_stays(configuration, tmp_path):
    path = weights('localvmamba-nano_digits', tmp_path)
    cfg = configuration('localvmamba-nano_digits')
    cfg.model.backbone.init_cfg = [dict(type='Normal', layer='Linear', std=0.1),
                                   dict(type='Pretrained', checkpoint=path)]
    training = runner(cfg)
    training.train()
    assert halves(training.model)
    assert training.model.backbone.pretrained_checkpoints() == [path]


def test_released_weights_are_named_where_they_fit():
    """There are none for LocalVMamba-T and LocalVim-S, and ImageNet trainings start from scratch."""
    for path in CONFIGS.glob('*.py'):
        cfg = Config.fromfile(path)
        fits = next((name for part, name in (('localvim-t-vitdet', 'localvim_tiny'),
                                             ('upernet_localvim-t', 'localvim_tiny'),
                                             ('rcnn_localvmamba-s', 'localvmamba_small'),
                                             ('upernet_localvmamba-s', 'localvmamba_small'))
                     if part in path.stem), None)
        version_2 = re.search(r'(?:rcnn|upernet)_(vmamba-[tsb]-v2(?:-s2l5)?)_', path.stem)
        if version_2:
            fits = find(f'{version_2[1]}_8xb128_in1k')[1].file.rsplit('/', 1)[-1]
        checkpoint = (cfg.model.backbone.get('init_cfg') or {}).get('checkpoint') or ''
        assert checkpoint.rsplit('/', 1)[-1] == (fits or ''), path.stem


def log_of(training):
    return next(Path(training.log_dir).glob('*.log')).read_text().splitlines()


def keep(training):
    """Save a checkpoint that --resume finds."""
    training.save_checkpoint(training.work_dir, 'last.pth')
    Path(training.work_dir, 'last_checkpoint').write_text(str(Path(training.work_dir, 'last.pth')))


@pytest.mark.parametrize('init_cfg', [None, dict(type='Pretrained', checkpoint=None)])
def test_from_scratch_is_the_last_line_of_the_log(init_cfg, configuration):
    """MMEngine's log drops a warning that repeats. A resumed training does not start from scratch."""
    options = {'model.backbone.init_cfg': init_cfg}
    training = runner(configuration('localvmamba-nano_digits', **options))
    training.train()
    said = [line for line in log_of(training) if 'LocalVMamba starts from scratch' in line]
    assert len(said) == 2 and log_of(training)[-1] == said[1] and all('WARNING' in line for line in said)
    keep(training)
    resumed = runner(configuration('localvmamba-nano_digits', resume=True, **options))
    resumed.train()
    assert not [line for line in log_of(resumed) if 'from scratch' in line]
    assert 'nothing is trained: the training is already finished' in log_of(resumed)[-1]


def test_resuming_where_nothing_is_starts_from_scratch(configuration):
    training = runner(configuration('localvmamba-nano_digits', resume=True))
    training.train()
    assert 'LocalVMamba starts from scratch' in log_of(training)[-1]


@pytest.mark.parametrize('name, key', [('localvmamba-nano_digits', 'max_epochs'),
                                       ('upernet_localvmamba-nano_digits', 'max_iters')])
@pytest.mark.slow
def test_resuming_what_is_finished_says_so(name, key, configuration, messages):
    training = runner(configuration(name))
    training.train()
    keep(training)
    messages.clear()
    runner(configuration(name, resume=True)).train()
    assert len(messages) == 2
    assert 'nothing is trained' in messages[1][1] and f'raise train_cfg.{key}' in messages[1][1]


@pytest.mark.slow
def test_resuming_with_another_length_or_other_data_says_so(configuration, tiny_digits, tmp_path, messages):
    def train(**options):
        messages.clear()
        cfg = configuration('localvmamba-nano_digits', **{'train_dataloader.batch_size': 40, **options})
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.default_hooks.checkpoint = dict(type='mmlocalmamba.CheckpointHook', interval=1)
        Runner.from_cfg(cfg).train()
        return [text for _, text in messages if 'that is resumed' in text]

    assert not train(**{'train_cfg.max_epochs': 1})
    longer, = train(resume=True, **{'train_cfg.max_epochs': 2})
    assert 'had max_epochs=1, this one has max_epochs=2' in longer and "checkpoint's schedule" in longer
    shutil.copytree(tiny_digits / 'imagenet', tmp_path / 'elsewhere/imagenet')
    other, = train(resume=True, **{'train_cfg.max_epochs': 2, 'train_dataloader.dataset.data_root': str(
        tmp_path / 'elsewhere')})
    assert f"data_root='{tmp_path}/elsewhere'" in other and f"data_root='{tiny_digits}" in other
    shutil.rmtree(tmp_path / 'elsewhere/imagenet/train/0')
    (tmp_path / 'elsewhere/imagenet/train/0').mkdir()
    with pytest.raises(ValueError, match='the checkpoint was written with .* samples in the dataset'):
        train(resume=True, **{'train_cfg.max_epochs': 3, 'train_dataloader.dataset.data_root': str(
            tmp_path / 'elsewhere')})


def test_settings_of_a_checkpoint_are_read_without_executing_them(tmp_path):
    text = (f"one = __import__('pathlib').Path({str(tmp_path / 'executed')!r}).touch()\n"
            "two = dict(a=[1, -2.5, ('x', None)], b={'c': dict(d=True)})\n")
    assert saved_settings(text) == dict(two=dict(a=[1, -2.5, ['x', None]], b=dict(c=dict(d=True))))
    assert not list(tmp_path.iterdir())
    assert saved_settings('x = (') == saved_settings(None) == saved_settings('print(1)') == {}


# ---- classes ----

HEADS = {'localvmamba-nano_digits': 'model = dict(head=dict(num_classes=7))',
         'mask-rcnn_localvmamba-nano_digits': 'model = dict(roi_head=dict(mask_head=dict(num_classes=7)))',
         'faster-rcnn_localvmamba-nano_digits': 'model = dict(roi_head=dict(bbox_head=dict(num_classes=7)))',
         'retinanet_localvmamba-nano_digits': 'model = dict(bbox_head=dict(num_classes=7))',
         'upernet_localvmamba-nano_digits': 'model = dict(decode_head=dict(num_classes=7))'}


@pytest.mark.parametrize('name', HEADS)
def test_a_wrong_number_of_classes_stops(name, configuration):
    with pytest.raises(ValueError, match="(?s)num_classes=7.* mim's traceback, if one follows, only says"):
        runner(configuration(name, HEADS[name])).train()


def test_what_is_meant_so_is_a_warning(configuration, messages):
    runner(configuration('localvmamba-nano_digits', HEADS['localvmamba-nano_digits'] +
                         '\ndefault_hooks = dict(checks=dict(strict=False))')).train()
    assert messages[0][0] == logging.WARNING and 'head num_classes=7' in messages[0][1]


def test_the_preprocessor_counts_classes_too(configuration):
    with pytest.raises(ValueError, match='data_preprocessor num_classes=12'):
        runner(configuration('localvmamba-nano_digits', 'data_preprocessor = dict(num_classes=12)')).train()


@pytest.mark.parametrize('name', [*HEADS, 'localvim-nano_digits'])
def test_right_ones_pass(name, configuration):
    runner(configuration(name)).train()


def test_one_expression_sets_every_head():
    """The heads of Cascade R-CNN are in a list; the topk of a classifier needs five classes."""
    cfg = Config.fromfile(CONFIGS / 'cascade-mask-rcnn_localvim-t-vitdet_lsj-100e_coco.py')
    before = cfg.model.copy()
    changed = mmlocalmamba.with_classes(cfg.model, 3)
    assert cfg.model == before
    assert [head.num_classes for head in changed.roi_head.bbox_head] == [3, 3, 3]
    assert changed.roi_head.mask_head.num_classes == 3
    head = mmlocalmamba.with_classes(Config.fromfile(CONFIGS / 'localvim-t_8xb128_in1k.py').model, 2).head
    assert (head.num_classes, tuple(head.topk)) == (2, (1, ))
    with pytest.raises(ValueError, match='at least 1, got 0'):
        mmlocalmamba.with_classes(cfg.model, 0)
    with pytest.raises(ValueError, match='no part of the model ResNet'):
        mmlocalmamba.with_classes(dict(type='ResNet'), 2)


@pytest.mark.parametrize('name', sorted(path.stem for path in CONFIGS.glob('*.py')))
def test_every_configuration_takes_other_classes(name, tmp_path):
    """with_classes, as the pages show it, changes every head."""
    (tmp_path / 'mine.py').write_text(
        f"_base_ = __import__('mmlocalmamba').config_path('{name}')\n"
        "model = __import__('mmlocalmamba').with_classes(_base_.model, 3)\n")
    cfg = Config.fromfile(tmp_path / 'mine.py')
    text = cfg.model.to_dict()

    def numbers(value):
        if isinstance(value, dict):
            yield from ([value['num_classes']] if 'num_classes' in value else [])
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for part in value:
                yield from numbers(part)

    assert set(numbers(text)) == {3}


def rewrite(source, target, change):
    content = json.loads(source.read_text())
    change(content)
    target.write_text(json.dumps(content))
    return str(target)


@pytest.fixture
def boxes(configuration, tiny_digits, tmp_path):
    """A detector's configuration whose annotation file was changed."""

    def write(name, change, **options):
        path = rewrite(tiny_digits / 'coco/annotations/instances_train.json', tmp_path / 'train.json', change)
        cfg = configuration(name, **options)
        cfg.train_dataloader.dataset.ann_file = path
        return cfg

    return write


def test_misspelt_class_names(boxes):
    def rename(content):
        content['categories'][3]['name'] = 'three'

    with pytest.raises(ValueError, match=r"lacks classes of the configuration: '3'\. It has '0', '1', '2', 'three'"):
        runner(boxes('faster-rcnn_localvmamba-nano_digits', rename)).train()


def test_no_name_is_right(configuration):
    """The dataset has no samples."""
    cfg = configuration('faster-rcnn_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.metainfo = dict(classes=tuple('abcdefghij'))
    with pytest.raises(RuntimeError, match=r"instances_train.json has none of the classes \('a', 'b'"):
        runner(cfg).train()


@pytest.mark.slow
def test_classes_in_another_order(boxes):
    """MMDetection numbers them by the file: names would belong to other boxes."""
    def swap(content):
        content['categories'][:2] = content['categories'][1::-1]

    with pytest.raises(ValueError, match='another order'):
        runner(boxes('faster-rcnn_localvmamba-nano_digits', swap)).train()


def test_a_string_is_no_tuple_of_classes():
    class Dataset(list):
        metainfo = dict(classes='cat')
    problem, = checks.audit_data(dict(training=Dataset([1]))).problems
    assert "Set ('cat', )" in str(problem)


def test_folders_of_training_and_validation_differ(configuration, tiny_digits, tmp_path):
    """Labels are numbers of sorted folders: without the folder of 3, a 4 is taken for a 3."""
    shutil.copytree(tiny_digits / 'imagenet', tmp_path / 'imagenet')
    (tmp_path / 'imagenet/val/3').rename(tmp_path / 'imagenet/val/x')
    cfg = configuration('localvmamba-nano_digits')
    for key in ('train_dataloader', 'val_dataloader'):
        cfg[key].dataset.data_root = str(tmp_path)
    with pytest.raises(ValueError, match="class 3 is '3' in training and '4' in validation"):
        runner(cfg).train()


def test_more_is_asked_than_there_are_classes(configuration):
    with pytest.raises(ValueError, match=r'topk=\(1, 20\), but there are 10 classes'):
        runner(configuration('localvmamba-nano_digits', 'val_evaluator = dict(topk=(1, 20))')).train()


def test_no_image_has_this_ending(configuration):
    cfg = configuration('upernet_localvmamba-nano_digits')
    cfg.train_dataloader.dataset.img_suffix = '.jpeg'
    with DefaultScope.overwrite_default_scope('mmseg'):
        problem, = checks.audit_data(dict(training=DATASETS.build(
            {**cfg.train_dataloader.dataset.to_dict(), 'serialize_data': False}))).problems
    assert 'found no samples' in str(problem) and 'img_suffix' in str(problem)


# ---- boxes without masks ----

def no_polygons(content):
    for annotation in content['annotations']:
        del annotation['segmentation']


def test_boxes_without_polygons_are_named(boxes):
    with pytest.raises(ValueError, match="has a box but no polygon .*faster-rcnn_localvmamba"):
        runner(boxes('mask-rcnn_localvmamba-nano_digits', no_polygons)).train()


def test_a_sample_without_polygons_is_named(boxes):
    """The error names the sample also if the check before training did not find it."""
    cfg = boxes('mask-rcnn_localvmamba-nano_digits', no_polygons)
    cfg.default_hooks.pop('checks')
    cfg.train_cfg.update(max_epochs=1)
    with pytest.raises(RuntimeError, match="has a box but no polygon"):
        Runner.from_cfg(Config({**cfg.to_dict(), 'param_scheduler': None})).train()


@pytest.mark.parametrize('name', ['faster-rcnn_localvmamba-nano_digits', 'retinanet_localvmamba-nano_digits'])
@pytest.mark.slow
def test_box_detectors_train_on_boxes_alone(name, boxes, tiny_digits, tmp_path, monkeypatch):
    cfg = boxes(name, no_polygons)
    val = rewrite(tiny_digits / 'coco/annotations/instances_val.json', tmp_path / 'val.json', no_polygons)
    cfg.val_dataloader.dataset.ann_file = cfg.val_evaluator.ann_file = val
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint.save_best = None
    seen = []
    monkeypatch.setattr('mmdet.evaluation.CocoMetric.compute_metrics',
                        lambda self, results: seen.extend(self.metrics) or {})
    training = Runner.from_cfg(cfg)
    training.train()
    assert seen == ['bbox'] and training.iter > 0


# ---- a schedule over a configuration of others ----

@pytest.mark.parametrize('base', [
    "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"
    "globals().update(__import__('mmlocalmamba').schedule('1x'))\n",
    "_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/datasets/coco_detection.py',\n"
    "          __import__('mmlocalmamba').config_path('_base_/schedules/1x')]\n"], ids=['over', 'beside'])
def test_the_schedule_goes_with_detectors_of_others(base, tmp_path):
    pytest.importorskip('mmdet')
    (tmp_path / 'mine.py').write_text(base + (
        "model = dict(backbone=dict(_delete_=True, type='mmlocalmamba.LocalVMamba', arch='nano', "
        "out_indices=(1, 2, 3)), neck=dict(in_channels=[64, 128, 256], start_level=0))\n"))
    cfg, own = Config.fromfile(tmp_path / 'mine.py'), Config.fromfile(CONFIGS / 'faster-rcnn_localvmamba-t_1x_coco.py')
    for key in ('optim_wrapper', 'param_scheduler', 'train_cfg'):
        assert cfg[key] == own[key], key
    assert {key: hook.type for key, hook in cfg.default_hooks.items()} == {
        key: hook.type for key, hook in own.default_hooks.items()}
    from mmengine.optim import build_optim_wrapper
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        wrapper = build_optim_wrapper(model, {**cfg.optim_wrapper.to_dict(), 'type': 'OptimWrapper'})
    decays = {id(value): group['weight_decay'] for group in wrapper.param_groups for value in group['params']}
    assert {decays[id(value)] for name, value in model.named_parameters() if name.endswith('A_log')} == {0}
    assert {decays[id(value)] for name, value in model.named_parameters() if name.endswith('in_proj.weight')} == {0.05}


@pytest.mark.parametrize('device, wrapper', [('cpu', 'OptimWrapper'), ('cuda', 'AmpOptimWrapper')])
@pytest.mark.parametrize('name', ['mask-rcnn_localvmamba-t_1x_coco', 'localvmamba-t_8xb128_in1k',
                                  'mask-rcnn_localvim-t-vitdet_lsj-100e_coco',
                                  'upernet_localvmamba-s_8xb2-160k_ade20k-512x512'])
def test_mixed_precision_where_there_is_a_gpu(name, device, wrapper, monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: device)
    assert Config.fromfile(CONFIGS / f'{name}.py').optim_wrapper.type == wrapper
