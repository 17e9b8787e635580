"""directional_scan and selective_scan: every backend against the reference, and the reference against definitions."""
import itertools

import pytest
import torch

from mmlocalmamba import ops
from mmlocalmamba.directions import scan_tables
from mmlocalmamba.ops import directional_scan, selective_scan
from mmlocalmamba.ops.backends import chunked

# Triton's interpreter is too slow for these; see test_triton.py.
ALL_BACKENDS = [name for name, reason in ops.available_backends(torch.empty(0)).items()
                if reason is None and name != 'triton']
BACKENDS = [name for name in ALL_BACKENDS if name != 'reference']
DIRECTIONS = ('h', 'v_flip', 'w2', 'w3_flip')


def directional_inputs(batch=2, H=5, W=7, D=3, N=4, pad=True, shared=True, scan_order=False, rank=None,
                       dtype=torch.float64, directions=DIRECTIONS):
    generator = torch.Generator().manual_seed(0)
    tables = scan_tables(directions, H, W, pad=pad)
    K, S = len(directions), tables.src.shape[1] if scan_order else H * W

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inputs = dict(
        u=randn(batch, S, D) if shared and not scan_order else randn(batch, K, S, D),
        delta=randn(batch, K, S, rank or D),
        A=(-torch.rand(K, D, N, generator=generator, dtype=torch.float64) * 3).to(dtype).requires_grad_(),
        B=randn(batch, K, S, N),
        C=randn(batch, K, S, N),
        D=randn(K, D),
        delta_bias=randn(K, D))
    if rank:
        inputs['dt_weight'] = randn(K, D, rank)
    return inputs, tables


