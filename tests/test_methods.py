"""Our backbones in methods of others: what with_backbone sets, and methods of each kind that train and predict."""
import copy
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmlocalmamba import methods, with_backbone

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools' / 'dev'))
import compatibility  # noqa: E402

VMAMBA = dict(type='mmlocalmamba.LocalVMamba', arch='nano')  # 32, 64, 128, 256 channels
VIM = dict(type='mmlocalmamba.LocalVim', arch='nano')  # 6 blocks of 64 channels, stride 16
RESNET = dict(type='ResNet', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), init_cfg=dict(type='Pretrained'))
DILATED = dict(RESNET, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))


def detector(**more):
    return dict(type='RetinaNet', backbone=RESNET, neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048]),
                bbox_head=dict(type='RetinaHead', in_channels=256), **more)


def segmentor(**head):
    return dict(type='EncoderDecoder', pretrained='open-mmlab://resnet50_v1c', backbone=DILATED,
                decode_head=dict(type='DepthwiseSeparableASPPHead', in_channels=2048, in_index=3, **head),
                auxiliary_head=[dict(type='FCNHead', in_channels=1024, in_index=2)])


def test_neck_reads_the_backbone():
    given = detector(data_preprocessor=dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675],
                                            std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=32))
    before = copy.deepcopy(given)
    model = with_backbone(given, VMAMBA)
    assert given == before and 'out_indices' not in VMAMBA
    assert model['backbone'] == dict(VMAMBA, out_indices=[0, 1, 2, 3])
    assert model['neck']['in_channels'] == [32, 64, 128, 256]
    assert model['bbox_head'] == given['bbox_head']  # it reads the neck
    assert model['data_preprocessor'] == dict(  # of ImageNet's weights, not of Caffe's
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
        pad_size_divisor=32)


def test_stages_that_nobody_reads_are_left_out():
    """Their output norms would get no gradient, which DistributedDataParallel takes for an error."""
    given = detector()
    given['neck'].update(start_level=1, add_extra_convs='on_input')
    model = with_backbone(given, VMAMBA)
    assert model['backbone']['out_indices'] == [1, 2, 3]
    assert model['neck']['in_channels'] == [64, 128, 256] and model['neck']['start_level'] == 0
    model = with_backbone(segmentor(), VMAMBA)
    assert model['backbone']['out_indices'] == [2, 3]
    assert (model['decode_head']['in_index'], model['decode_head']['in_channels']) == (1, 256)
    assert (model['auxiliary_head'][0]['in_index'], model['auxiliary_head'][0]['in_channels']) == (0, 128)
    assert 'pretrained' not in model


def test_heads_read_the_backbone():
    model = with_backbone(segmentor(c1_in_channels=256), VMAMBA)
    assert model['backbone']['out_indices'] == [0, 2, 3]
    assert model['decode_head'] == dict(type='DepthwiseSeparableASPPHead', in_channels=256, in_index=2,
                                        c1_in_channels=32)
    several = segmentor()
    several['decode_head'].update(in_channels=[512, 1024, 2048], in_index=(1, 2, 3))
    model = with_backbone(several, VMAMBA)
    assert model['decode_head']['in_channels'] == [64, 128, 256] and model['decode_head']['in_index'] == [0, 1, 2]
    iterative = segmentor()  # K-Net's heads are inside of another; what refines has no in_index, and is left alone
    refining = [dict(type='KernelUpdateHead', in_channels=512)]
    iterative['decode_head'] = dict(type='IterativeDecodeHead', kernel_generate_head=iterative['decode_head'],
                                    kernel_update_head=refining)
    model = with_backbone(iterative, VMAMBA)
    assert model['decode_head']['kernel_generate_head']['in_channels'] == 256
    assert model['decode_head']['kernel_update_head'] == refining
    queries = dict(type='Mask2Former', backbone=RESNET, panoptic_head=dict(in_channels=[256, 512, 1024, 2048],
                                                                           pixel_decoder=dict(num_outs=3)))
    assert with_backbone(queries, VMAMBA)['panoptic_head']['in_channels'] == [32, 64, 128, 256]


