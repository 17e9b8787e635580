"""The shipped configurations: names, models, optimizers, schedules, data pipelines."""
import copy
import re
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import (
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    PARAM_SCHEDULERS,
    DefaultScope,
)
from PIL import Image
from torch import nn

from mmlocalmamba.files import SCHEME
from mmlocalmamba.weights.released import find

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
SCOPES = {'in1k': 'mmpretrain', 'coco': 'mmdet', 'ade20k-512x512': 'mmseg'}

# Parameters, in units or in millions as the paper rounds them; None: ours, the paper has no such
# model.
PARAMETERS = {
    'localvim-t_8xb128_in1k': 7994152,
    'localvim-t-midcls_8xb128_in1k': 7994536,
    'localvim-t-nosearch_8xb128_in1k': 7994152,
    'localvim-s_8xb128_in1k': 27783784,
    'localvim-s-nosearch_8xb128_in1k': 27783784,
    'localvmamba-t_8xb128_in1k': 25527160,
    'localvmamba-s_8xb128_in1k': 49748536,
    # The paper's 7M and 26M; VMamba's 22M, 44M and 75M leave out the classes of ImageNet.
    'vim-t_8xb128_in1k': 7147624,
    'vim-t-midcls_8xb128_in1k': 7148008,
    'vim-t-midcls-plus_8xb128-30e_in1k': 7250344,
    'vim-s_8xb128_in1k': 25795816,
    'vim-s-midcls_8xb128_in1k': 25796584,
    'vim-s-midcls-plus_8xb128-30e_in1k': 26001256,
    'vmamba-t_8xb128_in1k': 22893448,
    'vmamba-s_8xb128_in1k': 44417416,
    'vmamba-b_8xb128_in1k': 76254056,
    # version 2, as VMamba's tables round them; the first one is exact there
    'vmamba-t-v2_8xb128_in1k': 30249064,
    'vmamba-t-v2-s2l5_8xb128_in1k': '31M',
    'vmamba-s-v2_8xb128_in1k': '50M',
    'vmamba-s-v2-s1l20_8xb128_in1k': '49M',
    'vmamba-b-v2_8xb128_in1k': '89M',
    'vmamba-b-v2-s1l20_8xb128_in1k': '87M',
    'localvmamba-t-v2_8xb128_in1k': None,
    'localvmamba-s-v2_8xb128_in1k': None,
    'localvmamba-b-v2_8xb128_in1k': None,
    'vim-t-local_8xb128_in1k': 7147624,
    'localvim-t-nosearch-noscattn_8xb128_in1k': None,
    'localvim-t-nosearch-spatial_8xb128_in1k': None,
    'faster-rcnn_localvmamba-t_1x_coco': None,
    'faster-rcnn_localvmamba-s_1x_coco': None,
    'retinanet_localvmamba-t_1x_coco': None,
    'mask-rcnn_vmamba-t_1x_coco': '42M',
    'upernet_vmamba-t_8xb2-160k_ade20k-512x512': '55M',
    'mask-rcnn_vmamba-t-v2_1x_coco': '50M',
    'mask-rcnn_vmamba-t-v2_ms-3x_coco': '50M',
    'mask-rcnn_vmamba-t-v2-s2l5_1x_coco': '50M',
    'mask-rcnn_vmamba-t-v2-s2l5_ms-3x_coco': '50M',
    'mask-rcnn_vmamba-s-v2_1x_coco': '70M',
    'mask-rcnn_vmamba-s-v2_ms-3x_coco': '70M',
    'mask-rcnn_vmamba-b-v2_1x_coco': '108M',
    'mask-rcnn_vmamba-b-v2_ms-3x_coco': '108M',
    'mask-rcnn_localvmamba-t-v2_1x_coco': None,
    'upernet_vmamba-t-v2_8xb2-160k_ade20k-512x512': '62M',
    'upernet_vmamba-t-v2-s2l5_8xb2-160k_ade20k-512x512': '62M',
    'upernet_vmamba-s-v2_8xb2-160k_ade20k-512x512': '82M',
    'upernet_vmamba-b-v2_8xb2-160k_ade20k-512x512': '122M',
    'upernet_localvmamba-t-v2_8xb2-160k_ade20k-512x512': None,
    'mask-rcnn_localvmamba-t_1x_coco': '45M',
    'mask-rcnn_localvmamba-s_1x_coco': '69M',
    'mask-rcnn_localvmamba-t_ms-3x_coco': '45M',
    'mask-rcnn_localvmamba-s_ms-3x_coco': '69M',
    'mask-rcnn_localvim-t-vitdet_lsj-100e_coco': '31M',
    'mask-rcnn_localvim-s-vitdet_lsj-100e_coco': None,
    'cascade-mask-rcnn_localvim-t-vitdet_lsj-100e_coco': None,
    'cascade-mask-rcnn_localvim-s-vitdet_lsj-100e_coco': None,
    'upernet_localvim-t_8xb2-160k_ade20k-512x512': '36M',
    'upernet_localvim-s_8xb2-160k_ade20k-512x512': '58M',
    'upernet_localvmamba-t_8xb2-160k_ade20k-512x512': '57M',
    'upernet_localvmamba-s_8xb2-160k_ade20k-512x512': '81M',
    'localvim_search_8xb128-100e_in1k': None,
    'localvmamba-t_search_8xb128-100e_in1k': None,
    'localvmamba-s_search_8xb128-100e_in1k': None,
    'localvim-nano_search_digits': None,
    'localvmamba-nano_search_digits': None,
    'localvim-nano_digits': None,
    'localvmamba-nano_digits': None,
    'faster-rcnn_localvmamba-nano_digits': None,
    'retinanet_localvmamba-nano_digits': None,
    'mask-rcnn_localvmamba-nano_digits': None,
    'upernet_localvim-nano_digits': None,
    'upernet_localvmamba-nano_digits': None,
    'localvim-nano_fashion': None,
}
NAMES = sorted(PARAMETERS)
# Drop path rates of the classifiers with VMamba's later block.
VMAMBA_V2 = {f'{name}_8xb128_in1k': rate for name, rate in {
    'vmamba-t-v2': 0.2, 'vmamba-t-v2-s2l5': 0.2, 'vmamba-s-v2': 0.3, 'vmamba-s-v2-s1l20': 0.3, 'vmamba-b-v2': 0.6,
    'vmamba-b-v2-s1l20': 0.5, 'localvmamba-t-v2': 0.2, 'localvmamba-s-v2': 0.3, 'localvmamba-b-v2': 0.6}.items()}
