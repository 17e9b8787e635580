"""Scan directions (paper section 4.1): a name becomes an index table, and a scan never moves an image.

A table is an int32 tensor: entry ``t`` is the token (row-major position in the H x W grid) that step ``t`` reads, or
-1 for a pad. Everything else follows from it: the inverse, drawing, fused kernels that load through it, new
directions. Built-in names, each also with the suffix ``_flip`` (the same table from tail to head):

- ``h``: rows, left to right, top to bottom;
- ``v``: columns, top to bottom, left to right;
- ``w<K>`` for K from 1 to 256: windows of K x K tokens in row-major order, row-major inside each window. Windows at the
  right and bottom border that the grid does not fill are completed by pads;
- ``diag``: the diagonals that run from bottom left to top right, from the top left corner to the bottom right one;
- ``zigzag``: rows, every other one backwards, so that each step goes to a neighbour;
- ``hilbert``: along the Hilbert curve through the smallest square of 2^n x 2^n tokens that holds the grid.
"""
import re
import reprlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_SCANS: dict[str, Callable] = {}
_FLIP = '_flip'
# Detection meets a new H x W with nearly every batch: enough entries to serve the stages of a few batches, few enough
# that thousands of sizes do not pile up.
_CACHE_SIZE = 128
# A window is completed by pads, K * K steps at least: names come from files, too, and one must not fill the memory.
_MAX_K = 256


def register_scan(name: str) -> Callable:
    """Decorator that adds a scan direction under ``name``; ``<name>_flip`` exists then, too.

    The function maps (H, W) to a 1-D integer tensor that lists every token 0..H*W-1 exactly once, with -1 for pads
    wherever it likes. A name that ends in ``<K>`` is a family: the function also gets the integer, as ``(H, W, K)``.

    Raises:
        ValueError: the name is taken, or ends in ``_flip``.
    """
    if name.endswith(_FLIP):
        raise ValueError(f"scan name {name!r} must not end in '{_FLIP}': flipped scans are derived")
    if name in _SCANS:
        raise ValueError(f'scan {name!r} is registered already')

    def add(function: Callable) -> Callable:
        _SCANS[name] = function
        return function

    return add


@register_scan('h')
def _horizontal(H: int, W: int) -> Tensor:
    return torch.arange(H * W)


@register_scan('v')
def _vertical(H: int, W: int) -> Tensor:
    return torch.arange(H * W).view(H, W).t().flatten()


