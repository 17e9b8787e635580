"""Test with_backbone: its rules, its refusals, and upstream methods that train and predict with our backbones.

research/compatibility.py tries all methods.
"""
import copy
import importlib
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmlocalmamba import with_backbone

VMAMBA = dict(type='mmlocalmamba.LocalVMamba', arch='nano')  # 32, 64, 128, 256 channels
VIM = dict(type='mmlocalmamba.LocalVim', arch='nano')  # 6 blocks of 64 channels, stride 16
RESNET = dict(type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), init_cfg=dict(type='Pretrained'))
DILATED = dict(RESNET, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
VIT = dict(type='VisionTransformer', patch_size=16, out_indices=(2, 5, 8, 11))
SSD = dict(type='SSDVGG', out_indices=(22, 34))


def detector(**more):
    return {**dict(type='RetinaNet', backbone=RESNET, neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048]),
                   bbox_head=dict(type='RetinaHead', in_channels=256)), **more}


def segmentor(**head):
    return dict(type='EncoderDecoder', pretrained='open-mmlab://resnet50_v1c', backbone=DILATED,
                decode_head=dict(type='DepthwiseSeparableASPPHead', in_channels=2048, in_index=3, **head),
                auxiliary_head=[dict(type='FCNHead', in_channels=1024, in_index=2)])


def classifier(**more):
    return {**dict(type='ImageClassifier', backbone=dict(RESNET, out_indices=(3, )),
                   neck=dict(type='GlobalAveragePooling'), head=dict(type='LinearClsHead', in_channels=2048)), **more}


# ---- a neck reads the backbone ----

def test_neck_reads_the_backbone():
    given = detector(data_preprocessor=dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675],
                                            std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=32))
    before = copy.deepcopy(given)
    model = with_backbone(given, VMAMBA)
    assert given == before and 'out_indices' not in VMAMBA
    assert model['backbone'] == dict(VMAMBA, out_indices=[0, 1, 2, 3])
    assert model['neck']['in_channels'] == [32, 64, 128, 256]
    assert model['bbox_head'] == given['bbox_head']  # it reads the neck
    assert model['data_preprocessor'] == dict(
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
        pad_size_divisor=32)


def test_start_level_leaves_stages_out():
    """Stages that no part reads would get no gradient, which DistributedDataParallel takes for an error."""
    given = detector()
    given['neck'] = dict(given['neck'], start_level=1, add_extra_convs='on_input')
    model = with_backbone(given, VMAMBA)
    assert model['backbone']['out_indices'] == [1, 2, 3]
    assert model['neck']['in_channels'] == [64, 128, 256] and model['neck']['start_level'] == 0
    given['neck']['type'] = 'NASFCOS_FPN'  # it reads the first map too
    model = with_backbone(given, VMAMBA)
    assert model['backbone']['out_indices'] == [0, 1, 2, 3] and model['neck']['start_level'] == 1


@pytest.mark.parametrize('indices, given, widths, expected', [
    ((3, 4, 5), {}, [1024, 512, 256], ([1, 2, 3], [256, 128, 64])),  # YOLOv3 reads the last map first
    ((0, 1, 2), {}, [256, 512, 1024], ([0, 1, 2], [32, 64, 128])),  # not the last three
    ((22, 34), dict(out_indices=(2, 3)), [1024, 512], ((2, 3), [256, 128])),
    ((22, 34), dict(out_indices=(2, 3)), [512, 512], ((2, 3), [128, 256])),
])
def test_stages_of_maps(indices, given, widths, expected):
    model = detector(backbone=dict(RESNET, out_indices=indices), neck=dict(in_channels=widths))
    model = with_backbone(model, dict(VMAMBA, **given))
    assert (model['backbone']['out_indices'], model['neck']['in_channels']) == expected


def test_an_inner_model():
    semi = dict(type='SoftTeacher', detector=detector(),
                data_preprocessor=dict(type='MultiBranch', data_preprocessor=dict(bgr_to_rgb=False)))
    model = with_backbone(semi, VMAMBA)
    assert model['detector']['neck']['in_channels'] == [32, 64, 128, 256]
    assert model['data_preprocessor']['data_preprocessor']['bgr_to_rgb'] is True
    assert 'mean' not in model['data_preprocessor']