IMAGENET = [name for name in NAMES if name.endswith('in1k')]
COCO = [name for name in NAMES if name.endswith('coco')]
ADE20K = [name for name in NAMES if 'ade20k' in name]
# Small ones of our own, for one process on a CPU.
SMALL = [name for name in NAMES if name.endswith(('digits', 'fashion'))]


@cache
def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def in_scope(cfg):
    return DefaultScope.overwrite_default_scope(cfg.default_scope)


@cache
def metafile():
    """{name: entry of the model zoo}."""
    models = yaml.safe_load((CONFIGS / 'metafile.yml').read_text())['Models']
    assert len({model['Name'] for model in models}) == len(models)
    return {model['Name']: model for model in models}


@lru_cache(maxsize=1)  # tests of one model stand together
def build(name):
    cfg = load(name)
    with in_scope(cfg):
        return MODELS.build(cfg.model).eval()


def test_oriented_boxes():
    """Beside mmrotate, which the OneDL stack alone has."""
    pytest.importorskip('mmrotate')
    cfg = Config.fromfile(CONFIGS / 'rotated/oriented-rcnn_localvmamba-nano_digits.py')
    with in_scope(cfg):
        model = MODELS.build(cfg.model)
    assert type(model.backbone).__name__ == 'LocalVMamba'
    assert [lateral.conv.in_channels for lateral in model.neck.lateral_convs] == list(model.backbone.out_channels)


