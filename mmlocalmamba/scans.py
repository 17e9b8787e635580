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
import reprlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.sizes import of_size

# The paper's search space, in the authors' order.
CANDIDATES = ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip')

_SCANS: dict[str, Callable] = {}
_FLIP = '_flip'
# A window is completed by pads, K * K steps at least: names come from files, too, and one must not fill the memory.
_MAX_K = 256


def register_scan(name: str) -> Callable:
    """Decorator that adds a scan direction under ``name``; ``<name>_flip`` exists then, too.

    The function maps (H, W) to a 1-D integer tensor that lists every token 0..H*W-1 exactly once, with -1 for pads
    wherever it likes. A name that ends in ``<K>`` is a family: the function also gets the integer, as ``(H, W, K)``.
    Written without a look at values (no ``if tensor``, no ``.item()``), it goes through torch.compile and torch.export.

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
    """Diagonals one after the other, each from its top to its bottom."""
    tokens = _arange(H * W)
    return (tokens // W + tokens % W).argsort(stable=True)


@register_scan('zigzag')
def _zigzag(H: int, W: int) -> Tensor:
    """Rows, left to right and right to left in turn."""
    row, col = _arange(H)[:, None], _arange(W)
    return (row * W + torch.where(row % 2 == 1, W - 1 - col, col)).flatten()


@register_scan('hilbert')
def _hilbert(H: int, W: int) -> Tensor:
    """Tokens by their distance along the Hilbert curve, from the quarter down to the single token."""
    tokens = _arange(H * W)
    row, col = tokens // W, tokens % W
    distance = torch.zeros_like(tokens)
    half = 1 << int(max(H - 1, W - 1)).bit_length() >> 1
    while half:
        low, right = row >= half, col >= half
        row, col = row % half, col % half
        # Quarters in the order top left, bottom left, bottom right, top right. The curve inside the first is
        # transposed, inside the last it is transposed along the other diagonal.
        distance += half * half * torch.where(right, 3 - low.int(), low.int())
        mirrored = right & ~low
        row, col = torch.where(mirrored, half - 1 - row, row), torch.where(mirrored, half - 1 - col, col)
        row, col = torch.where(low, row, col), torch.where(low, col, row)
        half >>= 1
    return distance.argsort()


# Right for every size (tests), so that these need no check while a model runs.
_BUILT_IN = frozenset(_SCANS)


def _base(name: str) -> str:
    return name[:-len(_FLIP)] if isinstance(name, str) and name.endswith(_FLIP) else name


def _of_family(function: Callable, K: int, H: int, W: int) -> Tensor:
    return function(H, W, K)


def _resolve(name: str) -> tuple[Callable[[int, int], Tensor], bool]:
    """A function of (H, W), and whether it is built in."""
    base = _base(name)
    if base in _SCANS and '<K>' not in base:
        return _SCANS[base], base in _BUILT_IN
    for pattern, function in _SCANS.items():
        family = pattern.removesuffix('<K>')
        if family == pattern or not isinstance(base, str) or not base.startswith(family):
            continue
        digits = base[len(family):]  # torch.compile traces this: no regular expressions
        if digits.isascii() and digits.isdecimal() and len(digits) < 10 and 1 <= int(digits) <= _MAX_K:
            return partial(_of_family, function, int(digits)), pattern in _BUILT_IN
    raise ValueError(f'unknown scan {reprlib.repr(name)}: known are {", ".join(_SCANS)} (K from 1 to {_MAX_K}), '
                     f"each also with '{_FLIP}'; @mmlocalmamba.scans.register_scan adds others")


def check_scan(name: str) -> None:
    """Raise the ValueError of :func:`scan_index` if ``name`` is not a known scan."""
    _resolve(name)


def _check_size(H: int, W: int) -> None:
    if H < 1 or W < 1:
        raise ValueError(f'a token grid needs H >= 1 and W >= 1, got H={H}, W={W}')


class ScanTables(NamedTuple):
    """Tables of K directions over the same L tokens, as the ops take them.

    Attributes:
        src: int32 (K, T), the token that step t of direction k reads, or -1. Shorter directions are filled with
            -1 at their tail, which no earlier output sees.
        inv: int32 (K, L), the step at which direction k reads token l.
    """
    src: Tensor
    inv: Tensor


def _row(base: str, H: int, W: int, pad: bool, traced: bool) -> ScanTables:
    """Of one unflipped direction, (T,) and (L,)."""
    tokens = H * W
    function, built_in = _resolve(base)
    check = not (traced or built_in)
    src = function(H, W).int()
    if check and (src.dim() != 1 or len(src) < tokens or int(src.min()) < -1 or int(src.max()) >= tokens):
        raise ValueError(f'scan {base!r} must list the tokens 0 to {tokens - 1} of a {H}x{W} grid, and -1 for pads')
    if not pad:
        src = src[(src < 0).int().argsort(stable=True)[:tokens]]
    steps = torch.arange(src.shape[0], dtype=torch.int32)
    # Pads go to one more place, which is cut off.
    inv = steps.new_zeros(tokens + 1).scatter(0, torch.where(src < 0, tokens, src).long(), steps)[:tokens]
    if check and (int((src >= 0).sum()) != tokens or not torch.equal(src[inv], _arange(tokens))):
        raise ValueError(f'scan {base!r} does not read every token of a {H}x{W} grid exactly once')
    return ScanTables(src, inv)


def _flip(row: ScanTables) -> ScanTables:
    return ScanTables(row.src.flip(0), row.src.shape[0] - 1 - row.inv)


# A middle token that flipped scans reverse with the sequence.
FLIPPED = 'flipped'


def _add_middle_token(row: ScanTables, middle: int) -> ScanTables:
    """One more token ``middle``, read at step ``middle``."""
    src, inv = row
    token = torch.full((1, ), 1, dtype=torch.int32) * middle
    src, inv = src + (src >= middle).int(), inv + (inv >= middle).int()
    return ScanTables(*(torch.cat([x[:middle], token, x[middle:]]) for x in (src, inv)))


def _stack(rows: Sequence[ScanTables]) -> ScanTables:
    lengths = [row.src.shape[0] for row in rows]
    if torch.jit.is_tracing():
        lengths = [int(length) for length in lengths]
    # A comparison of symbolic sizes would tie an exported graph to its outcome.
    steps = max(lengths) if all(isinstance(length, int) for length in lengths) else reduce(torch.sym_max, lengths)

    def fill(src: Tensor) -> Tensor:
        missing = steps - src.shape[0]
        return src if isinstance(missing, int) and missing == 0 else F.pad(src, (0, missing), value=-1)

    return ScanTables(torch.stack([fill(row.src) for row in rows]), torch.stack([row.inv for row in rows]))


def _make(sets: Iterable[tuple[str, ...]], H: int, W: int, pad: bool, middle_token: bool | str, device: torch.device,
          traced: bool) -> dict[tuple[str, ...], ScanTables]:
    """Each direction once, however many sets name it."""
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
    """:func:`scan_tables` of several sets of directions over the same tokens, e.g. of the blocks of a stage."""
    names_of: tuple[tuple[str, ...], ...] = tuple(dict.fromkeys(map(tuple, sets)))
    if torch.jit.is_tracing():  # FLOP counters do; sizes are tensors then, and the graph is for one size
        H, W = int(H), int(W)
    symbolic = not (isinstance(H, int) and isinstance(W, int))
    if symbolic or torch.compiler.is_dynamo_compiling():
        # One node of a compiled graph, which finds the tables in the cache when it runs; expressions for the sizes of
        # later stages would take minutes to trace. A graph that is exported for one size (torch.export's default way)
        # holds plain operations instead, which need nothing of this package.
        joined = ';'.join(','.join(names) for names in names_of)
        tables = _scan_tables(joined, H, W, pad, str(middle_token), torch.device(device))
        return {names: ScanTables(*tables[2 * i:2 * i + 2]) for i, names in enumerate(names_of)}
    _check_size(H, W)
    return of_size(lambda device, traced: _make(names_of, H, W, pad, middle_token, device, traced), device,
                   'scan_tables', names_of, H, W, pad, middle_token)


# With its schema, since torch 2.6 takes none from list[Tensor].
@torch.library.custom_op(
    'mmlocalmamba::scan_tables', mutates_args=(),
    schema='(str sets, SymInt H, SymInt W, bool pad, str middle_token, Device device) -> Tensor[]')
def _scan_tables(sets: str, H: int, W: int, pad: bool, middle_token: str, device: torch.device) -> list[Tensor]:
    token = {str(value): value for value in (False, True, FLIPPED)}[middle_token]
    made = scan_tables_of([names.split(',') for names in sets.split(';')], H, W, pad, token, device)
    # Whoever has compiled the graph may write to what an operator returns.
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
    """Stacked tables of several directions.

    Args:
        names: K scan names.
        H, W: token grid.
        pad: as in :func:`scan_index`.
        middle_token: the sequence holds one more token (a class token) at position H*W // 2, which every direction
            reads at step H*W // 2 of its own order (the authors' middle class token). 'flipped': flipped directions
            read it where the reversed sequence has it (Vim's), which is one step later if H*W is odd.
        device: where the tables live.

    Returns:
        ScanTables with L = H*W (+ 1). Shared and cached: do not write to them.

    Raises:
        ValueError: an unknown name, a size below 1, a registered scan that does not read every token once.
    """
    return scan_tables_of([names], H, W, pad, middle_token, device)[tuple(names)]


def scan_index(name: str, H: int, W: int, pad: bool = True) -> Tensor:
    """The table of one direction: int32 tensor (T,) on the CPU.

    Args:
        name: see the module's docstring.
        H, W: token grid.
        pad: keep the pads of incomplete windows (-1), as the authors do; otherwise real tokens only, T = H*W.

    Raises:
        ValueError: unknown name, or a size below 1.
    """
    return scan_tables([name], H, W, pad).src[0]
