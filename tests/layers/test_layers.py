"""Layers by hand: what their formulas say, where whole models would not show a slip."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmlocalmamba.directions import scan_tables
from mmlocalmamba.layers import (
    MLP,
    ConvDownsample,
    ConvPatchEmbed,
    DropPath,
    LocalVimMixer,
    LocalVMambaMixer,
    PatchEmbed,
    PatchMerging,
    ResidualRMSNorm,
    SCAttn,
    resize_pos_embed,
    rotary_tables,
)
from mmlocalmamba.layers.ssm import DirectionalSSM
from mmlocalmamba.ops import rotate


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('H,W,channels,size', [(3, 5, 8, 14), (3, 5, 8, 7), (4, 2, 16, 14), (1, 1, 4, 14)])
def test_rotary_angles(H, W, channels, size, double_precision):
    """The first half of the channels turns with the row, the second with the column, pairs together; in float32
    whatever the default is."""
    cos, sin = rotary_tables(H, W, channels, size, 'cpu')
    half = channels // 2
    for table, function in ((cos, math.cos), (sin, math.sin)):
        assert table.shape == (H * W, channels) and table.dtype == torch.float32
        expected = [[function(position * size / length * 10000 ** (-2 * (channel // 2) / half))
                     for position, length in ((row, H), (column, W)) for channel in range(half)]
                    for row in range(H) for column in range(W)]
        torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_norm_between_blocks_rotates_the_sum():
    x, residual = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(2, 3, 8, 14, 'cpu')
    norm = ResidualRMSNorm(8)
    for rotary, expected in ((None, x + residual), (tables, rotate(x + residual, *tables))):
        out, total = norm(x[None], residual[None], rotary)
        torch.testing.assert_close(total[0], expected)
        mean = expected.square().mean(-1, keepdim=True)
        torch.testing.assert_close(out[0], norm.weight * expected / (mean + 1e-5).sqrt())


@pytest.mark.parametrize('scattn', [False, dict(spatial=True)])
def test_localvim_mixer_gates_before_scattn(scattn):
    torch.manual_seed(0)
    mixer = LocalVimMixer(8, ['h', 'w2'], scattn=scattn)
    x, tables = torch.randn(2, 6, 8), scan_tables(['h', 'w2'], 2, 3)
    inner, gate = mixer.in_proj(x).chunk(2, dim=-1)
    gated = [scanned * F.silu(gate) for scanned in mixer.scan(inner, tables).unbind(1)]
    first, second = [mixer.scattn(y) for y in gated] if scattn else gated
    torch.testing.assert_close(mixer(x, tables), mixer.out_proj(first + second))


def test_projections_of_tokens_begin_as_the_authors_begin_them():
    torch.manual_seed(0)
    for layer in (LocalVimMixer(128, ['h']).in_proj, LocalVMambaMixer(256, ['h'], expand=1.).out_proj):
        assert type(layer) is nn.Linear and layer.bias is None  # the class that quantizers know
        assert 0.0195 < layer.weight.std() < 0.0205 and abs(layer.weight.mean()) < 5e-4


def test_convolutions_of_localvim_begin_as_conv1d_does():
    """Uniform in both directions, bounded by the inverse root of the kernel size."""
    torch.manual_seed(0)
    mixer = LocalVimMixer(64, ['h', 'w2'], d_conv=4)
    for parameter in (mixer.conv_weight, mixer.conv_bias):
        assert -0.5 <= parameter.min() < -0.48 and 0.48 < parameter.max() <= 0.5


@pytest.mark.parametrize('d_conv', [3, 5])
def test_localvmamba_mixer_by_hand(d_conv):
    """The gate comes after the norm of the sum; the convolution sees rows and columns as they are."""
    torch.manual_seed(0)
    names, H, W = ['h', 'v_flip', 'w2'], 3, 5
    mixer = LocalVMambaMixer(8, names, expand=1.5, d_state=2, d_conv=d_conv, scattn=dict(reduction=4, spatial=True))
    x, tables = torch.randn(2, H * W, 8), scan_tables(names, H, W)
    inner, gate = mixer.in_proj(x).chunk(2, dim=-1)
    assert inner.shape[-1] == 12 and mixer.scattn.spatial_select.in_features == 6
    image = torch.stack([channel.view(2, H, W) for channel in inner.unbind(-1)], dim=1)
    inner = F.silu(F.conv2d(image, mixer.conv2d.weight, mixer.conv2d.bias, padding=d_conv // 2, groups=12))
    scanned = mixer.ssm(torch.stack([inner[:, :, i // W, i % W] for i in range(H * W)], dim=1), tables)
    total = sum(mixer.scattn(scanned[:, k]) for k in range(3))
    torch.testing.assert_close(mixer(x, (H, W), tables), mixer.out_proj(mixer.out_norm(total) * F.silu(gate)))


def test_localvmamba_mixer_of_version_2_by_hand():
    """No gate and no bias of the convolution: half the input projection is gone."""
    torch.manual_seed(0)
    names, H, W = ['h', 'v_flip'], 3, 5
    mixer = LocalVMambaMixer(8, names, expand=1., d_state=1, scattn=False, gate=False, conv_bias=False)
    x, tables = torch.randn(2, H * W, 8), scan_tables(names, H, W)
    assert mixer.in_proj.weight.shape == (8, 8) and mixer.conv2d.bias is None
    image = mixer.in_proj(x).transpose(1, 2).unflatten(2, (H, W))
    inner = F.silu(F.conv2d(image, mixer.conv2d.weight, padding=1, groups=8)).flatten(2).transpose(1, 2)
    expected = mixer.out_proj(mixer.out_norm(mixer.ssm(inner, tables).sum(1)))
    torch.testing.assert_close(mixer(x, (H, W), tables), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('patch_size', [1, 2, 4])
@pytest.mark.parametrize('H,W', [(1, 1), (16, 12), (7, 9)])
def test_convolutional_embedding_and_downsampling_by_hand(H, W, patch_size, dtype):
    torch.manual_seed(0)
    embed, down = ConvPatchEmbed(3, 8, patch_size).to(dtype), ConvDownsample(8, 16).to(dtype)
    image = torch.randn(2, 3, H, W).to(dtype)
    first, second = (2, 2) if patch_size == 4 else (patch_size, 1)

    def norm(x, layer):
        return F.layer_norm(x.movedim(1, 3), layer.normalized_shape, layer.weight.float(), layer.bias.float()
                            ).movedim(3, 1)

    def conv(x, layer, stride):
        return F.conv2d(x, layer.weight.float(), layer.bias.float(), stride=stride, padding=1)

    x = F.gelu(norm(conv(image.float(), embed.projection, first), embed.norm))
    x = norm(conv(x, embed.projection2, second), embed.norm2)
    tokens, size = embed(image)
    assert size == (-(-H // patch_size), -(-W // patch_size)) == tuple(x.shape[2:])
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype is torch.float32 else dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(tokens.float(), x.flatten(2).transpose(1, 2), **tolerance)
    tokens, size = down(tokens, size)
    x = norm(conv(x, down.conv, 2), down.out_norm)
    assert size == tuple(x.shape[2:])
    torch.testing.assert_close(tokens.float(), x.flatten(2).transpose(1, 2), **tolerance)


def test_mlp_begins_as_the_authors_begin_it():
    torch.manual_seed(0)
    mlp = MLP(64, 256)
    for layer in (mlp.fc1, mlp.fc2):
        assert 0.0195 < layer.weight.std() < 0.0205 and not layer.bias.any()
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(mlp(x), F.linear(F.gelu(F.linear(x, mlp.fc1.weight)), mlp.fc2.weight))


def test_scattn_by_hand():
    """Both branches, in the formulas of its description."""
    torch.manual_seed(0)
    module, x = SCAttn(16, reduction=4, spatial=True), torch.randn(2, 5, 16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    normed = F.layer_norm(x, (16, ), module.norm.weight, module.norm.bias)
    reduced = F.gelu(module.global_reduce(sum(normed[:, i] for i in range(5)) / 5))
    channel = torch.sigmoid(module.channel_select(reduced))
    for i in range(5):
        both = torch.cat([F.gelu(module.local_reduce(normed[:, i])), reduced], dim=-1)
        expected = x[:, i] * channel * torch.sigmoid(module.spatial_select(both))
        torch.testing.assert_close(module(x)[:, i], expected)


def test_scattn_begins_as_the_authors_begin_it():
    torch.manual_seed(0)
    module = SCAttn(256, reduction=2, spatial=True)
    for layer in (module.global_reduce, module.channel_select, module.local_reduce):
        assert 0.0195 < layer.weight.std() < 0.0205 and abs(layer.weight.mean()) < 5e-4
        assert not layer.bias.any()
    assert SCAttn(8).global_reduce.out_features == 1
    with pytest.raises(ValueError, match='reduction=8 leaves no channel of 7; use at most 7'):
        SCAttn(7)


def test_state_space_begins_as_mamba_does():
    """Step sizes of the same density on a logarithmic scale, A of 1 to N, projections uniform as nn.Linear's."""
    torch.manual_seed(0)
    ssm = DirectionalSSM(64, 4, 8, 16)
    dt = F.softplus(ssm.dt_proj_bias).log10()
    assert -3 <= dt.min() < -2.95 and -1.05 < dt.max() <= -1 and abs(dt.mean() + 2) < 0.1
    torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1., 9).expand_as(ssm.A_log))
    assert (ssm.D == 1).all()
    for weight, bound in ((ssm.x_proj_weight, 1 / 8), (ssm.dt_proj_weight, 1 / 4)):
        assert -bound <= weight.min() < -0.98 * bound and 0.98 * bound < weight.max() <= bound
    steps = F.softplus(DirectionalSSM(64, 4, 8, 16, dt_min=0.01, dt_max=0.02).dt_proj_bias)
    assert 0.0099 < steps.min() < 0.0102 and 0.0195 < steps.max() < 0.0201