def test_names():
    assert sorted(path.stem for path in CONFIGS.glob('*.py')) == NAMES == sorted(metafile())


@pytest.mark.parametrize('name', NAMES)
def test_loads(name):
    cfg = load(name)
    suffix = name.rsplit('_', 1)[-1]
    assert name in SMALL or cfg.default_scope == SCOPES[suffix]
    assert cfg.default_hooks.official_checkpoint.type == 'mmlocalmamba.LoadCheckpointHook'
    assert cfg.default_hooks.checks.type == 'mmlocalmamba.TrainingChecksHook'
    released = cfg.model.backbone.init_cfg.get('checkpoint')
    expected = dict(type='Pretrained', checkpoint=released)
    assert cfg.model.backbone.init_cfg == dict(expected, **dict(allow=['stride']) if 'plus' in name else {})
    if released is not None:
        _, weights = find(released)
        assert not weights.packaged and weights.task == 'classification'
        # The weights of an average, which a name takes where there is one, are not those that the authors start from.
        assert (weights.key is None) == released.startswith(SCHEME)
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator',
                'test_evaluator', 'train_cfg', 'val_cfg', 'test_cfg', 'param_scheduler'):
        assert key in cfg
    if cfg.default_scope == 'mmseg':
        assert cfg.tta_model.type == 'SegTTAModel' and cfg.tta_pipeline


@pytest.mark.parametrize('name', NAMES)
def test_builds(name):
    model = build(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert metafile()[name]['Metadata']['Parameters'] == count
    expected = PARAMETERS[name]
    if isinstance(expected, str):
        assert f'{count / 1e6:.0f}M' == expected
    elif expected is not None:
        assert count == expected


@pytest.mark.parametrize('name', NAMES)
def test_the_model_zoo_says_how_it_is_trained(name):
    cfg, entry = load(name), metafile()[name]['Metadata']
    assert entry['Batch Size'] == cfg.train_dataloader.batch_size * (1 if name in SMALL else 8)
    length = {key: cfg.train_cfg.get(setting) for key, setting in (
        ('Epochs', 'max_epochs'), ('Iterations', 'max_iters'))}
    assert {key: entry[key] for key in length if key in entry} == {
        key: value for key, value in length.items() if value is not None}


def predict(model, size):
    """Predictions for one black image."""
    from mmdet.structures import DetDataSample
    sample = DetDataSample(metainfo=dict(
        ori_shape=(size, size), img_shape=(size, size), scale_factor=(1.0, 1.0)))
    with torch.no_grad():
        return model(torch.zeros(1, 3, size, size), [sample], mode='predict')[0].pred_instances


@pytest.mark.parametrize('name', [
    'mask-rcnn_localvmamba-nano_digits',
    'mask-rcnn_localvim-t-vitdet_lsj-100e_coco',
    'cascade-mask-rcnn_localvim-t-vitdet_lsj-100e_coco',
])
def test_detectors_predict(name):
    model = build(name)
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 64, 64))
    strides = [stride[0] for stride in model.rpn_head.prior_generator.strides]
    assert [64 // x.shape[-1] for x in maps] == strides
    instances = predict(model, 64)
    assert instances.bboxes.shape[-1] == 4 and instances.masks.shape[-2:] == (64, 64)


@pytest.mark.parametrize('name', [
    'upernet_localvim-t_8xb2-160k_ade20k-512x512',
    'upernet_localvmamba-nano_digits',
    'upernet_localvim-nano_digits',
])
def test_segmentors_predict(name):
    model = build(name)
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 64, 96), mode='tensor')
    assert logits.shape[1] == load(name).model.decode_head.num_classes
    if name.startswith('upernet_localvim-t'):
        assert logits.shape[-2:] == (4, 6)  # maps of stride 16: no neck


@pytest.mark.parametrize('name', ['localvim-t-midcls_8xb128_in1k', 'localvmamba-nano_digits'])
def test_classifiers_predict(name):
    model = build(name)
    with torch.no_grad():
        scores = model(torch.zeros(2, 3, 64, 64), mode='tensor')
    assert scores.shape == (2, load(name).model.head.num_classes)


