"""The functions of the packages ``mamba_ssm`` (2.3) and ``causal_conv1d`` (1.7) by their names, arguments and meaning,
on any device, with all derivatives: other Mamba models run without those packages, which need CUDA.

Where their CUDA kernels drop something, it is computed here: gradients of the last state, constant B and C, complex
state spaces, sequences that start within a batch. Bad shapes raise a ValueError instead of an AssertionError.
"""
import importlib.machinery
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.ops import linear, selective_scan
from mmlocalmamba.ops.causal_conv import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from mmlocalmamba.ops.dispatch import check_dtypes, compute_dtype, expect_shape, without_autocast

__all__ = ['causal_conv1d_fn', 'causal_conv1d_ref', 'causal_conv1d_update', 'causal_conv1d_update_ref',
           'mamba_inner_fn', 'mamba_inner_ref', 'selective_scan_fn', 'selective_scan_ref', 'selective_state_update',
           'selective_state_update_ref', 'stand_in_for']

# Where the packages keep the functions, each with all of its own.
_MODULES = {
    'mamba_ssm': ('mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.selective_scan_interface', 'mamba_ssm.ops.triton',
                  'mamba_ssm.ops.triton.selective_state_update'),
    'causal_conv1d': ('causal_conv1d', 'causal_conv1d.causal_conv1d_interface'),
}


def stand_in_for(*packages: str) -> None:
    """Let this process import this module's functions from where ``mamba_ssm`` and ``causal_conv1d`` have them.

    To be called before anything imports from those packages; of their modules only the ones that hold these functions
    exist then.

    Args:
        packages: 'mamba_ssm', 'causal_conv1d' or both, installed or not.

    Raises:
        ValueError: another name.
        RuntimeError: the package has been imported already, and whoever did so would keep its functions.
    """
    for package in packages:
        if package not in _MODULES:
            raise ValueError(f'no stand-in for {package!r}: known are {", ".join(_MODULES)}')
        if package in sys.modules:
            raise RuntimeError(f'{package} is imported already: call stand_in_for before anything imports it')
    for package in packages:
        functions = [name for name in __all__ if name != 'stand_in_for'
                     and name.startswith('causal') == (package == 'causal_conv1d')]
        for name in _MODULES[package]:
            module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
            module.__doc__ = f'{__name__} in place of {name}.'
            vars(module).update((function, globals()[function]) for function in functions)
            parent, _, child = name.rpartition('.')
            if parent:
                setattr(sys.modules[parent], child, module)
            sys.modules[name] = module


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                      z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                      return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mmlocalmamba.ops.selective_scan` by the fastest backend."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                       z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                       return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mmlocalmamba.ops.selective_scan` step by step, with derivatives of any order."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend='reference')


def mamba_inner_fn(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                   delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                   B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                   delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                   C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
                   b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
                   dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6) -> Tensor:
    """A Mamba block behind its first projection: convolution, projections, scan, gate, last projection.

    Args:
        xz: (B, 2 D, L), input of the convolution and of the gate.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,) or None.
        x_proj_weight: (R + N + N, D), rows of step sizes, B and C; of B and C only where these are None. With a complex
            A there are 2 N rows for each, real and imaginary parts in turns.
        delta_proj_weight: (D, R).
        out_proj_weight: (E, D).
        out_proj_bias: (E,) or None.
        A: (D, N), real or complex.
        B, C: (D, N) if they are constant.
        D, delta_bias: (D,) or None.
        B_proj_bias, C_proj_bias: (N,) or None, added to the projected B and C.
        delta_softplus: dt = softplus(delta + delta_bias).
        checkpoint_lvl: 0 or 1; both keep what autograd needs. ``torch.utils.checkpoint`` around the call saves memory.
        b_rms_weight, c_rms_weight: (N,) of an RMSNorm of projected B and C, or None.
        dt_rms_weight: (D,) of an RMSNorm of the step sizes before bias and softplus, or None.
        b_c_dt_rms_eps: added to the mean squares.

    Returns:
        (B, L, E).

    Raises:
        ValueError: shapes that do not fit, norms or biases of a B or C that is constant, norms of complex ones.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f'checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}')
    width, rank = delta_proj_weight.shape
    if xz.dim() != 3 or xz.shape[1] != 2 * width:
        raise ValueError(f'xz must be (B, {2 * width}, L) for a delta_proj_weight of {tuple(delta_proj_weight.shape)}, '
                         f'got {tuple(xz.shape)}')
    expect_shape('conv1d_weight', conv1d_weight, (width, 1, conv1d_weight.shape[-1]), '(D, 1, W)')
    rows = A.shape[-1] * (2 if A.is_complex() else 1)
    expect_shape('x_proj_weight', x_proj_weight, (rank + rows * ((B is None) + (C is None)), width),
                 '(R + rows of B and C, D)')
    for name, given, bias, norm in (('B', B, B_proj_bias, b_rms_weight), ('C', C, C_proj_bias, c_rms_weight)):
        if given is not None and (bias is not None or norm is not None):
            raise ValueError(f'{name} is constant, so that {name}_proj_bias and {name.lower()}_rms_weight must be None')
        if A.is_complex() and norm is not None:
            raise ValueError(f'{name.lower()}_rms_weight must be None where A is complex')

    x: Any
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation='silu')
    projected = linear(x.transpose(1, 2), x_proj_weight)  # (B, L, rows)

    def variable(given: Tensor | None, start: int | None, stop: int | None, bias: Tensor | None,
                 norm: Tensor | None) -> Tensor:
        if given is not None:
            return given
        values = projected[..., start:stop]
        if bias is not None:
            values = values + bias.to(values.dtype)
        if norm is not None:
            values = _rms_norm(values, norm, b_c_dt_rms_eps)
        if A.is_complex():
            values = torch.view_as_complex(values.to(compute_dtype(values)).unflatten(-1, (-1, 2)).contiguous())
        return values.transpose(1, 2)

    B = variable(B, rank, rank + rows, B_proj_bias, b_rms_weight)
    C = variable(C, -rows, None, C_proj_bias, c_rms_weight)
    delta = linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    y: Any = selective_scan(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                    C_proj_bias: Tensor | None = None, delta_softplus: bool = True) -> Tensor:
    """:func:`mamba_inner_fn` with the arguments of mamba_ssm's reference (which takes ``delta_softplus`` for true)."""
    return mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
                          out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    compute = compute_dtype(x)
    return F.rms_norm(x.to(compute), weight.shape, weight.to(compute), eps).to(x.dtype)


