"""Scan directions: the tables of all built-in scans, registered scans, and tables in graphs."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlocalmamba import directions

SINGLE = sorted(name for name in directions._BUILT_IN if '<K>' not in name)
NAMES = st.one_of(st.sampled_from(SINGLE), st.integers(1, 12).map(lambda K: f'w{K}'))
SIZES = st.integers(1, 23)


@settings(deadline=None, max_examples=150)
@given(NAMES, SIZES, SIZES, st.booleans())
def test_tables_are_permutations_with_an_inverse(name, H, W, pad):
    table = directions.scan_index(name, H, W, pad=pad)
    assert table.dtype == torch.int32
    real = table[table >= 0]
    assert sorted(real.tolist()) == list(range(H * W))
    assert pad or len(table) == H * W
    for direction in (name, f'{name}_flip'):
        src, inv = (table[0] for table in directions.scan_tables([direction], H, W, pad=pad))
        assert inv.dtype == torch.int32 and src[inv].tolist() == list(range(H * W))
    assert directions.scan_index(f'{name}_flip', H, W, pad=pad).tolist() == table.tolist()[::-1]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9), SIZES, SIZES)
def test_windows_are_scanned_one_after_the_other(K, H, W):
    table = directions.scan_index(f'w{K}', H, W)
    windows = table.view(-1, K * K)
    columns = -(-W // K)
    for index, window in enumerate(windows.tolist()):
        inside = [token for token in window if token >= 0]
        assert {(token // W // K, token % W // K) for token in inside} <= {divmod(index, columns)}
        assert inside == sorted(inside)
        for position, token in enumerate(window):
            row, column = index // columns * K + position // K, index % columns * K + position % K
            assert token == (row * W + column if row < H and column < W else -1)


def test_tables_are_on_the_requested_device():
    assert {table.device.type for table in directions.scan_tables(['h', 'w2'], 3, 3, device='meta')} == {'meta'}
    assert directions.scan_index('w256', 2, 2).numel() == 256 * 256


def test_known_tables():
    assert directions.scan_index('h', 2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert directions.scan_index('v', 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert directions.scan_index('v_flip', 2, 3).tolist() == [5, 2, 4, 1, 3, 0]
    assert directions.scan_index('w2', 3, 3).tolist() == [0, 1, 3, 4, 2, -1, 5, -1, 6, 7, -1, -1, 8, -1, -1, -1]
    assert directions.scan_index('w2', 3, 3, pad=False).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


@pytest.mark.parametrize('name,H,W,message', [
    ('diagonal', 2, 2, "unknown scan 'diagonal': known are h, v, w<K>"),
    ('w0', 2, 2, "unknown scan 'w0'"),
    ('w', 2, 2, "unknown scan 'w'"),
    ('w<K>', 2, 2, "unknown scan 'w<K>'"),
    ('w257', 2, 2, "unknown scan 'w257'"),
    ('w0000000003', 2, 2, "unknown scan 'w0000000003'"),
    ('w\u0663', 2, 2, 'unknown scan'),
    ('w-2', 2, 2, "unknown scan 'w-2'"),
    (None, 2, 2, 'unknown scan None'),
    ('h', 0, 2, 'H=0, W=2'),
    ('h', 2, -1, 'H=2, W=-1'),
])
def test_bad_names_and_sizes(name, H, W, message):
    with pytest.raises(ValueError, match=message):
        directions.scan_index(name, H, W)
    with pytest.raises(ValueError, match=message):
        directions.scan_tables(['h', name], H, W)


def test_register_scan(monkeypatch):
    monkeypatch.setattr(directions, '_SCANS', dict(directions._SCANS))

    @directions.register_scan('snake')
    def snake(H, W):
        grid = torch.arange(H * W).view(H, W)
        grid[1::2] = grid[1::2].flip(1)
        return grid.flatten()

    assert directions.scan_index('snake', 2, 3).tolist() == [0, 1, 2, 5, 4, 3]
    assert directions.scan_index('snake_flip', 2, 3).tolist() == [3, 4, 5, 2, 1, 0]
    with pytest.raises(ValueError, match="'snake' is registered already"):
        directions.register_scan('snake')(snake)
    with pytest.raises(ValueError, match="must not end in '_flip'"):
        directions.register_scan('x_flip')

    @directions.register_scan('twice')
    def twice(H, W):
        return torch.zeros(H * W, dtype=torch.long)

    with pytest.raises(ValueError, match="scan 'twice' does not read every token of a 2x3 grid exactly once"):
        directions.scan_index('twice_flip', 2, 3)

    for name, tokens in (('short', torch.arange(5)), ('square', torch.arange(6).view(2, 3)),
                         ('low', torch.tensor([0, 1, 2, 3, 4, 5, -2])), ('high', torch.arange(1, 7))):
        directions.register_scan(name)(lambda H, W, tokens=tokens: tokens)
        with pytest.raises(ValueError, match=f"scan '{name}' must list the tokens 0 to 5 of a 2x3 grid"):
            directions.scan_index(name, 2, 3)
    directions.register_scan('padded')(lambda H, W: torch.tensor([-1, 0, 1, -1, 2, 3, 4, 5]))
    assert directions.scan_index('padded', 2, 3).tolist() == [-1, 0, 1, -1, 2, 3, 4, 5]
    assert directions.scan_index('padded_flip', 2, 3, pad=False).tolist() == [5, 4, 3, 2, 1, 0]

    @directions.register_scan('outside<K>')
    def outside(H, W, side):
        return torch.arange(H * W) + side

    with pytest.raises(ValueError, match="scan 'outside3' must list the tokens 0 to 5 of a 2x3 grid"):
        directions.scan_index('outside3', 2, 3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from(['h', 'v_flip', 'w2', 'w3_flip', 'hilbert', 'diag_flip']), min_size=1,
                         max_size=4, unique=True), min_size=1, max_size=4), SIZES, SIZES, st.booleans(), st.booleans())
def test_tables_of_several_sets_are_those_of_each(sets, H, W, pad, middle_token):
    together = directions.scan_tables_of(sets, H, W, pad, middle_token)
    assert set(together) == set(map(tuple, sets))
    for names, (src, inv) in together.items():
        assert src.shape[0] == inv.shape[0] == len(names) and inv.shape[1] == H * W + middle_token
        for name, steps, places in zip(names, src, inv):
            alone = directions.scan_tables([name], H, W, pad, middle_token)
            T = alone.src.shape[1]
            assert torch.equal(steps[:T], alone.src[0]) and (steps[T:] == -1).all()
            assert torch.equal(places, alone.inv[0])
            assert torch.equal(steps[places], torch.arange(H * W + middle_token, dtype=torch.int32))


def test_middle_token_is_read_in_the_middle_of_every_direction():
    for names, H, W in ((['h', 'v_flip', 'w2_flip'], 3, 5), (['w7', 'w2'], 4, 4)):
        tables = directions.scan_tables(names, H, W, middle_token=True)
        middle = H * W // 2
        assert tables.inv.shape == (len(names), H * W + 1)
        assert tables.src.dtype == tables.inv.dtype == torch.int32
        for name, src in zip(names, tables.src.tolist()):
            assert src[middle] == middle
            rest = src[:middle] + src[middle + 1:]
            plain = [token - (token > middle) for token in rest]
            expected = directions.scan_index(name, H, W).tolist()
            assert plain[:len(expected)] == expected and set(plain[len(expected):]) <= {-1}


def test_a_flipped_middle_token_is_reversed_with_the_sequence():
    for H, W in ((3, 3), (4, 4), (2, 5)):
        plain, = directions.scan_tables(['w2'], H, W, middle_token=directions.FLIPPED).src.tolist()
        assert plain == directions.scan_tables(['w2'], H, W, middle_token=True).src[0].tolist()
        src, inv = directions.scan_tables(['w2_flip'], H, W, middle_token=directions.FLIPPED)
        assert src[0].tolist() == plain[::-1] and src[0][inv[0]].tolist() == list(range(H * W + 1))


SETS = [['h', 'w2'], ['v_flip', 'w3', 'diag'], ['zigzag', 'own'], ['h', 'v']]


def all_tables(x, pad, middle_token):
    tables = directions.scan_tables_of(SETS, *x.shape, pad, middle_token, x.device)
    assert list(tables) == list(map(tuple, SETS))
    return [table for pair in tables.values() for table in pair]


@pytest.fixture
def own_scan(monkeypatch):
    monkeypatch.setattr(directions, '_SCANS', dict(directions._SCANS))
    directions.register_scan('own')(lambda H, W: torch.cat([torch.arange(H * W).flip(0), torch.full((3, ), -1)]))


GRAPHS = {
    'compiled': lambda model, x: torch.compile(model, backend='eager', dynamic=True, fullgraph=True),
    'exported': lambda model, x: torch.export.export(model, (x, )).module(),
    'exported-for-any-size': lambda model, x: torch.export.export(
        model, (x, ), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, )).module(),
}


@pytest.mark.parametrize('pad', [True, False])
@pytest.mark.parametrize('middle_token', [False, True, directions.FLIPPED])
@pytest.mark.parametrize('graph', GRAPHS)
def test_tables_in_graphs(graph, pad, middle_token, own_scan):
    """Graphs return the tables of eager code, also at other sizes than the traced one."""
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def forward(self, x):
            return all_tables(x, pad, middle_token)

    run = GRAPHS[graph](Model(), torch.zeros(5, 7))
    for size in ((5, 7), ) if graph == 'exported' else ((5, 7), (6, 4)):
        made, expected = run(torch.zeros(size)), all_tables(torch.zeros(size), pad, middle_token)
        for a, b in zip(made, expected, strict=True):
            assert a.dtype == torch.int32 and torch.equal(a, b), size
            assert a is not b  # the graph may write to it


@pytest.mark.parametrize('pad', [True, False])
@pytest.mark.parametrize('middle_token', [False, True, directions.FLIPPED])
def test_the_operator_of_tables(pad, middle_token, own_scan):
    """The fake implementation of the operator returns the shapes of the real one, among other checks."""
    sets = ';'.join(','.join(names) for names in SETS)
    for H, W in ((5, 7), (3, 1)):
        torch.library.opcheck(directions._scan_tables, (sets, H, W, pad, str(middle_token), torch.device('cpu')),
                              test_utils=('test_schema', 'test_faketensor'))


# The built-in scans that the paper does not have.
MORE = ('diag', 'zigzag', 'hilbert')


def points(name, H, W):
    """Return (row, column) of each step."""
    table = directions.scan_index(name, H, W).long()
    return torch.stack([table // W, table % W], dim=1)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(MORE), SIZES, SIZES)
def test_every_token_once_without_pads(name, H, W):
    table = directions.scan_index(name, H, W)
    assert sorted(table.tolist()) == list(range(H * W))
    assert table[0] == 0  # all start at the top left corner
    assert directions.scan_index(f'{name}_flip', H, W).tolist() == table.tolist()[::-1]
    src, inv = (table[0] for table in directions.scan_tables([name], H, W))
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
def test_hilbert_on_any_grid_is_the_square_curve_without_the_tokens_outside(H, W):
    small = 1 << (max(H, W) - 1).bit_length()
    square = [p for p in points('hilbert', small, small).tolist() if p[0] < H and p[1] < W]
    assert points('hilbert', H, W).tolist() == square


def test_known_tables_of_the_additional_scans():
    assert directions.scan_index('diag', 2, 3).tolist() == [0, 1, 3, 2, 4, 5]
    assert directions.scan_index('zigzag', 3, 2).tolist() == [0, 1, 3, 2, 4, 5]
    assert directions.scan_index('hilbert', 2, 2).tolist() == [0, 2, 3, 1]


def test_backbones_take_the_additional_scans():
    names = [*MORE, 'hilbert_flip', 'w14']
    from mmlocalmamba.backbones import LocalVim, LocalVMamba
    LocalVMamba(dict(embed_dims=[8, 16], depths=[1, 1], d_state=1), directions=names)(torch.randn(1, 3, 20, 28))
    LocalVim(dict(embed_dims=16, num_layers=2, d_state=1), directions=names, img_size=32, patch_size=4,
             window_pad='none')(torch.randn(1, 3, 20, 28))
