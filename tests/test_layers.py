"""Layers by hand: what their formulas say, where whole models would not show a slip."""
import math

import pytest
import torch

from mmlocalmamba.layers import rotary_tables


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