# ---- heads read the backbone ----

def test_heads_read_the_backbone():
    model = with_backbone(segmentor(), VMAMBA)
    assert model['backbone']['out_indices'] == [2, 3]
    assert (model['decode_head']['in_index'], model['decode_head']['in_channels']) == (1, 256)
    assert (model['auxiliary_head'][0]['in_index'], model['auxiliary_head'][0]['in_channels']) == (0, 128)
    assert 'pretrained' not in model
    model = with_backbone(segmentor(c1_in_channels=256), VMAMBA)
    assert model['backbone']['out_indices'] == [0, 2, 3]
    assert model['decode_head'] == dict(type='DepthwiseSeparableASPPHead', in_channels=256, in_index=2,
                                        c1_in_channels=32)
    several = segmentor()
    several['decode_head'].update(in_channels=[512, 1024, 2048], in_index=(1, 2, 3))
    model = with_backbone(several, VMAMBA)
    assert model['decode_head']['in_channels'] == [64, 128, 256] and model['decode_head']['in_index'] == [0, 1, 2]


def test_heads_inside_heads():
    """K-Net's first head reads the backbone. Its refining heads have no in_index and stay as they are."""
    given = segmentor()
    refining = [dict(type='KernelUpdateHead', in_channels=512)]
    given['decode_head'] = dict(type='IterativeDecodeHead', kernel_generate_head=given['decode_head'],
                                kernel_update_head=refining)
    model = with_backbone(given, VMAMBA)
    assert model['decode_head']['kernel_generate_head']['in_channels'] == 256
    assert model['decode_head']['kernel_update_head'] == refining


def test_a_head_reads_all_maps():
    queries = dict(type='Mask2Former', backbone=RESNET, panoptic_head=dict(in_channels=[256, 512, 1024, 2048],
                                                                           pixel_decoder=dict(num_outs=3)))
    assert with_backbone(queries, VMAMBA)['panoptic_head']['in_channels'] == [32, 64, 128, 256]


# ---- LocalVim has one stride ----

def test_localvim_gets_a_pyramid():
    model = with_backbone(detector(), VIM)
    pyramid, neck = model['neck']
    assert pyramid == dict(type='mmlocalmamba.Pyramid', channels=64, scales=[4, 2, 1, 0.5])
    assert neck['in_channels'] == [64] * 4
    assert model['backbone'] == dict(VIM, out_type='featmap', out_indices=[0, 2, 3, 5])
    one = detector(backbone=dict(RESNET, out_indices=(3, )), neck=dict(type='DilatedEncoder', in_channels=2048))
    assert [part.get('scales') for part in with_backbone(one, VIM)['neck']] == [[0.5], None]  # anchors of stride 32
    assert with_backbone(detector(backbone=VIT), VIM)['neck']['type'] == 'FPN'  # the model needs one stride


@pytest.mark.parametrize('strides, scales', [
    ((1, 2, 2, 2), [4, 1, 0.5]),
    ((1, 2, 1, 1), [4, 2, 2]),  # a dilated ResNet
    ((4, 2, 2, 2), [4, 1, 0.5]),  # a Swin's, which begin with the patches
])
def test_strides_of_the_former_backbone(strides, scales):
    given = dict(segmentor(c1_in_channels=256), backbone=dict(RESNET, strides=strides))
    assert with_backbone(given, VIM)['neck']['scales'] == scales


def test_no_pyramid_where_strides_agree():
    assert 'neck' not in with_backbone(segmentor(), dict(VIM, patch_size=8))


# ---- image-level models ----

def test_pooled_classifiers():
    model = with_backbone(classifier(), VMAMBA)
    assert model['neck'] == classifier()['neck'] and model['head']['in_channels'] == 256
    model = with_backbone(classifier(), VIM)  # LocalVim pools by itself, after the sum with the residual stream
    assert model['neck'] is None and model['head']['in_channels'] == 64 and 'out_type' not in model['backbone']
    assert with_backbone(classifier(), dict(VIM, out_type='featmap'))['neck'] == classifier()['neck']


