"""Positions of LocalVim: the rotary embedding of 2-D tokens, and resizing of the learned embedding."""
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.table_cache import as_ints, cached

_THETA = 10000.


def _make(H: int, W: int, channels: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    half = channels // 2
    # float32, whatever the default dtype is.
    frequencies = _THETA ** (torch.arange(0, half, 2, dtype=torch.float32) / -half)

    def angles(n: int) -> Tensor:
        positions = torch.arange(n, dtype=torch.float32) / n * size
        return torch.outer(positions, frequencies).repeat_interleave(2, dim=-1)

    rows, cols = angles(H), angles(W)
    angle = torch.cat([rows[:, None].expand(H, W, -1), cols[None].expand(H, W, -1)], dim=-1).flatten(0, 1).to(device)
    return angle.cos(), angle.sin()


def rotary_tables(H: int, W: int, channels: int, size: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for a token grid: EVA-02's rotary embedding, which Vim and LocalVim use.

    Angles are recomputed for the actual grid, with positions scaled to the ``size`` x ``size`` grid of pre-training.
    The authors resize the cosines and sines of the training grid bicubically instead, which is not a rotation; at the
    training size both are equal.

    Args:
        H, W: token grid.
        channels: rotated channels, divisible by 4: the first half turns with the row, the second with the column.
        size: side of the grid at pre-training.
        device: device of the tables.

    Returns:
        cos, sin: float32 (H*W, channels). Shared and cached: do not write to them.
    """
    H, W = as_ints(H, W)
    return cached(lambda device, traced: _make(H, W, channels, size, device), device, 'rotary', H, W, channels, size)


def resized_rotary_tables(H: int, W: int, channels: int, size: int, grid: tuple[int, int],
                          device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines as the code of LocalMamba's authors has them away from the grid of pre-training.

    The tables of that grid are resized bicubically to the model's grid, as when a model is loaded, and from there to
    the grid of an image. They are not a rotation, but the authors' detectors were trained with them.

    Args:
        H, W, channels, size, device: as for :func:`rotary_tables`.
        grid: (rows, columns) of the model's ``img_size``.
    """
    H, W = as_ints(H, W)

    def make(device: torch.device, traced: bool) -> tuple[Tensor, Tensor]:
        tables = _make(size, size, channels, size, device)
        for old, new in (((size, size), grid), (grid, (H, W))):
            tables = tuple(resize_pos_embed(table[None], old, new)[0] for table in tables)
        return tables

    return cached(make, device, 'resized rotary', H, W, channels, size, grid)


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], tokens: int = 0) -> Tensor:
    """Resize learned positions (1, h*w + tokens, C) bicubically to another grid.

    Args:
        pos_embed: (1, h*w + tokens, C), any floating dtype.
        old, new: (rows, columns) of the grids.
        tokens: extra tokens, which stay in the middle.
    """
    # A comparison would tie an exported graph of any size to its outcome; resizing to the same grid changes nothing.
    if all(isinstance(side, int) for side in new) and old == new:
        return pos_embed
    middle = old[0] * old[1] // 2
    extra = pos_embed[:, middle:middle + tokens]
    grid = torch.cat([pos_embed[:, :middle], pos_embed[:, middle + tokens:]], dim=1)
    grid = grid.view(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode='bicubic', align_corners=False).to(pos_embed.dtype)
    grid = grid.flatten(2).transpose(1, 2)
    middle = new[0] * new[1] // 2
    return torch.cat([grid[:, :middle], extra, grid[:, middle:]], dim=1)