def optimizer_groups(name):
    """{parameter name: (its optimizer group, the module that owns it)}, lr, weight decay."""
    cfg, model = copy.deepcopy(load(name)), build(name)
    cfg.optim_wrapper.type = 'OptimWrapper'  # mixed precision wants a GPU
    constructor = cfg.optim_wrapper.pop('constructor', 'DefaultOptimWrapperConstructor')
    paramwise = cfg.optim_wrapper.pop('paramwise_cfg')
    with in_scope(cfg):
        wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
            type=constructor, optim_wrapper_cfg=cfg.optim_wrapper, paramwise_cfg=paramwise))(model)
    owners = {f'{prefix}.{name}': module for prefix, module in model.named_modules()
              for name, _ in module.named_parameters(recurse=False)}
    group_of = {parameter: group for group in wrapper.param_groups for parameter in group['params']}
    groups = {name: (group_of[parameter], owners[name])
              for name, parameter in model.named_parameters()}
    optimizer = load(name).optim_wrapper.optimizer
    return groups, optimizer.lr, optimizer.weight_decay


@pytest.mark.parametrize('name, decay', [
    ('mask-rcnn_localvmamba-t_1x_coco', 0.05),
    ('mask-rcnn_localvim-t-vitdet_lsj-100e_coco', 0.05),
    ('upernet_localvmamba-t_8xb2-160k_ade20k-512x512', 0.01),
    ('localvim-t-midcls_8xb128_in1k', 0.04),
])
def test_weight_decay(name, decay):
    groups, _, configured = optimizer_groups(name)
    assert configured == decay
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    seen = set()
    for parameter, (group, owner) in groups.items():
        last = parameter.rsplit('.', 1)[-1]
        spared = (isinstance(owner, norms) or 'bias' in last
                  or last in ('A_log', 'D', 'pos_embed', 'cls_token'))
        assert group['weight_decay'] == (0 if spared else decay), parameter
        seen.add(last)
    expected = {'A_log', 'D', 'dt_proj_bias', 'bias', 'weight', 'x_proj_weight', 'dt_proj_weight'}
    if 'localvim' in name:
        expected |= {'pos_embed', 'conv_bias'}
    if 'midcls' in name:
        expected.add('cls_token')
    assert expected <= seen


def test_layer_decay():
    name = 'mask-rcnn_localvim-t-vitdet_lsj-100e_coco'
    groups, lr, _ = optimizer_groups(name)
    rate, depth = load(name).optim_wrapper.paramwise_cfg.decay_rate, 20
    for parameter, (group, _) in groups.items():
        if parameter.startswith(('backbone.patch_embed', 'backbone.pos_embed')):
            exponent = depth + 1
        elif parameter.startswith('backbone.layers.'):
            exponent = depth - int(parameter.split('.')[2])
        else:
            exponent = 0
        assert group['lr'] == pytest.approx(lr * rate ** exponent), parameter