def run(inputs, function, **kwargs):
    """Outputs and all gradients for fixed cotangents, in float64."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, last = function(**leaves, return_last_state=True, delta_softplus=True, **kwargs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, last)]
    (y * weights[0]).sum().add((last * weights[1]).sum()).backward()
    return dict(y=y.detach(), last=last.detach(), **{name: x.grad for name, x in leaves.items()})


def assert_same(ours, reference, rtol):
    for name, expected in reference.items():
        error = (ours[name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
        assert torch.isfinite(ours[name]).all(), name
        assert error <= rtol, f'{name}: relative error {error:.2e}'


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('pad,shared,scan_order', [(True, True, False), (False, True, False), (True, False, False),
                                                   (True, False, True)])
def test_directional_scan_equals_reference(backend, pad, shared, scan_order, rank):
    inputs, tables = directional_inputs(pad=pad, shared=shared, scan_order=scan_order, rank=rank)
    kwargs = dict(tables=tables, in_scan_order=scan_order)
    assert_same(run(inputs, directional_scan, backend=backend, **kwargs),
                run(inputs, directional_scan, backend='reference', **kwargs), 1e-12)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('H,W,D,N', [(1, 1, 1, 1), (1, 9, 2, 2), (8, 8, 5, 16), (13, 3, 1, 1)])
def test_directional_scan_on_odd_sizes(backend, H, W, D, N):
    inputs, tables = directional_inputs(batch=1, H=H, W=W, D=D, N=N)
    assert_same(run(inputs, directional_scan, backend=backend, tables=tables),
                run(inputs, directional_scan, backend='reference', tables=tables), 1e-12)


@pytest.mark.parametrize('step,block', list(itertools.product([1, 50, 10 ** 6], [1, 300, 10 ** 6])))
def test_chunked_scan_does_not_depend_on_its_blocking(monkeypatch, step, block):
    monkeypatch.setattr(chunked, '_STEP_ELEMENTS', step)
    monkeypatch.setattr(chunked, '_BLOCK_ELEMENTS', block)
    inputs, tables = directional_inputs(H=6, W=11)
    assert_same(run(inputs, directional_scan, backend='chunked', tables=tables),
                run(inputs, directional_scan, backend='reference', tables=tables), 1e-12)


@pytest.mark.parametrize('backend', ALL_BACKENDS)
@pytest.mark.parametrize('dtype,rtol', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_inputs_keep_a_float32_state(backend, dtype, rtol):
    inputs, tables = directional_inputs(dtype=dtype, H=20, W=20, D=2)
    exact = run({name: x.double() for name, x in inputs.items()}, directional_scan, backend='reference', tables=tables)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ours = run(inputs, directional_scan, backend=backend, tables=tables)
    assert ours['y'].dtype == dtype and ours['last'].dtype == torch.float32
    assert_same(ours, exact, rtol)
    # The state itself never sees 16 bits, whatever the inputs.
    assert_same(dict(last=ours['last']), dict(last=exact['last']), 1e-5)


def test_gradcheck():
    inputs, tables = directional_inputs(batch=1, H=2, W=3, D=2, N=2)
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *args: directional_scan(**dict(zip(names, args)), tables=tables, delta_softplus=True,
                                       backend='chunked', return_last_state=True), tuple(inputs.values()))


def complex_inputs(**kwargs):
    """A, B and C get imaginary parts."""
    inputs, tables = directional_inputs(**kwargs)
    generator = torch.Generator().manual_seed(2)
    for name in ('A', 'B', 'C'):
        x = inputs[name].detach()
        inputs[name] = torch.complex(x, torch.randn(x.shape, generator=generator, dtype=x.dtype)).requires_grad_()
    return inputs, tables


def with_real_states(function):
    """Wrap a function for gradcheck, which compares real numbers only."""
    def wrapped(*args, **kwargs):
        y, last = function(*args, **kwargs)
        return y, torch.view_as_real(last)

    return wrapped


@pytest.mark.parametrize('pad,shared,scan_order', [(True, True, False), (False, True, False), (True, False, True)])
def test_complex_states(pad, shared, scan_order):
    """A scan of the states and their conjugates returns twice the output."""
    inputs, tables = complex_inputs(pad=pad, shared=shared, scan_order=scan_order, H=6, W=11)
    kwargs = dict(tables=tables, in_scan_order=scan_order, delta_softplus=True)
    pairs = {name: torch.cat([x, x.conj()], dim=-1) if x.is_complex() else x for name, x in inputs.items()}
    leaves = list(inputs.values())
    expected = directional_scan(**{**pairs, 'D': 2 * inputs['D']}, **kwargs, backend='reference') / 2
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = [expected, *torch.autograd.grad((expected * weight).sum(), leaves)]
    for backend in ('reference', 'chunked', None):
        y, last = directional_scan(**inputs, **kwargs, backend=backend, return_last_state=True)
        assert y.dtype == torch.float64 and last.dtype == torch.complex128
        for ours, wanted in zip([y, *torch.autograd.grad((y * weight).sum(), leaves)], exact):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize('rank', [None, 2])
@pytest.mark.parametrize('block', [1, 10 ** 6])
def test_gradcheck_of_complex_states(monkeypatch, rank, block):
    """The scan has one chunk or several."""
    monkeypatch.setattr(chunked, '_BLOCK_ELEMENTS', block)
    monkeypatch.setattr(chunked, '_MIN_STEPS', 2)
    inputs, tables = complex_inputs(batch=1, H=2, W=3, D=2, N=2, rank=rank)
    names = list(inputs)
    assert torch.autograd.gradcheck(with_real_states(
        lambda *args: directional_scan(**dict(zip(names, args)), tables=tables, delta_softplus=True, backend='chunked',
                                       return_last_state=True)), tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize('make', [directional_inputs, complex_inputs])
@pytest.mark.parametrize('scan_order', [False, True])
def test_second_derivatives_of_the_reference(make, scan_order):
    inputs, tables = make(batch=1, H=2, W=3, D=1, N=2, directions=('v_flip', 'w2'), scan_order=scan_order, rank=1)
    names = list(inputs)

    def function(*args):
        y, last = directional_scan(**dict(zip(names, args)), tables=tables, delta_softplus=True, backend='reference',
                                   in_scan_order=scan_order, return_last_state=True)
        return y, (torch.view_as_real(last) if last.is_complex() else last)

    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_complex_states_choose_their_backend():
    inputs, tables = complex_inputs(dtype=torch.float32)
    for name in set(ALL_BACKENDS) - {'reference', 'chunked'}:
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: it takes no complex A, B and C, "
                                               'which chunked and reference do'):
            directional_scan(**inputs, tables=tables, backend=name)
    chosen = directional_scan(**inputs, tables=tables, delta_softplus=True)
    assert torch.equal(chosen, directional_scan(**inputs, tables=tables, delta_softplus=True, backend='chunked'))
    # 16 bits go with complex numbers of 32 bits each.
    half = {name: x if x.is_complex() else x.half() for name, x in inputs.items()}
    y, last = directional_scan(**half, tables=tables, return_last_state=True)
    assert y.dtype == torch.float16 and last.dtype == torch.complex64


@pytest.mark.parametrize('backend', ALL_BACKENDS)
@pytest.mark.parametrize('groups', [None, 1, 2])
def test_selective_scan_follows_its_definition(backend, groups):
    torch.manual_seed(0)
    batch, width, N, L = 2, 4, 3, 11
    u, delta, z = (torch.randn(batch, width, L, dtype=torch.float64) for _ in range(3))
    A = -torch.rand(width, N, dtype=torch.float64)
    shape = (batch, N, L) if groups is None else (batch, groups, N, L)
    B, C = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    D, bias = torch.randn(width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)

    out, last = selective_scan(u, delta, A, B, C, D, z, bias, True, return_last_state=True, backend=backend)

    dt = torch.nn.functional.softplus(delta + bias[:, None])
    expected = torch.empty_like(u)
    for b in range(batch):
        for d in range(width):
            own_B, own_C = (x[b] if groups is None else x[b, d * groups // width] for x in (B, C))
            h = torch.zeros(N, dtype=torch.float64)
            for t in range(L):
                h = torch.exp(dt[b, d, t] * A[d]) * h + dt[b, d, t] * own_B[:, t] * u[b, d, t]
                expected[b, d, t] = (h * own_C[:, t]).sum() + D[d] * u[b, d, t]
            torch.testing.assert_close(last[b, d], h)
    torch.testing.assert_close(out, expected * torch.nn.functional.silu(z))


def test_bad_input_is_named():
    inputs, tables = directional_inputs()
    with pytest.raises(ValueError, match=r'B must have shape \(B, K, L, N\)'):
        directional_scan(**{**inputs, 'B': inputs['B'][:, :1]}, tables=tables)
    with pytest.raises(ValueError, match='tables are for 6 tokens, delta holds 35'):
        directional_scan(**inputs, tables=scan_tables(DIRECTIONS, 2, 3))
    with pytest.raises(ValueError, match='tables hold 1 directions, the tensors 4'):
        directional_scan(**inputs, tables=scan_tables(['h'], 5, 7))
    with pytest.raises(NotImplementedError, match='u is complex .*: only A, B and C of a scan can be'):
        directional_scan(**{**inputs, 'u': inputs['u'] + 0j}, tables=tables)
    with pytest.raises(TypeError, match=r'B is complex \(torch.complex128\), but A is real .*: pass A \+ 0j'):
        directional_scan(**{**inputs, 'B': inputs['B'] + 0j}, tables=tables)
    with pytest.raises(TypeError, match='u must be a floating point'):
        directional_scan(**{**inputs, 'u': inputs['u'].long()}, tables=tables)


def test_dispatcher(monkeypatch):
    inputs, tables = directional_inputs(H=2, W=2)
    with pytest.raises(ValueError, match="unknown backend 'fast': known are"):
        directional_scan(**inputs, tables=tables, backend='fast')
    monkeypatch.setattr(ops.BACKENDS['chunked'], 'unavailable', lambda u: 'it is switched off')
    with pytest.raises(RuntimeError, match="'chunked' cannot run here: it is switched off"):
        directional_scan(**inputs, tables=tables, backend='chunked')
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'chunked')
    with pytest.raises(RuntimeError, match='switched off'):
        directional_scan(**inputs, tables=tables)
    # An argument is nearer than the environment, and None falls to the next backend that can run.
    directional_scan(**inputs, tables=tables, backend='reference')
    monkeypatch.delenv(ops.BACKEND_VARIABLE)
    directional_scan(**inputs, tables=tables)
    assert ops.available_backends(inputs['u'])['chunked'] == 'it is switched off'