def test_jpu_hands_on_what_it_does_not_replace():
    given = segmentor()
    given.update(backbone=dict(RESNET, out_indices=(1, 2, 3)),
                 neck=dict(type='JPU', in_channels=(512, 1024, 2048), mid_channels=512))
    given['decode_head'].update(in_channels=[512, 1024, 2048], in_index=(0, 1, 2))
    given['auxiliary_head'][0].update(in_index=1)
    model = with_backbone(given, VMAMBA)
    assert model['neck']['in_channels'] == (64, 128, 256)
    assert model['decode_head']['in_channels'] == [64, 128, 2048]
    assert model['auxiliary_head'][0]['in_channels'] == 128


def test_localvim_gets_a_pyramid():
    model = with_backbone(detector(), VIM)
    pyramid, neck = model['neck']
    assert pyramid == dict(type='mmlocalmamba.Pyramid', channels=64, scales=[4, 2, 1, 0.5])
    assert neck['in_channels'] == [64] * 4
    assert model['backbone'] == dict(VIM, out_type='featmap', out_indices=[0, 2, 3, 5])
    one = dict(detector(), backbone=dict(RESNET, out_indices=(3, )), neck=dict(type='DilatedEncoder', in_channels=2048))
    assert [part.get('scales') for part in with_backbone(one, VIM)['neck']] == [[0.5], None]  # anchors of stride 32
    dilated = with_backbone(segmentor(), dict(VIM, patch_size=8))
    assert 'neck' not in dilated  # stride 8, as the dilated ResNet
    assert with_backbone(segmentor(c1_in_channels=256), VIM)['neck']['scales'] == [4, 2, 2]
    plain = dict(detector(), backbone=dict(type='VisionTransformer', patch_size=16, out_indices=(2, 5, 8, 11)))
    assert with_backbone(plain, VIM)['neck']['type'] == 'FPN'  # made for one stride


def test_image_level_models():
    given = dict(type='ImageClassifier', backbone=dict(RESNET, out_indices=(3, )),
                 neck=dict(type='GlobalAveragePooling'), head=dict(type='LinearClsHead', in_channels=2048))
    model = with_backbone(given, VMAMBA)
    assert model['neck'] == given['neck'] and model['head']['in_channels'] == 256
    model = with_backbone(given, VIM)  # pools itself, after the sum with the residual stream
    assert model['neck'] is None and model['head']['in_channels'] == 64 and 'out_type' not in model['backbone']
    assert with_backbone(given, dict(VIM, out_type='featmap'))['neck'] == given['neck']
    views = dict(type='SimSiam', backbone=dict(type='ResNet', depth=50), data_preprocessor=dict(mean=[0]),
                 neck=dict(type='NonLinearNeck', in_channels=2048, with_avg_pool=True), head=dict(predictor=dict()))
    model = with_backbone(views, VIM)
    assert model['backbone']['out_type'] == 'featmap' and model['neck']['in_channels'] == 64
    assert model['data_preprocessor']['to_rgb'] is True


def test_inner_models_and_falling_lists():
    yolo = detector()
    yolo.update(backbone=dict(type='Darknet', out_indices=(3, 4, 5)), neck=dict(in_channels=[1024, 512, 256]))
    semi = dict(type='SoftTeacher', detector=yolo,
                data_preprocessor=dict(type='MultiBranch', data_preprocessor=dict(bgr_to_rgb=False)))
    model = with_backbone(semi, VMAMBA)
    assert model['detector']['neck']['in_channels'] == [256, 128, 64]
    assert model['detector']['backbone']['out_indices'] == [1, 2, 3]
    assert model['data_preprocessor']['data_preprocessor']['bgr_to_rgb'] is True


@pytest.mark.parametrize('indices,given,widths,expected', [
    ((0, 1, 2), {}, [256, 512, 1024], ([0, 1, 2], [32, 64, 128])),  # not the last three
    ((22, 34), dict(out_indices=(2, 3)), [1024, 512], ((2, 3), [256, 128])),  # two that fall
    ((22, 34), dict(out_indices=(2, 3)), [512, 512], ((2, 3), [128, 256])),
])
def test_stages_of_maps(indices, given, widths, expected):
    model = dict(detector(), backbone=dict(RESNET, out_indices=indices), neck=dict(in_channels=widths))
    model = with_backbone(model, dict(VMAMBA, **given))
    assert (model['backbone']['out_indices'], model['neck']['in_channels']) == expected


