"""Scans beyond the paper's."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlocalmamba import scans
from mmlocalmamba.backbones import LocalVim, LocalVMamba

MORE = ('diag', 'zigzag', 'hilbert')
SIZES = st.integers(1, 23)


def points(name, H, W):
    table = scans.scan_index(name, H, W).long()
    return torch.stack([table // W, table % W], dim=1)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(MORE), SIZES, SIZES)
def test_every_token_once_without_pads(name, H, W):
    table = scans.scan_index(name, H, W)
    assert sorted(table.tolist()) == list(range(H * W))
    assert table[0] == 0  # all start at the top left corner
    assert scans.scan_index(f'{name}_flip', H, W).tolist() == table.tolist()[::-1]
    src, inv = (table[0] for table in scans.scan_tables([name], H, W))
    assert src[inv].tolist() == list(range(H * W))


@settings(deadline=None, max_examples=50)
@given(SIZES, SIZES)
def test_diagonals_come_in_order(H, W):
    rows_and_columns = points('diag', H, W)
    diagonals = rows_and_columns.sum(1)
    assert (diagonals.diff() >= 0).all()
    within = diagonals.diff() == 0
    assert (rows_and_columns[:, 0].diff()[within] == 1).all()


@settings(deadline=None, max_examples=50)
@given(SIZES, SIZES)
def test_zigzag_goes_to_neighbours_along_rows(H, W):
    rows_and_columns = points('zigzag', H, W)
    assert (rows_and_columns.diff(dim=0).abs().sum(1) == 1).all()
    assert (rows_and_columns[:, 0].diff() >= 0).all()


@pytest.mark.parametrize('side', [1, 2, 4, 8, 16, 32])
def test_hilbert_curve_is_continuous_and_local_on_powers_of_two(side):
    steps = points('hilbert', side, side)
    assert (steps.diff(dim=0).abs().sum(1) == 1).all()
    for size in (2, 4, 8):
        if size <= side:  # every run of size * size tokens fills one aligned square
            squares = steps.view(-1, size * size, 2) // size
            assert (squares == squares[:, :1]).all()


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES)
def test_hilbert_on_any_grid_is_the_square_without_what_is_outside(H, W):
    small = 1 << (max(H, W) - 1).bit_length()
    square = [p for p in points('hilbert', small, small).tolist() if p[0] < H and p[1] < W]
    assert points('hilbert', H, W).tolist() == square


def test_known_tables():
    assert scans.scan_index('diag', 2, 3).tolist() == [0, 1, 3, 2, 4, 5]
    assert scans.scan_index('zigzag', 3, 2).tolist() == [0, 1, 3, 2, 4, 5]
    assert scans.scan_index('hilbert', 2, 2).tolist() == [0, 2, 3, 1]


def test_backbones_take_them():
    names = [*MORE, 'hilbert_flip', 'w14']
    LocalVMamba(dict(embed_dims=[8, 16], depths=[1, 1], d_state=1), directions=names)(torch.randn(1, 3, 20, 28))
    LocalVim(dict(embed_dims=16, num_layers=2, d_state=1), directions=names, img_size=32, patch_size=4,
             window_pad='none')(torch.randn(1, 3, 20, 28))
