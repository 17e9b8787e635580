"""Scan directions (paper section 4.1): a name becomes an index table, so a scan never moves an image.

A table is an int32 tensor: entry ``t`` is the token (row-major position in the H x W grid) that step ``t`` reads, or
-1 for a pad. Inverses, pictures and fused kernels are derived from it. The built-in names, each also with the suffix
``_flip`` (the same table in reverse order):

- ``h``: rows, left to right, top to bottom;
- ``v``: columns, top to bottom, left to right;
- ``w<K>`` for K from 1 to 256: windows of K x K tokens in row-major order, row-major inside each window. Pads fill up
  the windows that the grid does not fill, at its right and bottom borders;
- ``diag``: the diagonals that run from bottom left to top right, from the top left corner to the bottom right one;
- ``zigzag``: rows, every second one backwards, so that each step goes to a neighbour;
- ``hilbert``: along the Hilbert curve through the smallest square of 2^n x 2^n tokens that contains the grid.
"""
import reprlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.table_cache import as_ints, cached

# The paper's search space, in the authors' order.
CANDIDATES = ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip')

_SCANS: dict[str, Callable] = {}
_FLIP = '_flip'
# A table of windows has at least K * K steps. Names may come from files, and no name may exhaust the memory.
_MAX_K = 256


def register_scan(name: str) -> Callable:
    """Return a decorator that registers a scan direction as ``name``, and its reverse as ``<name>_flip``.

    The function maps (H, W) to a 1-D integer tensor that lists every token 0..H*W-1 exactly once, with -1 for pads at
    any place. A name that ends in ``<K>`` registers a family: the function also gets the integer, as ``(H, W, K)``.
    If the function does not read values of tensors (no ``if tensor``, no ``.item()``), it works under torch.compile and
    torch.export.

    Raises:
        ValueError: The name is taken, or ends in ``_flip``.
    """
    if name.endswith(_FLIP):
        raise ValueError(f"scan name {name!r} must not end in '{_FLIP}': flipped scans are derived")
    if name in _SCANS:
        raise ValueError(f'scan {name!r} is registered already')

    def add(function: Callable) -> Callable:
        _SCANS[name] = function
        return function

    return add


def _arange(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int32)


@register_scan('h')
def _horizontal(H: int, W: int) -> Tensor:
    return _arange(H * W)


@register_scan('v')
def _vertical(H: int, W: int) -> Tensor:
    return _arange(H * W).view(H, W).t().flatten()