def selective_state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                           D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
                           dt_softplus: bool = False, state_batch_indices: Tensor | None = None) -> Tensor:
    """One step of a selective scan, for generating token by token. H heads may be left out everywhere.

    Args:
        state: (B, H, D, N), or more entries than B with ``state_batch_indices``; updated in place.
        x, dt: (B, H, D).
        A: (H, D, N), real.
        B, C: (B, G, N) for G groups of H / G consecutive heads; without heads (B, N).
        D: (H, D) or None.
        z: (B, H, D) or None; the output is multiplied by silu(z).
        dt_bias: (H, D) or None.
        dt_softplus: step sizes are softplus(dt + dt_bias).
        state_batch_indices: (B,) integers, entry of ``state`` that each item of the batch continues, or None.

    Returns:
        (B, H, D) in x's dtype. Computed in float32 at least, from the state as it is before it is rounded to its dtype.

    Raises:
        ValueError: shapes that do not fit.
        TypeError, NotImplementedError: integer or complex tensors.
    """
    check_dtypes(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if state.dim() not in (3, 4):
        raise ValueError(f'state must be (B, D, N) or (B, H, D, N), got {tuple(state.shape)}')
    with_heads = state.dim() == 4

    def heads(tensor: Any, axis: int, dims: int) -> Any:
        """With an axis of heads, whether the tensor or the state has none."""
        return tensor.unsqueeze(axis) if tensor is not None and tensor.dim() == dims - 1 else tensor

    states, A = heads(state, 1, 4), heads(A, 0, 3)
    x, dt, B, C, z = (heads(tensor, 1, 3) for tensor in (x, dt, B, C, z))
    D, dt_bias = heads(D, 0, 2), heads(dt_bias, 0, 2)
    entries, H, width, N = states.shape
    batch = x.shape[0]
    for name, tensor in (('x', x), ('dt', dt), ('z', z)):
        expect_shape(name, tensor, (batch, H, width), '(B, H, D)')
    expect_shape('A', A, (H, width, N), '(H, D, N)')
    for name, tensor in (('D', D), ('dt_bias', dt_bias)):
        expect_shape(name, tensor, (H, width), '(H, D)')
    G = B.shape[1]
    expect_shape('B', B, (batch, G, N), '(B, G, N)')
    expect_shape('C', C, (batch, G, N), '(B, G, N)')
    if G == 0 or H % G:
        raise ValueError(f'{H} heads cannot be split into {G} groups')
    if state_batch_indices is None:
        expect_shape('state', states, (batch, H, width, N), '(B, H, D, N)')
    else:
        expect_shape('state_batch_indices', state_batch_indices, (batch, ), '(B,)')
        state_batch_indices = state_batch_indices.long()

    dtype, compute = x.dtype, compute_dtype(x)
    x, dt, A, B, C, D, z, dt_bias = (None if tensor is None else tensor.to(compute)
                                     for tensor in (x, dt, A, B, C, D, z, dt_bias))
    with without_autocast(x):
        if dt_bias is not None:
            dt = dt + dt_bias
        if dt_softplus:
            dt = F.softplus(dt)
        B, C = (tensor.repeat_interleave(H // G, dim=1) for tensor in (B, C))
        # A copy: the derivatives need the state that this step overwrites.
        h = (states.to(compute, copy=True) if state_batch_indices is None
             else states.index_select(0, state_batch_indices).to(compute))
        h = h * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B[:, :, None]
        out = (h * C[:, :, None]).sum(-1)
        if D is not None:
            out = out + D * x
        if z is not None:
            out = out * F.silu(z)
    if state_batch_indices is None:
        states.copy_(h)
    else:
        states.index_copy_(0, state_batch_indices, h.to(states.dtype))
    return (out if with_heads else out.squeeze(1)).to(dtype)


def selective_state_update_ref(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                               D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
                               dt_softplus: bool = False) -> Tensor:
    """:func:`selective_state_update` with the arguments of mamba_ssm's reference."""
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