def test_classifiers_of_one_vector():
    """A ViT gives its linear head a vector, without a neck."""
    given = classifier(neck=None, backbone=dict(type='VisionTransformer', patch_size=16))
    assert with_backbone(given, VMAMBA)['neck'] == dict(type='GlobalAveragePooling')
    model = with_backbone(given, VIM)
    assert model['neck'] is None and 'out_type' not in model['backbone']
    given['head'] = dict(type='CSRAClsHead', in_channels=768)  # it reads a map
    assert with_backbone(given, VMAMBA)['neck'] is None
    assert with_backbone(given, VIM)['backbone']['out_type'] == 'featmap'


def test_self_supervised_models():
    views = dict(type='SimSiam', backbone=dict(type='ResNet', depth=50), data_preprocessor=dict(mean=[0]),
                 neck=dict(type='NonLinearNeck', in_channels=2048, with_avg_pool=True), head=dict(predictor=dict()))
    model = with_backbone(views, VIM)
    assert model['backbone']['out_type'] == 'featmap' and model['neck']['in_channels'] == 64
    assert model['data_preprocessor']['to_rgb'] is True


def test_several_maps_of_a_classifier():
    """HRNet's neck fuses four maps before the pooling."""
    necks = [dict(type='HRFuseScales', in_channels=[18, 36, 72, 144]), dict(type='GlobalAveragePooling')]
    given = classifier(backbone=dict(type='HRNet'), neck=necks)
    model = with_backbone(given, VIM)
    assert [neck['type'] for neck in model['neck']] == ['mmlocalmamba.Pyramid', 'HRFuseScales', 'GlobalAveragePooling']
    assert model['neck'][0]['scales'] == [4, 2, 1, 0.5] and model['head'] == given['head']
    assert with_backbone(given, VMAMBA)['neck'][0]['in_channels'] == [32, 64, 128, 256]


# ---- refusals ----

@pytest.mark.parametrize('model, backbone, message', [
    (dict(type='GAN', generator=dict()), VMAMBA, 'GAN has 0 parts with a backbone'),
    (dict(type='DeepSORT', detector=detector(), reid=classifier()), VMAMBA, 'DeepSORT has 2 parts with a backbone'),
    (detector(neck=None, bbox_head=dict(type='YOLOHead')), VMAMBA,
     r"RetinaNet has no neck or head with in_channels; its heads are \['YOLOHead'\]"),
    (detector(neck=dict(type='HourglassNeck')), VMAMBA, 'the neck HourglassNeck of RetinaNet has no in_channels'),
    (dict(segmentor(), neck=dict(type='JPU', in_channels=(1024, 2048))), VMAMBA,
     'the neck JPU of EncoderDecoder has no out_channels'),
    (dict(segmentor(), neck=dict(type='Feature2Pyramid', embed_dim=768)), VIM,
     'the neck Feature2Pyramid of EncoderDecoder has no in_channels'),
    (detector(roi_head=dict(type='StandardRoIHead', shared_head=dict(type='ResLayer'))), VMAMBA,
     'StandardRoIHead has shared_head, which is made for ResNet'),
    (detector(neck=dict(type='RFP', in_channels=[8], rfp_backbone=dict())), VMAMBA,
     'RFP has rfp_backbone, which is made for ResNet'),
    (detector(backbone=SSD, neck=dict(in_channels=(512, 1024))), VMAMBA,
     'the strides of the 2 maps of SSDVGG are unknown: use LocalVMamba with out_indices'),
    (detector(backbone=SSD, neck=dict(in_channels=(512, 1024))), VIM, 'the strides of the 2 maps of SSDVGG'),
    (detector(), dict(VMAMBA, out_indices=(1, 2)), r'RetinaNet reads 4 maps, but out_indices=\(1, 2\) gives 2'),
    (detector(backbone=VIT), VMAMBA, 'RetinaNet reads maps of one stride, as VisionTransformer gives: use LocalVim'),
    (detector(), dict(type='mmlocalmamba.SimpleFPN', backbone_channel=8, out_channels=8, num_outs=4),
     'mmlocalmamba.SimpleFPN is not a backbone of mmlocalmamba'),
])
def test_refusals_name_the_part(model, backbone, message):
    with pytest.raises(ValueError, match=message):
        with_backbone(model, backbone)


# ---- in configurations ----

