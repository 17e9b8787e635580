"""mmlocalmamba.ops.stand_ins: every case of mamba_ssm's own tests that does not need CUDA, against the definition in
float64, outputs and gradients, with tolerances below theirs (6e-4 and 2e-3 absolute; 3e-3 and 5e-3; 3e-2 and 5e-2)."""
import inspect
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from processes import ROOT
from test_causal_conv1d import close
from test_causal_conv1d import definition as convolution
from test_scan import ALL_BACKENDS
from torch.nn import functional as F

from mmlocalmamba.ops import selective_scan, stand_ins
from mmlocalmamba.ops.stand_ins import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)

# Relative to the norm of the expected tensor.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
each_itype = pytest.mark.parametrize('itype', TOLERANCE, ids=str)
each_wtype = pytest.mark.parametrize('wtype', [torch.float32, torch.complex64], ids=str)
# Whether B and C vary, and the groups of those that do.
each_kind = pytest.mark.parametrize('variable_B,variable_C,groups', [
    (False, False, 1), (False, True, 1), (True, False, 1), (True, True, 1), (True, True, 2)])


def exact(x):
    """Convert to double precision within the graph."""
    return None if x is None else x.to(torch.complex128 if x.is_complex() else torch.float64)


def of_channels(x, batch, dim, length, is_complex):
    """B or C of any kind -> (B, D, N, L)."""
    if x.dim() == 2:
        return x[None, :, :, None].expand(batch, -1, -1, length)
    if is_complex and not x.is_complex():
        x = torch.view_as_complex(x.unflatten(-1, (length, 2)).contiguous())
    x = x[:, None] if x.dim() == 3 else x
    return x.repeat_interleave(dim // x.shape[1], dim=1)


def scan_definition(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba_ssm's recurrence, one step after the other."""
    u, delta, A, B, C, D, z, delta_bias = map(exact, (u, delta, A, B, C, D, z, delta_bias))
    batch, dim, length = u.shape
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (of_channels(x, batch, dim, length, A.is_complex()) for x in (B, C))
    h, ys = A.new_zeros(batch, dim, A.shape[1]), []
    for t in range(length):
        h = torch.exp(dt[..., t, None] * A) * h + (dt[..., t] * u[..., t])[..., None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, dim=-1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def scan_inputs(itype, wtype, length, variable_B=True, variable_C=True, groups=1, has_D=True, has_z=True,
                has_delta_bias=True, batch=2, dim=4, N=8):
    """As mamba_ssm's tests draw them."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=itype):
        real = torch.promote_types(dtype, torch.float32)
        return torch.randn(*shape, generator=generator, dtype=real).to(dtype)

    def matrix(variable):
        steps = 2 * length if wtype.is_complex else length
        return (randn(dim, N, dtype=wtype) if not variable else
                randn(batch, N, steps) if groups == 1 else randn(batch, groups, N, steps))

    inputs = dict(u=randn(batch, dim, length),
                  delta=0.5 * torch.rand(batch, dim, length, generator=generator).to(itype),
                  A=-0.5 * torch.rand(dim, N, generator=generator, dtype=wtype), B=matrix(variable_B),
                  C=matrix(variable_C))
    if has_D:
        inputs['D'] = randn(dim, dtype=torch.float32)
    if has_z:
        inputs['z'] = randn(batch, dim, length)
    if has_delta_bias:
        inputs['delta_bias'] = 0.5 * torch.rand(dim, generator=generator)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def check(function, definition, inputs, tolerance, outputs):
    """Outputs and gradients of the function and the definition; outputs are named."""
    ours, expected = function(**inputs), definition(**inputs)
    ours, expected = (y if isinstance(y, tuple) else (y, ) for y in (ours, expected))
    expected = expected[:len(ours)]
    generator = torch.Generator().manual_seed(1)
    total, exact_total = 0, 0
    for name, y, y_exact in zip(outputs, ours, expected):
        close(torch.view_as_real(y) if y.is_complex() else y,
              torch.view_as_real(y_exact) if y_exact.is_complex() else y_exact, tolerance, name)
        weight = torch.randn(y.shape, generator=generator, dtype=y_exact.dtype)
        total, exact_total = total + (exact(y) * weight).real.sum(), exact_total + (y_exact * weight).real.sum()
    grads = torch.autograd.grad(total, inputs.values()), torch.autograd.grad(exact_total, inputs.values())
    for name, grad, expected in zip(inputs, *grads):
        assert grad.dtype == inputs[name].dtype
        close(torch.view_as_real(grad) if grad.is_complex() else grad,
              torch.view_as_real(expected) if expected.is_complex() else expected, tolerance, f'gradient of {name}')
    return ours


# ---- scans ----

@each_itype
@each_wtype
@each_kind
@pytest.mark.parametrize('has_D,has_z,has_delta_bias,delta_softplus,return_last_state',
                         list(itertools.product([False, True], repeat=5)))
def test_selective_scan(itype, wtype, variable_B, variable_C, groups, has_D, has_z, has_delta_bias, delta_softplus,
                        return_last_state):
    inputs = scan_inputs(itype, wtype, 17, variable_B, variable_C, groups, has_D, has_z, has_delta_bias)
    softplus = dict(delta_softplus=delta_softplus)
    ours = check(lambda **x: selective_scan_fn(**x, **softplus, return_last_state=return_last_state),
                 lambda **x: scan_definition(**x, **softplus), inputs, TOLERANCE[itype], ('y', 'last'))
    assert len(ours) == 1 + return_last_state and ours[0].dtype == itype
    assert not return_last_state or ours[1].dtype == wtype


@each_itype
@each_wtype
@pytest.mark.parametrize('length', [8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 4096])
@pytest.mark.slow
def test_lengths(itype, wtype, length):
    inputs = scan_inputs(itype, wtype, length, groups=2)
    check(lambda **x: selective_scan_fn(**x, delta_softplus=True, return_last_state=True),
          lambda **x: scan_definition(**x, delta_softplus=True), inputs, TOLERANCE[itype], ('y', 'last'))


@pytest.mark.parametrize('backend', ALL_BACKENDS)
@each_wtype
@each_kind
@pytest.mark.parametrize('length,dim', [(1, 2), (45, 70)])
def test_backends(backend, wtype, variable_B, variable_C, groups, length, dim):
    inputs = scan_inputs(torch.float32, wtype, length, variable_B, variable_C, groups, dim=dim, batch=3, N=5)
    if wtype.is_complex and backend == 'cpu':
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: .* complex"):
            selective_scan(**inputs, backend=backend)
        return
    check(lambda **x: selective_scan(**x, delta_softplus=True, return_last_state=True, backend=backend),
          lambda **x: scan_definition(**x, delta_softplus=True), inputs, 1e-5, ('y', 'last'))


def test_complex_matrices_may_be_given_as_such():
    inputs = scan_inputs(torch.float64, torch.complex128, 9, variable_C=False)
    pairs = torch.view_as_complex(inputs['B'].unflatten(-1, (9, 2)))
    torch.testing.assert_close(selective_scan(**{**inputs, 'B': pairs}), selective_scan(**inputs), rtol=0, atol=0)


@each_wtype
@pytest.mark.parametrize('variable', [False, True])
def test_second_derivatives_of_the_reference(wtype, variable):
    wtype = torch.complex128 if wtype.is_complex else torch.float64
    inputs = scan_inputs(torch.float64, wtype, 3, variable, variable, batch=1, dim=2, N=2)
    inputs = {name: exact(x).detach().requires_grad_() for name, x in inputs.items()}
    names = list(inputs)

    def function(*tensors):
        y, last = selective_scan_ref(**dict(zip(names, tensors)), delta_softplus=True, return_last_state=True)
        return y, (torch.view_as_real(last) if last.is_complex() else last)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize('change,error,message', [
    (dict(delta=torch.ones(1, 4, 4)), ValueError, r'delta must have shape \(B, D, L\) = \(1, 4, 5\), got \(1, 4, 4\)'),
    (dict(A=torch.ones(4)), ValueError, r'A \(D, N\), got'),
    (dict(B=torch.ones(4, 3)), ValueError, r'B must have shape \(D, N\) = \(4, 2\), got \(4, 3\)'),
    (dict(B=torch.ones(1, 2, 10)), ValueError, r'B must have shape \(B, G, N, L\) = \(1, 1, 2, 5\), got \(1, 1, 2, 10'),
    (dict(C=torch.ones(1, 2)), ValueError, r'C must have shape \(D, N\) = \(4, 2\), got \(1, 2\)'),
    (dict(B=torch.ones(1, 3, 2, 5)), ValueError, '4 channels cannot be split into 3 groups'),
    (dict(B=torch.ones(5)), ValueError, r'B must be \(D, N\), \(B, N, L\) or \(B, G, N, L\), got \(5,\)'),
    (dict(A=-torch.ones(4, 2) + 0j), ValueError, 'B of a complex A must be complex or have length 2 L = 10, got'),
    (dict(A=-torch.ones(4, 2) + 0j, B=torch.ones(4, 2)), TypeError, 'constant B must be complex like A'),
    (dict(B=torch.ones(4, 2) + 0j), TypeError, 'B is complex .* but A is real'),
    (dict(u=torch.ones(1, 4, 5) + 0j), NotImplementedError, 'u is complex'),
    (dict(z=torch.ones(1, 4, 5) + 0j), NotImplementedError, 'z is complex'),
    (dict(u=torch.ones(1, 4, 5).int()), TypeError, 'u must be a floating point tensor, got torch.int32'),
    (dict(z=torch.ones(1, 4, 1)), ValueError, 'z must have shape'),
    (dict(D=torch.ones(4, 2)), ValueError, r'D must have shape \(D,\) = \(4,\)'),
])
def test_bad_scans(change, error, message):
    inputs = dict(u=torch.ones(1, 4, 5), delta=torch.ones(1, 4, 5), A=-torch.ones(4, 2), B=torch.ones(1, 2, 5),
                  C=torch.ones(1, 2, 5))
    with pytest.raises(error, match=message):
        selective_scan_fn(**{**inputs, **change})


@pytest.mark.parametrize('batch,length', [(0, 5), (2, 0)])
@each_wtype
@each_kind
def test_empty_scans(batch, length, wtype, variable_B, variable_C, groups):
    inputs = scan_inputs(torch.float32, wtype, length, variable_B, variable_C, groups, batch=batch)
    y, last = selective_scan_fn(**inputs, return_last_state=True)
    assert y.shape == (batch, 4, length) and last.shape == (batch, 4, 8) and not last.any()
    y.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs.values())


# ---- the whole block ----

def inner_definition(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, A, B=None,
                     C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, b_rms_weight=None,
                     c_rms_weight=None, dt_rms_weight=None, out_proj_bias=None, delta_softplus=True,
                     b_c_dt_rms_eps=1e-6):
    """mamba_ssm's arithmetic in float64."""
    def norm(x, weight):
        return x if weight is None else (
            x * (x.square().mean(-1, keepdim=True) + b_c_dt_rms_eps).rsqrt() * exact(weight))

    rank, rows = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    x, z = exact(xz).chunk(2, dim=1)
    x = convolution(x, conv1d_weight[:, 0], conv1d_bias, 'silu')
    projected = x.transpose(1, 2) @ exact(x_proj_weight).T
    delta = norm(projected[..., :rank] @ exact(delta_proj_weight).T, dt_rms_weight)
    B_values, C_values = projected[..., rank:rank + rows], projected[..., -rows:]

    def matrix(values, bias, weight):
        values = norm(values if bias is None else values + exact(bias), weight)
        if A.is_complex():  # real and imaginary parts of each state follow each other; along time in the scan
            values = values.unflatten(-1, (-1, 2)).permute(0, 2, 1, 3).flatten(2)
            return values
        return values.transpose(1, 2)

    B = matrix(B_values, B_proj_bias, b_rms_weight) if B is None else B
    C = matrix(C_values, C_proj_bias, c_rms_weight) if C is None else C
    y, _ = scan_definition(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    y = y.transpose(1, 2) @ exact(out_proj_weight).T
    return y if out_proj_bias is None else y + exact(out_proj_bias)


def inner_inputs(wtype, length, variable_B, variable_C, dim=768, rank=48, N=8, taps=3):
    torch.manual_seed(0)
    rows = (variable_B + variable_C) * N * (2 if wtype.is_complex else 1)
    inputs = dict(
        xz=torch.randn(2, 2 * dim, length), conv1d_weight=torch.randn(dim, 1, taps), conv1d_bias=torch.randn(dim),
        x_proj_weight=torch.randn(rank + rows, dim) / dim ** 0.5,
        delta_proj_weight=torch.randn(dim, rank) / rank ** 0.5,
        out_proj_weight=torch.randn(dim // 2, dim) / dim ** 0.5, A=-0.5 * torch.rand(dim, N, dtype=wtype),
        D=torch.randn(dim), delta_bias=0.5 * torch.rand(dim))
    for name, variable in (('B', variable_B), ('C', variable_C)):
        if not variable:
            inputs[name] = torch.randn(dim, N, dtype=wtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


@each_wtype
@pytest.mark.parametrize('variable_B,variable_C', list(itertools.product([False, True], repeat=2)))
def test_mamba_inner(wtype, variable_B, variable_C):
    inputs = inner_inputs(wtype, 128, variable_B, variable_C)
    y, = check(lambda **x: mamba_inner_fn(**x, out_proj_bias=None), inner_definition, inputs, 2e-5, ('y', ))
    torch.testing.assert_close(mamba_inner_ref(**inputs, out_proj_bias=None), y, rtol=0, atol=0)


@pytest.mark.parametrize('wtype,names', [
    (torch.float32, ('b_rms_weight', 'c_rms_weight', 'dt_rms_weight')),
    (torch.float32, ('B_proj_bias', 'b_rms_weight')),
    (torch.float32, ('C_proj_bias', 'out_proj_bias')),
    (torch.complex64, ('B_proj_bias', 'C_proj_bias', 'dt_rms_weight'))])
@pytest.mark.parametrize('delta_softplus', [False, True])
def test_mamba_inner_with_biases_and_norms(wtype, names, delta_softplus):
    inputs = inner_inputs(wtype, 21, True, True, dim=12, rank=3)
    inputs['A'] = (inputs['A'].detach() * 0.1).requires_grad_()
    shapes = {'dt_rms_weight': 12, 'out_proj_bias': 6}
    rows = 8 * (2 if wtype.is_complex else 1)
    inputs |= {name: (1 + 0.3 * torch.randn(shapes.get(name, rows))).requires_grad_() for name in names}
    options = dict(delta_softplus=delta_softplus, b_c_dt_rms_eps=1e-2)
    check(lambda **x: mamba_inner_fn(**{'out_proj_bias': None, **x}, **options, checkpoint_lvl=0),
          lambda **x: inner_definition(**x, **options), inputs, 2e-5, ('y', ))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_mamba_inner_under_autocast(dtype):
    """Products in 16 bits, the recurrence is not."""
    inputs = inner_inputs(torch.float32, 64, True, True, dim=48, rank=3)
    with torch.autocast('cpu', dtype=dtype):
        y = mamba_inner_fn(**inputs, out_proj_bias=None)
    close(y, inner_definition(**inputs), 2e-2)


@pytest.mark.parametrize('change,message', [
    (dict(checkpoint_lvl=2), 'checkpoint_lvl must be 0 or 1, got 2'),
    (dict(xz=torch.ones(2, 23, 5)), r'xz must be \(B, 24, L\) .* got \(2, 23, 5\)'),
    (dict(x_proj_weight=torch.ones(5, 12)), r'x_proj_weight must have shape .* = \(19, 12\), got \(5, 12\)'),
    (dict(B=torch.ones(12, 8)), r'x_proj_weight must have shape .* = \(11, 12\), got \(19, 12\)'),
    (dict(B=torch.ones(12, 8), x_proj_weight=torch.ones(11, 12), B_proj_bias=torch.ones(8)), 'B is constant'),
    (dict(C=torch.ones(12, 8), x_proj_weight=torch.ones(11, 12), c_rms_weight=torch.ones(8)), 'C is constant'),
    (dict(A=torch.ones(12, 4) + 0j, b_rms_weight=torch.ones(8)), 'b_rms_weight must be None if A is complex'),
])
def test_bad_blocks(change, message):
    inputs = inner_inputs(torch.float32, 5, True, True, dim=12, rank=3)
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn(**{**inputs, 'out_proj_bias': None, **change})


# ---- step by step ----

def update_definition(state, x, dt, A, B, C, D, z, dt_bias):
    """One item and head after the other, all with heads."""
    state, x, dt, A, B, C, D, z, dt_bias = map(exact, (state, x, dt, A, B, C, D, z, dt_bias))
    batch, H = x.shape[:2]
    new, out = [], []
    for b, h in itertools.product(range(batch), range(H)):
        g = h * B.shape[1] // H
        step = F.softplus(dt[b, h] + dt_bias[h])[:, None]
        new.append(state[b, h] * torch.exp(step * A[h]) + step * x[b, h, :, None] * B[b, g])
        y = new[-1] @ C[b, g] + x[b, h] * D[h]
        out.append(y if z is None else y * F.silu(z[b, h]))
    return torch.stack(new).unflatten(0, (batch, H)), torch.stack(out).unflatten(0, (batch, H))


@each_itype
@pytest.mark.parametrize('has_z', [False, True])
@pytest.mark.parametrize('gather', [False, True])
@pytest.mark.parametrize('N', [16, 32, 64])
@pytest.mark.parametrize('H,G,tied', [(None, 1, False), *itertools.product([4], [1, 2, 4], [False, True])])
@pytest.mark.parametrize('dim', [64, 72])
def test_state_update(itype, has_z, gather, N, H, G, tied, dim):
    torch.manual_seed(0)
    batch = 3
    entries = 4 * batch if gather else batch
    indices = torch.randperm(entries)[:batch].int() if gather else None
    heads = H or 1
    state = torch.randn(entries, heads, dim, N, dtype=itype)
    x, dt, z = (torch.randn(batch, heads, dim, dtype=itype) for _ in range(3))
    dt_bias, A = torch.rand(heads, dim) - 4, -torch.rand(heads, dim, N) - 1
    B, C, D = torch.randn(batch, G, N), torch.randn(batch, G, N), torch.randn(heads, dim)
    if tied:  # one value a head, as Mamba-2 has them
        dt, dt_bias, D = (value[..., :1].expand(*value.shape) for value in (dt, dt_bias, D))
        A = A[..., :1, :1].expand(heads, dim, N)
    z = z if has_z else None
    used = slice(None) if indices is None else indices.long()
    expected_state, expected = update_definition(state[used], x, dt, A, B, C, D, z, dt_bias)
    others = state.clone()

    def argument(value, axis):
        return value if H or value is None else value.squeeze(axis)

    given = argument(state, 1)
    tensors = (argument(value, axis) for value, axis in ((x, 1), (dt, 1), (A, 0), (B, 1), (C, 1)))
    ours = selective_state_update(given, *tensors,
                                  D=argument(D, 0), z=argument(z, 1), dt_bias=argument(dt_bias, 0), dt_softplus=True,
                                  state_batch_indices=indices)
    assert ours.dtype == itype
    close(ours, argument(expected, 1), TOLERANCE[itype])
    close(state[used], expected_state, TOLERANCE[itype])
    if gather:
        rest = sorted(set(range(entries)) - set(indices.tolist()))
        assert torch.equal(state[rest], others[rest])


@pytest.mark.parametrize('has_bias,softplus', list(itertools.product([False, True], repeat=2)))
def test_steps_are_the_whole_scan(has_bias, softplus):
    inputs = scan_inputs(torch.float64, torch.float64, 7)
    bias = inputs.pop('delta_bias').double()
    bias = bias if has_bias else None
    expected, last = selective_scan_fn(**inputs, delta_bias=bias, delta_softplus=softplus, return_last_state=True)
    state = torch.zeros(2, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        steps = []
        for t in range(7):
            u, delta, B, C, z = (inputs[name][..., t] for name in ('u', 'delta', 'B', 'C', 'z'))
            steps.append(selective_state_update(state, u, delta, inputs['A'], B, C, inputs['D'], z, bias, softplus))
    torch.testing.assert_close(torch.stack(steps, dim=-1), expected.detach())
    torch.testing.assert_close(state, last.detach())


def test_state_update_has_derivatives():
    """Through several steps, to the first state, though each overwrites it."""
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in
              ((1, 2, 2), (1, 2), (1, 2), (2, 2), (1, 2), (1, 2), (2, ), (1, 2), (2, ))]

    def function(state, *tensors):
        state = state.clone()
        outs = [selective_state_update(state, *tensors, dt_softplus=True) for _ in range(2)]
        return *outs, state

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize('change,error,message', [
    (dict(x=torch.ones(2, 3, 5)), ValueError, r'x must have shape \(B, H, D\) = \(2, 4, 5\), got \(2, 3, 5\)'),
    (dict(state=torch.ones(3, 4, 5, 6)), ValueError, r'state must have shape \(B, H, D, N\) = \(2, 4, 5, 6\)'),
    (dict(state=torch.ones(5, 6)), ValueError, r'state must be \(B, D, N\) or \(B, H, D, N\), got \(5, 6\)'),
    (dict(A=torch.ones(5, 6)), ValueError, r'A must have shape \(H, D, N\) = \(4, 5, 6\), got \(1, 5, 6\)'),
    (dict(B=torch.ones(2, 3, 6)), ValueError, r'C must have shape \(B, G, N\) = \(2, 3, 6\), got \(2, 2, 6\)'),
    (dict(B=torch.ones(2, 3, 6), C=torch.ones(2, 3, 6)), ValueError, '4 heads cannot be split into 3 groups'),
    (dict(D=torch.ones(4, 4)), ValueError, 'D must have shape'),
    (dict(z=torch.ones(2, 4, 4)), ValueError, 'z must have shape'),
    (dict(dt_bias=torch.ones(4)), ValueError, 'dt_bias must have shape'),
    (dict(state_batch_indices=torch.ones(3)), ValueError, r'state_batch_indices must have shape \(B,\) = \(2,\)'),
    (dict(A=torch.ones(4, 5, 6) + 0j), NotImplementedError, 'A is complex'),
    (dict(x=torch.ones(2, 4, 5).int()), TypeError, 'x must be a floating point tensor'),
])
def test_bad_updates(change, error, message):
    inputs = dict(state=torch.ones(2, 4, 5, 6), x=torch.ones(2, 4, 5), dt=torch.ones(2, 4, 5), A=torch.ones(4, 5, 6),
                  B=torch.ones(2, 2, 6), C=torch.ones(2, 2, 6))
    with pytest.raises(error, match=message):
        selective_state_update(**{**inputs, **change})


def test_reference_update_is_the_update():
    inputs = dict(state=torch.ones(2, 5, 6), x=torch.randn(2, 5), dt=torch.randn(2, 5), A=-torch.rand(5, 6),
                  B=torch.randn(2, 6), C=torch.randn(2, 6))
    ours = selective_state_update(**{**inputs, 'state': inputs['state'].clone()})
    assert torch.equal(selective_state_update_ref(**inputs), ours) and not (inputs['state'] == 1).all()


# ---- names ----

INNER = ('xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight {}B=None C=None D=None delta_bias=None '
         'B_proj_bias=None C_proj_bias=None delta_softplus=True')
NORM = 'x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 dropout_p=0.0 rowscale=None prenorm=False'
MAMBA = ('d_model d_state=16 d_conv=4 expand=2 dt_rank=auto dt_min=0.001 dt_max=0.1 dt_init=random dt_scale=1.0 '
         'dt_init_floor=0.0001 conv_bias=True bias=False use_fast_path=True layer_idx=None device=None dtype=None')
# Of mamba_ssm 2.3.2, causal_conv1d 1.7 and, for the names that begin with bimamba or end with no_out_proj, Vim's fork.
SIGNATURES = {
    'selective_scan_fn': 'u delta A B C D=None z=None delta_bias=None delta_softplus=False return_last_state=False',
    'selective_scan_ref': 'u delta A B C D=None z=None delta_bias=None delta_softplus=False return_last_state=False',
    'mamba_inner_fn': INNER.format('out_proj_weight out_proj_bias A ') + ' checkpoint_lvl=1 b_rms_weight=None '
    'c_rms_weight=None dt_rms_weight=None b_c_dt_rms_eps=1e-06',
    'mamba_inner_ref': INNER.format('out_proj_weight out_proj_bias A '),
    'mamba_inner_fn_no_out_proj': INNER.format('A '),
    'bimamba_inner_fn': INNER.format('out_proj_weight out_proj_bias A A_b '),
    'bimamba_inner_ref': INNER.format('out_proj_weight out_proj_bias A A_b '),
    'selective_state_update': 'state x dt A B C D=None z=None dt_bias=None dt_softplus=False '
    'state_batch_indices=None',
    'selective_state_update_ref': 'state x dt A B C D=None z=None dt_bias=None dt_softplus=False',
    'causal_conv1d_fn': 'x weight bias=None seq_idx=None initial_states=None return_final_states=False '
    'final_states_out=None activation=None',
    'causal_conv1d_ref': 'x weight bias=None initial_states=None return_final_states=False final_states_out=None '
    'activation=None seq_idx=None',
    'causal_conv1d_update': 'x conv_state weight bias=None activation=None cache_seqlens=None conv_state_indices=None',
    'causal_conv1d_update_ref': 'x conv_state weight bias=None activation=None cache_seqlens=None',
    'causal_conv1d_fwd_function': 'x weight bias seq_idx initial_states final_states_out silu_activation',
    'causal_conv1d_bwd_function': 'x weight bias dout seq_idx initial_states dfinal_states dx return_dinitial_states '
    'silu_activation',
    'causal_conv1d_update_function': 'x conv_state weight bias silu_activation cache_seqlens conv_state_indices',
    'layer_norm_fn': f'{NORM} residual_in_fp32=False is_rms_norm=False return_dropout_mask=False',
    'rms_norm_fn': f'{NORM} residual_in_fp32=False return_dropout_mask=False',
    'layer_norm_ref': f'{NORM} dropout_mask=None dropout_mask1=None upcast=False',
    'rms_norm_ref': f'{NORM} dropout_mask=None dropout_mask1=None upcast=False',
    'Mamba': f'{MAMBA} bimamba_type=none if_divide_out=False init_layer_scale=None nslices=5 bimamba=None',
    'Block': 'dim mixer_cls mlp_cls norm_cls=LayerNorm fused_add_norm=False residual_in_fp32=False',
    'RMSNorm': 'hidden_size eps=1e-05 dropout_p=0.0 device=None dtype=None',
}


def signature(function):
    """As in SIGNATURES."""
    return ' '.join(p.name if p.default is p.empty else f'{p.name}={getattr(p.default, "__name__", p.default)}'
                    for p in inspect.signature(function).parameters.values())


@pytest.mark.parametrize('name', SIGNATURES)
def test_signatures_are_the_packages(name):
    assert signature(getattr(stand_ins, name)) == SIGNATURES[name]


def run_python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)


def test_stand_in():
    """The examples of the page's section find the packages' names here."""
    section = (ROOT / 'docs/extend.md').read_text().partition('## Other Mamba code\n')[2]
    blocks = re.findall(r'```python\n(.*?)```', section, flags=re.S)
    assert 'stand_in_for()' in ''.join(blocks) and 'from mamba_ssm import Mamba' in ''.join(blocks)
    result = run_python('\n'.join(blocks) + '''
import importlib.util
assert importlib.util.find_spec('mamba_ssm.ops') is not None
assert __import__('mamba_ssm').__version__ == '2.3.2'
for line in ('from mamba_ssm import Mamba2', 'import mamba_ssm.models.mixer_seq_simple'):
    try:
        exec(line)
    except ImportError as error:
        print(error)
''')
    assert result.returncode == 0, result.stderr
    assert "cannot import name 'Mamba2' from 'mamba_ssm' (" in result.stdout
    assert 'stand_ins/__init__.py' in result.stdout and "No module named 'mamba_ssm.models'" in result.stdout


# What the repositories import, by the module.
IMPORTS = {
    'mamba_ssm': 'Mamba selective_scan_fn mamba_inner_fn',
    'mamba_ssm.modules.mamba_simple': 'Mamba Block',
    'mamba_ssm.modules.block': 'Block',
    'mamba_ssm.ops.selective_scan_interface': 'selective_scan_fn selective_scan_ref mamba_inner_fn mamba_inner_ref '
    'mamba_inner_fn_no_out_proj bimamba_inner_fn bimamba_inner_ref',
    'mamba_ssm.ops.triton.selective_state_update': 'selective_state_update selective_state_update_ref',
    'mamba_ssm.ops.triton.layer_norm': 'RMSNorm layer_norm_fn rms_norm_fn layer_norm_ref rms_norm_ref',
    'mamba_ssm.ops.triton.layernorm': 'RMSNorm layer_norm_fn rms_norm_fn layer_norm_ref rms_norm_ref',
    'mamba_ssm.utils.generation': 'GenerationMixin InferenceParams',
    'mamba_ssm.utils.hf': 'load_config_hf load_state_dict_hf',
    'causal_conv1d': 'causal_conv1d_fn causal_conv1d_update',
    'causal_conv1d.causal_conv1d_interface': 'causal_conv1d_fn causal_conv1d_ref causal_conv1d_update '
    'causal_conv1d_update_ref',
    'causal_conv1d.cpp_functions': 'causal_conv1d_fwd_function causal_conv1d_bwd_function '
    'causal_conv1d_update_function',
    'selective_scan_cuda': 'fwd bwd',
    'selective_scan_cuda_core': 'fwd bwd',
    'selective_scan_cuda_oflex': 'fwd bwd',
    'causal_conv1d_cuda': 'causal_conv1d_fwd causal_conv1d_bwd causal_conv1d_update',
}


@pytest.mark.slow
def test_one_line_stands_in_for_all():
    imports = '\n'.join(f'from {module} import {", ".join(names.split())}' for module, names in IMPORTS.items())
    result = run_python(f'''
from mmlocalmamba.ops import stand_ins
names = list(stand_ins.status())
stood = stand_ins.stand_in_for()
assert stood == names and set(stand_ins.status().values()) == {{'stood in for'}}
assert stand_ins.stand_in_for('mamba_ssm') == stood  # once more, nothing changes
{imports}
from mamba_ssm.modules import block, mamba_simple
assert mamba_simple.Block is not block.Block is stand_ins.Block
for function in (GenerationMixin().generate, load_config_hf, load_state_dict_hf):
    try:
        function('state-spaces/mamba-130m')
    except NotImplementedError as error:
        print(error)
''')
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('mmlocalmamba stands in for mamba_ssm and') == 3


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A mamba_ssm that is installed, and a program that prints where it finds its packages, and its arguments."""
    (tmp_path / 'site/mamba_ssm').mkdir(parents=True)
    (tmp_path / 'site/mamba_ssm/__init__.py').write_text("__version__ = 'mine'\n")
    (tmp_path / 'repository').mkdir()
    (tmp_path / 'repository/beside.py').write_text('VALUE = 5\n')
    (tmp_path / 'repository/program.py').write_text('''
import sys, beside, causal_conv1d, mamba_ssm, selective_scan_cuda
assert __name__ == '__main__'
print(mamba_ssm.__version__, causal_conv1d.__version__, beside.VALUE, sys.argv[1:])
''')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), str(tmp_path / 'site')]))
    return tmp_path


@pytest.mark.slow
def test_installed_packages_stay(installed):
    result = run_python('''
import warnings
from mmlocalmamba.ops.stand_ins import stand_in_for, status
warnings.simplefilter('error')
assert status()['mamba_ssm'] == 'installed'
assert 'mamba_ssm' not in stand_in_for()
import mamba_ssm, selective_scan_cuda
assert mamba_ssm.__version__ == 'mine'
try:
    stand_in_for('mamba_ssm')
except UserWarning as error:
    print(error)
stand_in_for('mamba_ssm', replace=True)
''')
    assert "mamba_ssm is installed and is not replaced: stand_in_for('mamba_ssm', replace=True)" in result.stdout
    assert 'RuntimeError: mamba_ssm is imported already: call stand_in_for before' in result.stderr
    result = run_python('''
from mmlocalmamba.ops.stand_ins import stand_in_for
assert stand_in_for('mamba_ssm', replace=True) == ['mamba_ssm']
import mamba_ssm
assert mamba_ssm.__version__ == '2.3.2'
''')
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('options,version', [(['program.py'], 'mine'), (['--replace', '-m', 'program'], '2.3.2')])
@pytest.mark.slow
def test_a_program_runs_unchanged(installed, options, version):
    result = subprocess.run([sys.executable, '-m', 'mmlocalmamba.ops.stand_ins', *options, '--lr', '1'],
                            capture_output=True, text=True, cwd=installed / 'repository')
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{version} 1.7.0 5 ['--lr', '1']\n"


@pytest.mark.slow
def test_vmambas_cross_scan_runs_on_a_cpu(tmp_path, monkeypatch):
    """A file of that name, alone and in a package. Its functions ask CUDA for the device."""
    (tmp_path / 'models').mkdir()
    for folder in ('.', 'models'):
        (tmp_path / folder / 'csm_triton.py').write_text('''
import torch

class CrossScanF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0):
        return x * 2 + scans + one_by_one
    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, None, None, None, None

def cross_scan_fn(x, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0, force_torch=False):
    "documented"
    with torch.cuda.device(x.device):
        return CrossScanF.apply(x, in_channel_first, out_channel_first, one_by_one, scans)

def cross_merge_fn(y):
    return y
''')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    result = run_python('''
import torch
from mmlocalmamba.ops.stand_ins import stand_in_for
assert stand_in_for('csm_triton') == ['csm_triton']
import csm_triton
from models import csm_triton as inner
assert csm_triton is not inner
for module in (csm_triton, inner):
    assert module.cross_scan_fn.__doc__ == 'documented' and module.cross_merge_fn(3) == 3
    x = torch.ones(2, requires_grad=True)
    y = module.cross_scan_fn(x, True, one_by_one=True, scans=3, force_torch=True)
    y.sum().backward()
    assert y.tolist() == [6, 6] and x.grad.tolist() == [2, 2]
''')
    assert result.returncode == 0, result.stderr


def test_stand_in_is_refused():
    with pytest.raises(ValueError, match="no stand-in for 'flash_attn': known are mamba_ssm, causal_conv1d, sel"):
        stand_ins.stand_in_for('flash_attn')


@pytest.mark.parametrize('real', [False, True])
@pytest.mark.slow
def test_the_adapter_does_not_take_itself_for_mamba_ssm(real, tmp_path, monkeypatch):
    """The adapter would otherwise call itself without end, also below a real mamba_ssm without its extension."""
    (tmp_path / 'mamba_ssm/ops').mkdir(parents=True)
    (tmp_path / 'mamba_ssm/ops/selective_scan_interface.py').write_text(
        'import selective_scan_cuda\n\n\ndef selective_scan_fn():\n    pass\n')
    if real:
        monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    result = run_python('''
from mmlocalmamba.ops import stand_ins
from mmlocalmamba.ops.backends import mamba_ssm as cuda
print(stand_ins.stand_in_for()[0], cuda._import()[1])
''')
    first = 'causal_conv1d' if real else 'mamba_ssm'
    reason = 'mmlocalmamba.ops.stand_ins stands in for mamba_ssm or its extension'
    assert f'{first} {reason}' in result.stdout, result.stderr
