"""Layers by hand: what their formulas say, where whole models would not show a slip."""
import math

import pytest
import torch
from torch.nn import functional as F

from mmlocalmamba.layers import LocalVimMixer, ResidualRMSNorm, rotary_tables
from mmlocalmamba.ops import rotate
from mmlocalmamba.scans import scan_tables


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


def test_localvim_mixer_gates_without_scattn():
    torch.manual_seed(0)
    mixer = LocalVimMixer(8, ['h', 'w2'], scattn=False)
    x, tables = torch.randn(2, 6, 8), scan_tables(['h', 'w2'], 2, 3)
    inner, gate = mixer.in_proj(x).chunk(2, dim=-1)
    scanned = mixer.scan(inner, tables)
    torch.testing.assert_close(mixer(x, tables), mixer.out_proj((scanned[:, 0] + scanned[:, 1]) * F.silu(gate)))


def test_convolutions_of_localvim_begin_as_conv1d_does():
    """Uniform in both directions, bounded by the inverse root of the kernel size."""
    torch.manual_seed(0)
    mixer = LocalVimMixer(64, ['h', 'w2'], d_conv=4)
    for parameter in (mixer.conv_weight, mixer.conv_bias):
        assert -0.5 <= parameter.min() < -0.48 and 0.48 < parameter.max() <= 0.5