@register_scan('w<K>')
def _window(H: int, W: int, K: int) -> Tensor:
    rows, cols = -(-H // K), -(-W // K)
    grid = F.pad(_arange(H * W).view(H, W), (0, cols * K - W, 0, rows * K - H), value=-1)
    return grid.view(rows, K, cols, K).transpose(1, 2).flatten()


@register_scan('diag')
def _diagonal(H: int, W: int) -> Tensor:
    """List the diagonals one after the other, each from its top to its bottom."""
    tokens = _arange(H * W)
    return (tokens // W + tokens % W).argsort(stable=True)


@register_scan('zigzag')
def _zigzag(H: int, W: int) -> Tensor:
    """List the rows, left to right and right to left in turn."""
    row, col = _arange(H)[:, None], _arange(W)
    return (row * W + torch.where(row % 2 == 1, W - 1 - col, col)).flatten()


@register_scan('hilbert')
def _hilbert(H: int, W: int) -> Tensor:
    """Sort tokens by their distance along the Hilbert curve, computed from the largest quarters to single tokens."""
    tokens = _arange(H * W)
    row, col = tokens // W, tokens % W
    distance = torch.zeros_like(tokens)
    half = 1 << int(max(H - 1, W - 1)).bit_length() >> 1
    while half:
        low, right = row >= half, col >= half
        row, col = row % half, col % half
        # The order of the quarters is top left, bottom left, bottom right, top right. Inside the first the curve is
        # transposed, and inside the last it is transposed along the other diagonal.
        distance += half * half * torch.where(right, 3 - low.int(), low.int())
        mirrored = right & ~low
        row, col = torch.where(mirrored, half - 1 - row, row), torch.where(mirrored, half - 1 - col, col)
        row, col = torch.where(low, row, col), torch.where(low, col, row)
        half >>= 1
    return distance.argsort()


# Tests prove these for all sizes, so their tables are not checked while a model runs.
_BUILT_IN = frozenset(_SCANS)


def _base(name: str) -> str:
    return name[:-len(_FLIP)] if isinstance(name, str) and name.endswith(_FLIP) else name


def _call_family(function: Callable, K: int, H: int, W: int) -> Tensor:
    return function(H, W, K)


def _resolve(name: str) -> tuple[Callable[[int, int], Tensor], bool]:
    """Return the function of (H, W) behind a name, and True if it is built in. Raises ValueError if it is unknown."""
    base = _base(name)
    if base in _SCANS and '<K>' not in base:
        return _SCANS[base], base in _BUILT_IN
    for pattern, function in _SCANS.items():
        family = pattern.removesuffix('<K>')
        if family == pattern or not isinstance(base, str) or not base.startswith(family):
            continue
        digits = base[len(family):]  # torch.compile (2.11) cannot trace the regular expression that would fit here
        if digits.isascii() and digits.isdecimal() and len(digits) < 10 and 1 <= int(digits) <= _MAX_K:
            return partial(_call_family, function, int(digits)), pattern in _BUILT_IN
    raise ValueError(f'unknown scan {reprlib.repr(name)}: known are {", ".join(_SCANS)} (K from 1 to {_MAX_K}), '
                     f"each also with '{_FLIP}'; @mmlocalmamba.directions.register_scan adds others")


def check_scan(name: str) -> None:
    """Raise ValueError if ``name`` is not a known scan."""
    _resolve(name)


def _check_size(H: int, W: int) -> None:
    if H < 1 or W < 1:
        raise ValueError(f'a token grid needs H >= 1 and W >= 1, got H={H}, W={W}')


class ScanTables(NamedTuple):
    """The tables of K directions over the same L tokens, as the ops take them.

    Attributes:
        src: int32 (K, T), the token that step t of direction k reads, or -1. Shorter directions end in -1, which no
            output depends on.
        inv: int32 (K, L), the step at which direction k reads token l.
    """
    src: Tensor
    inv: Tensor


def _row(base: str, H: int, W: int, pad: bool, traced: bool) -> ScanTables:
    """Return the tables (T,) and (L,) of one direction that is not flipped."""
    tokens = H * W
    function, built_in = _resolve(base)
    check = not (traced or built_in)
    src = function(H, W).int()
    if check and (src.dim() != 1 or len(src) < tokens or int(src.min()) < -1 or int(src.max()) >= tokens):
        raise ValueError(f'scan {base!r} must list the tokens 0 to {tokens - 1} of a {H}x{W} grid, and -1 for pads')
    if not pad:
        src = src[(src < 0).int().argsort(stable=True)[:tokens]]
    steps = torch.arange(src.shape[0], dtype=torch.int32)
    # Pads are scattered to one more place, which is cut off.
    inv = steps.new_zeros(tokens + 1).scatter(0, torch.where(src < 0, tokens, src).long(), steps)[:tokens]
    if check and (int((src >= 0).sum()) != tokens or not torch.equal(src[inv], _arange(tokens))):
        raise ValueError(f'scan {base!r} does not read every token of a {H}x{W} grid exactly once')
    return ScanTables(src, inv)


def _flip(row: ScanTables) -> ScanTables:
    return ScanTables(row.src.flip(0), row.src.shape[0] - 1 - row.inv)


# The value of ``middle_token`` with which flipped scans reverse the middle token with the sequence.
FLIPPED = 'flipped'


def _add_middle_token(row: ScanTables, middle: int) -> ScanTables:
    """Add the token ``middle``, which is read at step ``middle``."""
    src, inv = row
    token = torch.full((1, ), 1, dtype=torch.int32) * middle
    src, inv = src + (src >= middle).int(), inv + (inv >= middle).int()
    return ScanTables(*(torch.cat([x[:middle], token, x[middle:]]) for x in (src, inv)))


def _stack(rows: Sequence[ScanTables]) -> ScanTables:
    lengths = [row.src.shape[0] for row in rows]
    # A comparison of symbolic sizes would restrict an exported graph to its result.
    steps = max(lengths) if all(isinstance(length, int) for length in lengths) else reduce(torch.sym_max, lengths)

    def fill(src: Tensor) -> Tensor:
        missing = steps - src.shape[0]
        return src if isinstance(missing, int) and missing == 0 else F.pad(src, (0, missing), value=-1)

    return ScanTables(torch.stack([fill(row.src) for row in rows]), torch.stack([row.inv for row in rows]))


def _make(sets: Iterable[tuple[str, ...]], H: int, W: int, pad: bool, middle_token: bool | str, device: torch.device,
          traced: bool) -> dict[tuple[str, ...], ScanTables]:
    """Return the tables of each set. A direction that several sets name is computed once."""
    rows: dict[str, ScanTables] = {}
    for name in dict.fromkeys(name for names in sets for name in names):
        base = _base(name)
        if base not in rows:
            rows[base] = _row(base, H, W, pad, traced)
            if middle_token == FLIPPED:
                rows[base] = _add_middle_token(rows[base], H * W // 2)
        if name != base:
            rows[name] = _flip(rows[base])
    if middle_token is True:
        rows = {name: _add_middle_token(row, H * W // 2) for name, row in rows.items()}
    stacked = {names: _stack([rows[name] for name in names]) for names in sets}
    return {names: ScanTables(*(table.to(device) for table in tables)) for names, tables in stacked.items()}


def scan_tables_of(sets: Iterable[Sequence[str]], H: int, W: int, pad: bool = True, middle_token: bool | str = False,
                   device: str | torch.device = 'cpu') -> dict[tuple[str, ...], ScanTables]:
    """Return :func:`scan_tables` of several sets of directions over the same tokens, such as the blocks of a stage.

    Args:
        sets: Several sequences of scan names.
        H, W, pad, middle_token, device: As in :func:`scan_tables`.

    Returns:
        {names: ScanTables}, one for each different set.
    """
    names_of: tuple[tuple[str, ...], ...] = tuple(dict.fromkeys(map(tuple, sets)))
    H, W = as_ints(H, W)
    symbolic = not (isinstance(H, int) and isinstance(W, int))
    if symbolic or torch.compiler.is_dynamo_compiling():
        # A compiled graph holds one operator, which takes the tables from the cache when it runs: expressions for the
        # sizes of later stages would take minutes to trace. A graph that is exported for one size (torch.export's
        # default) holds PyTorch's operations instead, so it does not need this package.
        joined = ';'.join(','.join(names) for names in names_of)
        tables = _scan_tables(joined, H, W, pad, str(middle_token), torch.device(device))
        return {names: ScanTables(*tables[2 * i:2 * i + 2]) for i, names in enumerate(names_of)}
    _check_size(H, W)
    return cached(lambda device, traced: _make(names_of, H, W, pad, middle_token, device, traced), device,
                  'scan_tables', names_of, H, W, pad, middle_token)


# The schema is given because torch 2.6 cannot infer it from list[Tensor].
@torch.library.custom_op(
    'mmlocalmamba::scan_tables', mutates_args=(),
    schema='(str sets, SymInt H, SymInt W, bool pad, str middle_token, Device device) -> Tensor[]')
def _scan_tables(sets: str, H: int, W: int, pad: bool, middle_token: str, device: torch.device) -> list[Tensor]:
    token = {str(value): value for value in (False, True, FLIPPED)}[middle_token]
    made = scan_tables_of([names.split(',') for names in sets.split(';')], H, W, pad, token, device)
    # Copies: a compiled graph may write to the outputs of an operator.
    return [table.clone() for tables in made.values() for table in tables]


@_scan_tables.register_fake
def _fake_scan_tables(sets: str, H: int, W: int, pad: bool, middle_token: str, device: torch.device) -> list[Tensor]:
    extra = int(middle_token != str(False))
    tables = []
    for names in (names.split(',') for names in sets.split(';')):
        steps = reduce(torch.sym_max, (_count_steps(_base(name), H, W, pad) for name in names)) + extra
        tables += [torch.empty(len(names), length, dtype=torch.int32, device=device)
                   for length in (steps, H * W + extra)]
    return tables


def _count_steps(base: str, H: int, W: int, pad: bool) -> int:
    function, built_in = _resolve(base)
    if not pad or built_in and not isinstance(function, partial):
        return H * W
    if built_in and isinstance(function, partial):  # windows
        K = function.args[1]
        return -(-H // K) * K * (-(-W // K) * K)
    return function(H, W).shape[0]


def scan_tables(names: Sequence[str],
                H: int,
                W: int,
                pad: bool = True,
                middle_token: bool | str = False,
                device: str | torch.device = 'cpu') -> ScanTables:
    """Return the stacked tables of several directions.

    Args:
        names: K scan names.
        H, W: Rows and columns of the token grid.
        pad: As in :func:`scan_index`.
        middle_token: If True, the sequence holds one more token (a class token) at position H*W // 2, which every
            direction reads at step H*W // 2 of its own order (the authors' middle class token). 'flipped': flipped
            directions read it at its place in the reversed sequence (as in Vim), one step later if H*W is odd.
        device: Device of the tables.

    Returns:
        ScanTables with L = H*W (+ 1). They are shared and cached: do not write to them.

    Raises:
        ValueError: A name is unknown, a size is below 1, or a registered scan does not read every token once.
    """
    return scan_tables_of([names], H, W, pad, middle_token, device)[tuple(names)]


def scan_index(name: str, H: int, W: int, pad: bool = True) -> Tensor:
    """Return the table of one direction: an int32 tensor (T,) on the CPU.

    Args:
        name: A name of the list in the module's docstring, or a registered one.
        H, W: Rows and columns of the token grid.
        pad: If True, keep the pads of incomplete windows (-1), as the authors do. If False, the table holds the real
            tokens only, T = H*W.

    Raises:
        ValueError: The name is unknown, or a size is below 1.
    """
    return scan_tables([name], H, W, pad).src[0]