@register_scan('w<K>')
def _window(H: int, W: int, K: int) -> Tensor:
    rows, cols = -(-H // K), -(-W // K)
    grid = torch.full((rows * K, cols * K), -1)
    grid[:H, :W] = torch.arange(H * W).view(H, W)
    return grid.view(rows, K, cols, K).transpose(1, 2).flatten()


@register_scan('diag')
def _diagonal(H: int, W: int) -> Tensor:
    """Diagonals one after the other, each from its top to its bottom."""
    tokens = torch.arange(H * W)
    return (tokens // W + tokens % W).argsort(stable=True)


@register_scan('zigzag')
def _zigzag(H: int, W: int) -> Tensor:
    """Rows, left to right and right to left in turn."""
    grid = torch.arange(H * W).view(H, W)
    backwards = (torch.arange(H) % 2 == 1)[:, None]
    return torch.where(backwards, grid.flip(1), grid).flatten()


@register_scan('hilbert')
def _hilbert(H: int, W: int) -> Tensor:
    """Tokens by their distance along the Hilbert curve, from the quarter down to the single token."""
    tokens = torch.arange(H * W)
    row, col = tokens // W, tokens % W
    distance = torch.zeros_like(tokens)
    half = 1 << max(H - 1, W - 1).bit_length() >> 1
    while half:
        low, right = row >= half, col >= half
        row, col = row % half, col % half
        # Quarters in the order top left, bottom left, bottom right, top right. The curve inside the first is
        # transposed, inside the last it is transposed along the other diagonal.
        distance += half * half * torch.where(right, 3 - low.long(), low.long())
        mirrored = right & ~low
        row, col = torch.where(mirrored, half - 1 - row, row), torch.where(mirrored, half - 1 - col, col)
        row, col = torch.where(low, row, col), torch.where(low, col, row)
        half >>= 1
    return distance.argsort()


def known_scans() -> tuple[str, ...]:
    """Registered names and families, without the ``_flip`` variants."""
    return tuple(_SCANS)


def _resolve(name: str) -> Callable[[int, int], Tensor]:
    base = name[:-len(_FLIP)] if isinstance(name, str) and name.endswith(_FLIP) else name
    if base in _SCANS and '<K>' not in base:
        return _SCANS[base]
    for pattern, function in _SCANS.items():
        if not pattern.endswith('<K>') or not isinstance(base, str):
            continue
        match = re.fullmatch(re.escape(pattern[:-len('<K>')]) + r'(\d{1,9})', base)
        if match and 1 <= int(match.group(1)) <= _MAX_K:
            K = int(match.group(1))
            return lambda H, W: function(H, W, K)
    raise ValueError(f'unknown scan {reprlib.repr(name)}: known are {", ".join(_SCANS)} (K from 1 to {_MAX_K}), '
                     f"each also with '{_FLIP}'; @mmlocalmamba.scans.register_scan adds others")


def check_scan(name: str) -> None:
    """Raise the ValueError of :func:`scan_index` if ``name`` is not a known scan."""
    _resolve(name)


def _check_size(H: int, W: int) -> None:
    if H < 1 or W < 1:
        raise ValueError(f'a token grid needs H >= 1 and W >= 1, got H={H}, W={W}')


def _order(name: str, H: int, W: int, pad: bool, check: bool) -> Tensor:
    """The table. Unchecked, its shape does not depend on values, so that torch.compile can trace it."""
    order = _resolve(name)(H, W)
    if check and not torch.equal(order[order >= 0].sort().values, torch.arange(H * W)):
        raise ValueError(f'scan {name!r} does not read every token of a {H}x{W} grid exactly once')
    if not pad:
        order = order[(order < 0).int().argsort(stable=True)[:H * W]]
    return (order.flip(0) if name.endswith(_FLIP) else order).int()


@lru_cache(maxsize=_CACHE_SIZE)
# A table made under inference_mode would be refused by autograd later on.
@torch.inference_mode(False)
def _table(name: str, H: int, W: int, pad: bool, device: torch.device) -> Tensor:
    return _order(name, H, W, pad, check=True).to(device)


def scan_index(name: str, H: int, W: int, pad: bool = True, device: str | torch.device = 'cpu') -> Tensor:
    """Index table of one scan direction.

    Args:
        name: a scan name, e.g. ``'h'``, ``'v_flip'``, ``'w7'``.
        H, W: token grid, both >= 1.
        pad: True keeps the pads of incomplete windows (-1), as in the authors' code; False lists real tokens only.
        device: where the (cached) table lives.

    Returns:
        int32 tensor (T,), values in [0, H*W) or -1. T = H*W without pads. Shared and cached: do not write to it.

    Raises:
        ValueError: unknown name, K < 1, H < 1 or W < 1.
    """
    _check_size(H, W)
    return _table(name, H, W, pad, torch.device(device))


def _invert(table: Tensor, tokens: int) -> Tensor:
    """Step at which each token is read; ``table`` (T,) -> int32 (L,)."""
    # Pads go to one more place, which is cut off.
    place = torch.where(table < 0, tokens, table).long()
    steps = torch.arange(table.numel(), dtype=torch.int32, device=table.device)
    return steps.new_zeros(tokens + 1).scatter(0, place, steps)[:tokens]


@lru_cache(maxsize=_CACHE_SIZE)
@torch.inference_mode(False)
def _inverse(name: str, H: int, W: int, pad: bool, device: torch.device) -> Tensor:
    return _invert(_table(name, H, W, pad, device), H * W)


def inverse(name: str, H: int, W: int, pad: bool = True, device: str | torch.device = 'cpu') -> Tensor:
    """The inverse of :func:`scan_index`: int32 tensor (H*W,), the step at which each token is read.

    ``y_sequence[inverse(...)]`` puts the outputs of a scan back in row-major order and drops the pads.
    """
    _check_size(H, W)
    return _inverse(name, H, W, pad, torch.device(device))


class ScanTables(NamedTuple):
    """Tables of K directions over the same L tokens, as the ops take them.

    Attributes:
        src: int32 (K, T), the token that step t of direction k reads, or -1. Shorter directions are filled with
            -1 at their tail, which no earlier output sees.
        inv: int32 (K, L), the step at which direction k reads token l.
    """
    src: Tensor
    inv: Tensor


def _stack(rows: Sequence[Tensor], H: int, W: int, middle_token: bool, device: torch.device) -> ScanTables:
    if middle_token:
        middle = H * W // 2
        rows = [row + (row >= middle).int() for row in rows]
        token = torch.tensor([middle], dtype=torch.int32)
        rows = [torch.cat([row[:middle], token, row[middle:]]) for row in rows]
    length = max(row.numel() for row in rows)
    src = torch.stack([torch.nn.functional.pad(row, (0, length - row.numel()), value=-1) for row in rows])
    inv = torch.stack([_invert(row, H * W + middle_token) for row in rows])
    return ScanTables(src.to(device), inv.to(device))


@lru_cache(maxsize=_CACHE_SIZE)
@torch.inference_mode(False)
def _tables(names: tuple[str, ...], H: int, W: int, pad: bool, middle_token: bool, device: torch.device) -> ScanTables:
    return _stack([_table(name, H, W, pad, torch.device('cpu')) for name in names], H, W, middle_token, device)


def scan_tables(names: Sequence[str],
                H: int,
                W: int,
                pad: bool = True,
                middle_token: bool = False,
                device: str | torch.device | None = 'cpu') -> ScanTables:
    """Stacked tables of several directions.

    Args:
        names: K scan names.
        H, W: token grid.
        pad: as in :func:`scan_index`.
        middle_token: the sequence holds one more token (a class token) at position H*W // 2, which every direction
            reads at step H*W // 2 of its own order (the authors' middle class token).
        device: where the (cached) tables live.

    Returns:
        ScanTables with L = H*W (+ 1). Shared and cached: do not write to them.
    """
    _check_size(H, W)
    device = torch.device(device)
    if torch.compiler.is_compiling():  # a few operations in the graph, instead of a cache that it cannot hold
        return _stack([_order(name, H, W, pad, check=False) for name in names], H, W, middle_token, device)
    return _tables(tuple(names), H, W, pad, middle_token, device)