def scheduled_rates(cfg, epochs, epoch_length):
    """Learning rate of every iteration."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for scheduler in cfg.param_scheduler:
        scheduler = dict(scheduler, optimizer=optimizer)
        if scheduler.pop('convert_to_iter_based', False):
            scheduler.setdefault('end', epochs)
            scheduler['epoch_length'] = epoch_length
            kind = PARAM_SCHEDULERS.get(scheduler.pop('type'))
            schedulers.append(kind.build_iter_from_epoch(**scheduler))
        else:
            schedulers.append(PARAM_SCHEDULERS.build(scheduler))
    rates = []
    for index in range(epochs * epoch_length):
        rates.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (index + 1) % epoch_length == 0:
                scheduler.step()
    return rates


@pytest.mark.parametrize('name', [name for name in IMAGENET if 'plus' in name])
def test_vim_plus_recipe(name):
    """As hustvl/Vim makes it from Vim: a constant rate, 5e-6 for 512 images and 1e-5 for 1024, and hardly any decay."""
    cfg = load(name)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-5, 1e-8)
    assert cfg.param_scheduler == [] and cfg.train_cfg.max_epochs == 30 and '30e' in name
    assert 8 * cfg.train_dataloader.batch_size == 1024
    assert cfg.model.backbone.drop_path_rate == 0 and cfg.model.backbone.stride == 8


@pytest.mark.parametrize('name', [name for name in IMAGENET if 'plus' not in name])
def test_imagenet_recipe(name):
    cfg = load(name)
    total = 8 * cfg.train_dataloader.batch_size
    assert total == 1024 == cfg.auto_scale_lr.base_batch_size and '8xb128' in name
    assert cfg.train_cfg.max_epochs == (100 if '100e' in name else 300) == cfg.param_scheduler[1].end
    optimizer = cfg.optim_wrapper.optimizer
    v2 = '-v2' in name  # VMamba's recipe, which is Swin's
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05 if v2 else 0.04)
    assert cfg.model.backbone.drop_path_rate == (VMAMBA_V2[name] if v2 else 0.1)
    assert cfg.optim_wrapper.get('clip_grad') == (dict(max_norm=5.0) if v2 else None)
    assert cfg.model.head.loss.label_smooth_val == 0.1
    ema = cfg.custom_hooks[0]
    assert (ema.type, ema.momentum) == ('EMAHook', 1e-4)
    augments = {a.type: a.alpha for a in cfg.data_preprocessor.batch_augments.augments}
    assert augments == dict(Mixup=0.8 if v2 else 0.2, CutMix=1.0)


@pytest.mark.parametrize('name, first, last', [(IMAGENET[0], 1e-7, 1e-6), ('vmamba-t-v2_8xb128_in1k', 1e-6, 1e-5)])
def test_imagenet_learning_rate(name, first, last):
    rates = scheduled_rates(load(name), epochs=300, epoch_length=10)
    assert rates[0] == pytest.approx(first)
    assert max(rates) == pytest.approx(1e-3) and rates.index(max(rates)) in (199, 200)
    assert rates[1600] == pytest.approx((1e-3 + last) / 2, rel=1e-2)  # half of the cosine
    assert rates[-1] == pytest.approx(last, rel=0.05)


@pytest.mark.parametrize('name', COCO)
def test_coco_recipe(name):
    cfg = load(name)
    total = 8 * cfg.train_dataloader.batch_size
    assert total == cfg.auto_scale_lr.base_batch_size
    assert cfg.optim_wrapper.type == cfg.amp_optim_wrapper
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
    steps = cfg.param_scheduler[1]
    if 'lsj' in name:
        epoch = 118000 / total  # iterations, as ViTDet counts
        assert total == 64
        assert cfg.train_cfg.max_iters / epoch == pytest.approx(100, abs=0.01)
        assert [int(i / epoch) for i in steps.milestones] == [88, 96]
        assert steps.end == cfg.train_cfg.max_iters and not steps.by_epoch
        begin, interval = cfg.train_cfg.dynamic_intervals[0]
        assert begin < cfg.train_cfg.max_iters and interval == cfg.train_cfg.max_iters
        assert cfg.model.backbone.drop_path_rate == 0.1
    else:
        epochs, milestones = (36, [27, 33]) if '3x' in name else (12, [8, 11])
        assert total == 16
        assert cfg.train_cfg.max_epochs == epochs == steps.end
        assert steps.milestones == milestones and steps.by_epoch
        assert cfg.model.backbone.drop_path_rate == (0.3 if '-s-v2' in name else 0.6 if '-b-v2' in name else 0.2)


@pytest.mark.parametrize('name', [name for name in NAMES if '_vmamba' in f'_{name}' and '-v2' in name])
def test_vmamba_v2(name):
    """The version is in the name, and the directions are VMamba's."""
    backbone = build(name).backbone
    assert set(backbone.directions) == {('h', 'v', 'h_flip', 'v_flip')}
    block = backbone.stages[0].blocks[0]
    assert block.mixer.scattn is None and not block.mixer.gate and block.mixer.ssm.A_log.shape[-1] == 1
    sizes = re.search(r'vmamba-(\w)-v2(?:-s(\d)l(\d+))?_', name).groups()
    expand, depth = map(int, sizes[1:]) if sizes[1] else dict(t=(1, 8), s=(2, 15), b=(2, 15))[sizes[0]]
    assert block.mixer.out_proj.in_features == expand * backbone.embed_dims[0] and backbone.depths == [2, 2, depth, 2]