@pytest.mark.parametrize('change, backbone, message', [
    (dict(backbone=dict(type='SSDVGG', out_indices=(22, 34)), neck=dict(in_channels=(512, 1024))), VMAMBA,
     'the 2 maps of SSDVGG is not known: give out_indices'),
    (dict(), dict(VMAMBA, out_indices=(1, 2)), r'reads 4 maps, out_indices=\(1, 2\) gives 2'),
    (dict(neck=None, bbox_head=dict()), VMAMBA, 'says in_channels'),
    (dict(backbone=dict(type='SSDVGG', out_indices=(22, 34)), neck=dict(in_channels=(512, 1024))),
     dict(VMAMBA, out_indices=3), 'reads 2 maps, out_indices=3 gives 1'),
    (dict(backbone=dict(type='VisionTransformer', patch_size=16, out_indices=(2, 5, 8, 11))), VMAMBA,
     'RetinaNet is made for maps of one stride, those of VisionTransformer: take LocalVim'),
    (dict(), dict(type='mmlocalmamba.SimpleFPN', backbone_channel=8, out_channels=8, num_outs=4), 'no backbone of'),
])
def test_what_cannot_be_replaced(change, backbone, message):
    with pytest.raises(ValueError, match=message):
        with_backbone(dict(detector(), **change), backbone)


def test_a_model_without_backbone():
    with pytest.raises(ValueError, match='GAN has no single backbone'):
        with_backbone(dict(type='GAN', generator=dict()), VMAMBA)


def test_nothing_of_the_inherited_model_is_left(tmp_path):
    """In a file as in Python."""
    (tmp_path / 'base.py').write_text(f'model = {detector()!r}')
    (tmp_path / 'mine.py').write_text(
        f"_base_ = 'base.py'\nmodel = __import__('mmlocalmamba').with_backbone(_base_.model, {VMAMBA!r})")
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.model.backbone == dict(VMAMBA, out_indices=[0, 1, 2, 3]) and '_delete_' not in cfg.model
    cfg = Config.fromfile(tmp_path / 'base.py')
    cfg.merge_from_dict(dict(model=with_backbone(cfg.model, VMAMBA)))
    assert cfg.model.backbone == dict(VMAMBA, out_indices=[0, 1, 2, 3]) and '_delete_' not in cfg.model


# ---- upstream's own configurations ----

@pytest.fixture(scope='module')
def upstream():
    for package in compatibility.PACKAGES:
        pytest.importorskip(package)
    compatibility.preload()
    return {f'{package}/{method}': path for package in compatibility.PACKAGES
            for method, path in compatibility.methods(package).items()}


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='each runs in a fork')
@pytest.mark.parametrize('backbone', compatibility.OURS)
@pytest.mark.parametrize('method', compatibility.SAMPLE)
def test_methods_train_and_predict(upstream, method, backbone):
    """And no parameter of the backbone is without a gradient."""
    torch.set_num_threads(1)
    outcome = compatibility.in_process(upstream[method], method.split('/')[0], backbone, timeout=240)
    assert outcome[:3] == ('ok', '', '')
    assert not [name for name in outcome[3].split() if name.startswith('backbone')]


def test_the_page_says_what_the_table_says():
    rows = compatibility.read(compatibility.TABLE).values()
    assert {row['result'] for row in rows} == {'ok', 'failed'}
    assert compatibility.markdown(rows) in (ROOT / 'docs' / 'compatibility.md').read_text()


def test_a_process_that_hangs_or_dies_is_told(monkeypatch, tmp_path):
    def stuck(path, package, backbone, report):
        report('training')
        if package == 'dies':
            import os
            os._exit(9)
        import time
        time.sleep(60)

    monkeypatch.setattr(compatibility, 'attempt', stuck)
    assert compatibility.in_process('', 'hangs', '', 0.5) == ('failed', 'training', 'not done after 0.5 s', '')
    assert compatibility.in_process('', 'dies', '', 60) == ('failed', 'training', 'the process ended with 9', '')


def test_strides_of_dilated_networks():
    assert methods._strides_of(DILATED, [0, 1, 2, 3]) == [4, 8, 8, 8]
    assert methods._strides_of(RESNET, [1, 3]) == [8, 32]