@pytest.mark.parametrize('tokens', [0, 1])
def test_positions_of_another_grid(tokens):
    """In the precision that they have; a class token in the middle stays there as it is."""
    torch.manual_seed(0)
    positions = torch.randn(1, 3 * 5 + tokens, 8, dtype=torch.bfloat16)
    assert resize_pos_embed(positions, (3, 5), (3, 5), tokens) is positions
    found = resize_pos_embed(positions, (3, 5), (5, 3), tokens)
    assert found.shape == positions.shape and found.dtype == torch.bfloat16
    rest = [i for i in range(15 + tokens) if not tokens or i != 7]
    if tokens:
        assert torch.equal(found[:, 7], positions[:, 7])
    grid = positions[:, rest].float().view(1, 3, 5, 8).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(5, 3), mode='bicubic').permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(found[:, rest], grid.bfloat16())


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('channels,kernel,stride',
                         [(3, 2, 2), (3, 4, 4), (4, 16, 16), (8, 8, 8), (3, 16, 8), (16, 4, 4)])
def test_patches_in_16_bits(channels, kernel, stride, dtype, autocast):
    """Outputs and gradients are those of float64 but for roundings, also where images are one token wide or high."""
    torch.manual_seed(0)
    embed = PatchEmbed(channels, 24, kernel, stride, norm=True)
    for grid in ((1, 1), (5, 1), (1, 5), (9, 2), (7, 7)):
        sides = [(count - 1) * stride + kernel + 1 for count in grid]  # the last pixel belongs to none
        image, found = torch.randn(2, channels, *sides), []
        weights = torch.randn(2, grid[0] * grid[1], 24)
        torch.full((40000, ), float('nan'), dtype=dtype)  # what is not written should show
        for low in (False, True):
            model = copy.deepcopy(embed).to(torch.float64 if not low else torch.float32 if autocast else dtype)
            x = image.to(model.projection.weight.dtype).requires_grad_()
            with torch.autocast('cpu', dtype, enabled=low and autocast):
                out, size = model(x)
            assert size == grid and (not low or autocast or out.dtype == dtype)
            (out.double() * weights).sum().backward()
            found.append([out.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
        for exact, other in zip(*found, strict=True):
            error = (other.double() - exact).norm() / exact.norm().clamp(min=1e-3)
            assert error < (0.02 if dtype == torch.bfloat16 else 0.004), (grid, error)


@pytest.mark.parametrize('size', [(4, 6), (5, 7), (1, 1), (2, 3)])
def test_patch_merging_is_that_of_mmcv(size):
    transformer = pytest.importorskip('mmcv.cnn.bricks.transformer')
    torch.manual_seed(0)
    theirs, ours = transformer.PatchMerging(8, 16), PatchMerging(8, 16)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, size[0] * size[1], 8)
    (expected, expected_size), (found, found_size) = theirs(x, size), ours(x, size)
    assert torch.equal(found, expected) and tuple(found_size) == tuple(expected_size)


@pytest.mark.parametrize('options', [dict(kernel_size=4, stride=4, norm_cfg=dict(type='LN')),
                                     dict(kernel_size=16, stride=8)], ids=['with norm', 'overlapping'])
def test_patch_embed_is_that_of_mmcv(options):
    transformer = pytest.importorskip('mmcv.cnn.bricks.transformer')
    torch.manual_seed(0)
    theirs = transformer.PatchEmbed(3, 8, padding=0, **options)
    ours = PatchEmbed(3, 8, options['kernel_size'], options['stride'], norm='norm_cfg' in options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 33, 50)
    (expected, expected_size), (found, found_size) = theirs(x), ours(x)
    assert torch.equal(found, expected) and tuple(found_size) == tuple(expected_size)


@pytest.mark.parametrize('rate', [0., 0.3, 0.9])
@pytest.mark.parametrize('training', [True, False])
def test_drop_path_is_that_of_mmcv(rate, training):
    drop = pytest.importorskip('mmcv.cnn.bricks.drop')
    x, found = torch.randn(64, 3, 4), []
    for kind in (drop.DropPath, DropPath):
        torch.manual_seed(0)
        found.append(kind(rate).train(training)(x))
    assert torch.equal(*found)