@pytest.mark.parametrize('name', ADE20K)
def test_ade20k_recipe(name):
    cfg = load(name)
    assert 8 * cfg.train_dataloader.batch_size == 16 == cfg.auto_scale_lr.base_batch_size
    assert cfg.train_cfg.max_iters == 160000 == cfg.param_scheduler[1].end
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 6e-5, 0.01)
    if 'localvim' in name:
        assert tuple(cfg.model.backbone.out_indices) == (4, 9, 14, 19)


@pytest.mark.parametrize('name', SMALL)
def test_small_ones_run_anywhere(name):
    """The demos need no GPU and start every time from the same seed."""
    cfg = load(name)
    assert 'SyncBN' not in repr(cfg.model) and cfg.optim_wrapper.type == 'OptimWrapper'
    assert cfg.randomness.seed == 0
    roots = dict(digits='data/digits/', fashion='data/fashion_mnist/')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root.startswith(roots[name.rsplit('_', 1)[-1]])
    files = [evaluator.ann_file for evaluator in (cfg.val_evaluator, cfg.test_evaluator) if 'ann_file' in evaluator]
    assert all(file.startswith(cfg.val_dataloader.dataset.data_root) for file in files)
    assert bool(files) == (cfg.default_scope == 'mmdet')



@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """An image and a label image."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / 'image.png')
    Image.fromarray(rng.integers(0, 12, (90, 120), np.uint8)).save(folder / 'labels.png')
    return folder


def image_info(cfg, folder):
    """Return a sample as a data set hands it to its pipeline."""
    info = dict(img_path=str(folder / 'image.png'), img_id=0, height=90, width=120)
    if cfg.default_scope == 'mmpretrain':
        return dict(info, gt_label=0)
    if cfg.default_scope == 'mmseg':
        return dict(info, seg_map_path=str(folder / 'labels.png'), reduce_zero_label=True,
                    seg_fields=[])
    box = [10.0, 10.0, 80.0, 70.0]
    polygon = [10.0, 10.0, 80.0, 10.0, 80.0, 70.0]
    return dict(info, instances=[dict(bbox=box, bbox_label=0, ignore_flag=0, mask=[polygon])])


@pytest.mark.parametrize('name, blocks, directions, scattn', [
    ('vim-t_8xb128_in1k', 24, 'h h_flip', False),
    ('vim-t-local_8xb128_in1k', 24, 'w2 w2_flip', False),
    ('localvim-t-nosearch-noscattn_8xb128_in1k', 20, 'h h_flip w2 w2_flip', False),
    ('localvim-t-nosearch_8xb128_in1k', 20, 'h h_flip w2 w2_flip', True),
    ('localvim-t-nosearch-spatial_8xb128_in1k', 20, 'h h_flip w2 w2_flip', dict(spatial=True)),
    ('localvim-nano_digits', 6, 'h h_flip w2 w2_flip', True),
])
def test_ablations_differ_where_they_say(name, blocks, directions, scattn):
    backbone = build(name).backbone
    assert backbone.directions == [tuple(directions.split())] * blocks
    assert load(name).model.backbone.get('scattn', True) == scattn
    gate = backbone.layers[0].mixer.scattn
    assert (gate is not None) == bool(scattn)
    assert gate is None or (gate.spatial_select is not None) == isinstance(scattn, dict)


# one configuration of each data set
@pytest.mark.parametrize('name, train_size, test_size', [
    ('localvim-t_8xb128_in1k', (224, 224), (224, 224)),
    ('mask-rcnn_localvmamba-t_1x_coco', (800, 1067), (800, 1067)),
    ('mask-rcnn_localvmamba-t_ms-3x_coco', None, (800, 1067)),
    ('mask-rcnn_localvim-t-vitdet_lsj-100e_coco', (1024, 1024), (1024, 1024)),
    ('upernet_localvmamba-t_8xb2-160k_ade20k-512x512', None, (512, 683)),
    ('localvmamba-nano_digits', (32, 32), (32, 32)),
    ('mask-rcnn_localvmamba-nano_digits', None, (96, 128)),
    ('upernet_localvmamba-nano_digits', None, (96, 128)),
])
def test_pipelines(name, train_size, test_size, files):
    cfg = load(name)
    with in_scope(cfg):
        train, test = Compose(cfg.train_pipeline), Compose(cfg.test_pipeline)
        results = [train(image_info(cfg, files)) for _ in range(5)]
        sizes = [tuple(r['inputs'].shape[-2:]) for r in results if r is not None]
        assert sizes and (train_size is None or set(sizes) == {train_size})
        assert tuple(test(image_info(cfg, files))['inputs'].shape[-2:]) == test_size


@pytest.mark.parametrize('name, size', [('localvim-nano_digits', 32), ('localvim-nano_fashion', 28)])
@pytest.mark.parametrize('own', [(0, 0), (8, -3), (-12, 70)])
def test_small_classifiers_take_pictures_of_any_size(name, size, own, tmp_path):
    """Those of the model's size stay as they are."""
    shape = size + own[0], size + own[1]
    pixels = np.random.RandomState(0).randint(0, 255, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    cfg = load(name)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for pipeline in (cfg.train_pipeline, cfg.val_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline):
            sample = Compose(pipeline)(dict(img_path=str(tmp_path / 'x.png'), gt_label=1))
            assert sample['inputs'].shape == (3, size, size)
        if shape == (size, size):
            assert np.array_equal(sample['inputs'].numpy()[::-1].transpose(1, 2, 0), pixels)


@pytest.mark.parametrize('name', ['upernet_localvmamba-nano_digits', 'upernet_localvim-t_8xb2-160k_ade20k-512x512'])
@pytest.mark.parametrize('pipeline', ['train_pipeline', 'test_pipeline'])
def test_pipelines_follow_reduce_zero_label_of_the_dataset(name, pipeline, files):
    cfg = load(name)
    with DefaultScope.overwrite_default_scope('mmseg'):
        for reduced, expected in ((True, {*range(11), 255}), (False, {*range(12), 255})):
            info = dict(image_info(cfg, files), reduce_zero_label=reduced)
            labels = Compose(cfg[pipeline])(info)['data_samples'].gt_sem_seg.data
            assert set(labels.unique().tolist()) | {255} == expected


def test_rand_augment_ranges():
    """rand-m9-mstd0.5: not the increasing operations."""
    pipeline = load('localvim-t_8xb128_in1k').train_pipeline
    augment = next(t for t in pipeline if t.type == 'RandAugment')
    ranges = {p.type: p.get('magnitude_range') for p in augment.policies}
    assert len(augment.policies) == 15
    assert tuple(ranges['Solarize']) == (0, 256) and tuple(ranges['Contrast']) == (-0.9, 0.9)


@pytest.mark.parametrize('name, views', [
    ('upernet_localvim-s_8xb2-160k_ade20k-512x512', 12),
    ('upernet_localvim-nano_digits', 3),
])
def test_test_time_augmentation(name, views, files):
    cfg, model = load(name), build(name)
    with in_scope(cfg):
        data = Compose(cfg.tta_pipeline)(image_info(cfg, files))
        assert len(data['inputs']) == views
        if 'digits' in name:
            tta = MODELS.build(dict(cfg.tta_model, module=model)).eval()
            with torch.no_grad():
                batches = {key: [[item] for item in value] for key, value in data.items()}
                result = tta.test_step(batches)
            assert result[0].pred_sem_seg.shape == (90, 120)
