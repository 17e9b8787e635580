"""The adapter to mamba_ssm, tested on a stub with the interface of 2.3.2 and the arithmetic of our reference."""
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import benchmark_scan as benchmark
import pytest
import torch
from test_scan import assert_same, directional_inputs, run
from test_stand_ins import SIGNATURES, signature

from mmlocalmamba.ops import BACKENDS, available_backends, directional_scan, selective_scan
from mmlocalmamba.ops.backends import mamba_ssm as cuda


@pytest.fixture
def mamba_ssm(monkeypatch):
    calls = []

    class Scan(torch.autograd.Function):
        """Refuses what the extension refuses, and returns what it returns, without a gradient of the last state."""

        @staticmethod
        def forward(ctx, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                    return_last_state=False):
            (batch, width, L), N = u.shape, A.shape[1]
            assert u.dtype in (torch.float32, torch.float16, torch.bfloat16) and A.dtype == torch.float32
            assert u.dtype == delta.dtype == B.dtype == C.dtype and N <= 256 and width % B.shape[1] == 0
            assert all(x is None or x.dtype == torch.float32 and x.shape == (width, ) for x in (D, delta_bias))
            assert delta.shape == u.shape and A.shape == (width, N)
            assert B.shape == C.shape == (batch, B.shape[1], N, L)
            assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C))
            calls.append(tuple(u.shape))
            ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias)
            ctx.delta_softplus = delta_softplus
            y, last = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True, backend='reference')
            return (y, last) if return_last_state else y

        @staticmethod
        def backward(ctx, dout, *_):
            with torch.enable_grad():
                leaves = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
                y = selective_scan(*leaves, ctx.delta_softplus, backend='reference')
            grads = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], dout))
            return *(None if x is None else next(grads) for x in leaves), None, None

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):
        return Scan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    assert signature(selective_scan_fn) == SIGNATURES['selective_scan_fn']

    name = 'mamba_ssm.ops.selective_scan_interface'
    for part in ('mamba_ssm', 'mamba_ssm.ops', name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[name].selective_scan_fn = selective_scan_fn
    sys.modules[name].selective_scan_cuda = SimpleNamespace()
    # The stand-in needs no GPU.
    monkeypatch.setattr(BACKENDS['cuda'], 'unavailable', lambda u: cuda._import()[1])
    cuda._import.cache_clear()
    yield calls
    cuda._import.cache_clear()


def outputs_only(inputs, backend, **kwargs):
    """Return outputs and gradients, none of them through the last state."""

    def function(**arguments):
        y, last = directional_scan(**arguments)
        return y, last.detach()

    return run(inputs, function, backend=backend, **kwargs)


@pytest.mark.parametrize('kwargs', [dict(), dict(pad=False, shared=False), dict(scan_order=True), dict(rank=2)],
                         ids=str)
def test_equals_reference(mamba_ssm, kwargs):
    inputs, tables = directional_inputs(**kwargs, dtype=torch.float32)
    kwargs = dict(tables=tables, in_scan_order=kwargs.get('scan_order', False))
    exact = outputs_only({name: x.double() for name, x in inputs.items()}, 'reference', **kwargs)
    assert_same(outputs_only(inputs, 'cuda', **kwargs), exact, 1e-5)
    K, T = tables.src.shape
    assert mamba_ssm == [(2, K * 3, T)]


def test_peers_of_the_benchmark_compute_the_same(mamba_ssm):
    tensors, low_rank, tables = benchmark.inputs((5, 9), False, 3, 2, 4, 2, 'cpu', torch.float32)
    dy = torch.randn(2, 4, 45, 3)
    function = partial(directional_scan, tables=tables, delta_softplus=True)
    exact = benchmark.forward_backward(function, tensors, dy)
    selective_scan_fn = cuda._import()[0]
    made = benchmark.ready_made(tensors, tables, False)
    pipeline = benchmark.forward_backward(partial(benchmark.authors_pipeline, selective_scan_fn, (5, 9)), made, dy)
    assert benchmark.relative_error(pipeline, exact, ['y', 'u', 'A', 'D', 'delta_bias']) < 1e-5
    low_rank = benchmark.forward_backward(function, {**tensors, **low_rank}, dy)
    assert benchmark.relative_error(low_rank, exact, ['y', 'u', 'A', 'B', 'C', 'D', 'delta_bias']) < 1e-5
    y = benchmark.op_alone(selective_scan_fn, **benchmark.ready_made(tensors, tables, True))
    assert y.shape == (2, 4 * 3, tables.src.shape[1])


def test_mixed_precision(mamba_ssm):
    inputs, tables = directional_inputs(dtype=torch.bfloat16)
    inputs = {name: x.float() if name in ('A', 'D', 'delta_bias', 'C') else x for name, x in inputs.items()}
    y = directional_scan(**inputs, tables=tables, delta_softplus=True, backend='cuda')
    assert y.dtype == torch.bfloat16


def test_step_sizes_are_not_in_16_bits(mamba_ssm):
    inputs, tables = directional_inputs(rank=24, dtype=torch.float32)
    inputs = {name: x.detach().to(torch.bfloat16 if name in ('u', 'delta') else x.dtype) for name, x in inputs.items()}
    ours, exact = (directional_scan(**{name: x.to(dtype or x.dtype) for name, x in inputs.items()}, tables=tables,
                                    delta_softplus=True, return_last_state=True, backend=backend)[1]
                   for backend, dtype in (('cuda', None), ('reference', torch.float64)))
    assert (ours - exact).norm() / exact.norm() < 1e-5


def test_gradient_of_the_last_state_is_refused(mamba_ssm):
    inputs, tables = directional_inputs(dtype=torch.float32)
    y, last = directional_scan(**inputs, tables=tables, return_last_state=True, delta_softplus=True, backend='cuda')
    with pytest.raises(NotImplementedError, match='no gradient of the last state'):
        last.sum().backward()


def test_reasons(monkeypatch):
    assert available_backends(torch.empty(0))['cuda'] == 'it is for CUDA tensors'
    cuda._import.cache_clear()
    monkeypatch.setitem(sys.modules, 'mamba_ssm', None)
    assert 'mamba_ssm is not installed' in cuda._import()[1]
    cuda._import.cache_clear()


def test_without_its_extension(mamba_ssm, monkeypatch):
    """mamba_ssm after 2.3.2 is installed without it by default, and imports all the same."""
    monkeypatch.setattr(sys.modules['mamba_ssm.ops.selective_scan_interface'], 'selective_scan_cuda', None)
    assert cuda._import()[1] == 'mamba_ssm is installed without its extension selective_scan_cuda'
