"""Compare SimpleFPN with ViTDet's pyramid in plain torch, and Pyramid with mmsegmentation's Feature2Pyramid."""
import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn
from torch.nn import functional as F

from mmlocalmamba.openmmlab.necks import Pyramid, SimpleFPN


def image(H=6, W=5, C=16):
    return torch.randn(2, C, H, W, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('num_outs', [4, 5, 6])
def test_levels(num_outs):
    """The levels have 4, 2, 1 and 1/2 times the resolution. Further levels take every second pixel of the last."""
    neck = SimpleFPN(16, 8, num_outs)
    outs = neck((image(2, 2, 3), image()))
    assert [tuple(out.shape) for out in outs] == [
        (2, 8, 24, 20), (2, 8, 12, 10), (2, 8, 6, 5), (2, 8, 3, 2), (2, 8, 2, 1), (2, 8, 1, 1)][:num_outs]
    for finer, coarser in zip(outs[3:], outs[4:]):
        torch.testing.assert_close(coarser, finer[:, :, ::2, ::2])


def test_operations_of_each_level():
    """Transposed convolutions enlarge, with a norm and GELU between two of them. Max-pooling reduces. A 1x1 and a 3x3
    convolution follow."""
    torch.manual_seed(0)
    neck = SimpleFPN(16, 8, 4, norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU')).eval()
    for module in neck.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
    x = image()
    (first, norm, gelu, second), up = neck.resample[0], neck.resample[1]
    assert isinstance(gelu, nn.GELU)
    sampled = [second(F.gelu(norm(first(x)))), up(x), x, F.max_pool2d(x, 2)]
    for level, out, lateral, last, C in zip(sampled, neck((x, )), neck.lateral_convs, neck.fpn_convs, (4, 8, 16, 16),
                                            strict=True):
        assert level.shape[1] == C == lateral.in_channels
        for conv, kernel in ((lateral, 1), (last, 3)):
            assert isinstance(conv, ConvModule) and isinstance(conv.norm, nn.BatchNorm2d)
            assert conv.kernel_size == (kernel, kernel) and isinstance(conv.activate, nn.ReLU)
            assert not conv.activate.inplace
            level = F.relu(conv.norm(conv.conv(level)))
        torch.testing.assert_close(out, level)


def test_convolutions_are_bare_by_default():
    neck = SimpleFPN(16, 8, 4)
    assert [type(module) for module in neck.resample[0]] == [nn.ConvTranspose2d, nn.GELU, nn.ConvTranspose2d]
    assert not any(conv.with_norm or conv.with_activation for conv in (*neck.lateral_convs, *neck.fpn_convs))
    # MMCV's other convolutions and initialisations are built by name.
    other = SimpleFPN(16, 8, 4, conv_cfg=dict(type='ConvWS'),
                      init_cfg=dict(type='Constant', layer='ConvTranspose2d', val=3.))
    assert {type(conv.conv).__name__ for conv in (*other.lateral_convs, *other.fpn_convs)} == {'ConvWS2d'}
    other.init_weights()
    assert other.resample[1].weight.eq(3).all()


@pytest.mark.parametrize('num_outs', [0, 3])
def test_too_few_levels(num_outs):
    with pytest.raises(ValueError, match=f'num_outs must be at least 4, got {num_outs}$'):
        SimpleFPN(16, 8, num_outs)


@pytest.mark.parametrize('H, W', [(1, 1), (1, 4), (4, 1)])
def test_a_map_that_cannot_be_halved(H, W):
    with pytest.raises(ValueError, match=f'got {H}x{W} tokens: use images of at least two patches'):
        SimpleFPN(16, 8, 4)([image(H, W)])


def test_pyramid_is_feature2pyramid():
    """The two agree where Feature2Pyramid has the scales, with the same norm."""
    necks = pytest.importorskip('mmseg.models.necks')
    torch.manual_seed(0)
    norm_cfg = dict(type='GN', num_groups=1)
    for scales in ([4, 2, 1, 0.5], [2, 1, 0.5, 0.25]):
        ours, theirs = Pyramid(8, scales), necks.Feature2Pyramid(8, scales, norm_cfg)
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
        maps = [image(8, 4, 8) + level for level in range(4)]
        for a, b in zip(ours(maps), theirs(maps), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_pyramid_of_other_scales():
    neck = Pyramid(8, [8, 0.5, 2])
    outs = neck([image(5, 3, 8).requires_grad_() for _ in range(3)])
    assert [tuple(out.shape[-2:]) for out in outs] == [(40, 24), (3, 2), (10, 6)]  # the last row is kept
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad.abs().sum() > 0 for p in neck.parameters())


@pytest.mark.parametrize('scales', [[], [3], [1, 0], [-2]])
def test_pyramid_scales_are_powers_of_two(scales):
    with pytest.raises(ValueError, match='powers of two'):
        Pyramid(8, scales)


def test_pyramid_needs_a_map_for_each_scale():
    with pytest.raises(ValueError, match='2 scales, but got 1 maps'):
        Pyramid(8, [1, 2])([image(4, 4, 8)])