def test_the_inherited_model_is_replaced(tmp_path):
    """A configuration file and Python give the same."""
    (tmp_path / 'base.py').write_text(f'model = {detector()!r}')
    (tmp_path / 'mine.py').write_text(
        f"_base_ = 'base.py'\nmodel = __import__('mmlocalmamba').with_backbone(_base_.model, {VMAMBA!r})")
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.model.backbone == dict(VMAMBA, out_indices=[0, 1, 2, 3]) and '_delete_' not in cfg.model
    cfg = Config.fromfile(tmp_path / 'base.py')
    cfg.merge_from_dict(dict(model=with_backbone(cfg.model, VMAMBA)))
    assert cfg.model.backbone == dict(VMAMBA, out_indices=[0, 1, 2, 3]) and '_delete_' not in cfg.model


def upstream(package, name):
    """Return the model's configuration of an installed package, without weights to download."""
    warnings.simplefilter('ignore')
    folder = Path(pytest.importorskip(package).__file__).parent / '.mim' / 'configs'
    importlib.import_module(f'{package}.models')
    cfg = Config.fromfile(folder / f'{name}.py')
    if package == 'mmpretrain':
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg.model


def data(package, model):
    """Return two images of 64x64 pixels with annotations."""
    if package == 'mmdet':
        from mmdet.testing import demo_mm_inputs
        return demo_mm_inputs(2, (3, 64, 64), num_items=[3, 4])
    if package == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        shape = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64))
        labels = torch.arange(2).view(2, 1, 1, 1).expand(2, 1, 64, 64)
        return dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
                    data_samples=[SegDataSample(metainfo=shape, gt_sem_seg=PixelData(data=label)) for label in labels])
    from mmpretrain.structures import DataSample
    return dict(inputs=torch.randint(0, 256, (2, 3, 64, 64)).float(),
                data_samples=[DataSample().set_gt_label(label) for label in (1, 2)])


@pytest.mark.parametrize('backbone', [VMAMBA, VIM], ids=['LocalVMamba', 'LocalVim'])
@pytest.mark.parametrize('name', [
    'mmdet/atss/atss_r50_fpn_1x_coco',  # a neck with start_level
    'mmdet/yolof/yolof_r50-c5_8xb8-1x_coco',  # a neck that reads one map
    'mmseg/deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512',  # heads with in_index and c1_in_channels
    'mmseg/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512',  # a head that reads all maps
    'mmpretrain/resnet/resnet50_8xb32_in1k',  # global average pooling
    'mmpretrain/vision_transformer/vit-base-p16_64xb64_in1k-384px',  # a linear head alone
])
def test_methods_train_and_predict(name, backbone):
    """Every parameter of the backbone gets a gradient."""
    from mmengine.model import revert_sync_batchnorm
    torch.manual_seed(0)
    package, name = name.split('/', 1)
    cfg = with_backbone(upstream(package, name), dict(backbone, drop_path_rate=0.0))
    del cfg['_delete_']
    with DefaultScope.overwrite_default_scope(package):
        if package == 'mmseg':
            cfg['data_preprocessor'].update(size=(64, 64))
            cfg['test_cfg'].update(mode='whole')
        model = revert_sync_batchnorm(MODELS.build(cfg))
        model.init_weights()
        batch = data(package, model)
        loss, _ = model.parse_losses(model.train()(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss'))
        loss.backward()
        assert torch.isfinite(loss)
        assert not [key for key, value in model.backbone.named_parameters() if value.grad is None]
        torch.optim.AdamW(model.parameters(), lr=1e-5).step()
        assert len(model.eval().test_step(batch)) == 2


@pytest.mark.parametrize('name, message', [
    ('mmdet/faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco', 'StandardRoIHead has shared_head'),
    ('mmdet/detectors/detectors_htc-r50_1x_coco', 'RFP has rfp_backbone'),
    ('mmdet/ssd/ssd300_coco', 'the 2 maps of SSDVGG'),
    ('mmseg/fastfcn/fastfcn_r50-d32_jpu_aspp_4xb4-80k_ade20k-512x512', 'the neck JPU of EncoderDecoder'),
    ('mmpretrain/spark/spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k', 'the neck SparKLightDecoder of SparK'),
])
def test_methods_that_are_refused(name, message):
    package, name = name.split('/', 1)
    with pytest.raises(ValueError, match=message):
        with_backbone(upstream(package, name), VMAMBA)
