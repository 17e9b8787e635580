"""The functions of ``mamba_ssm`` (2.3) and of its forks. Import them from :mod:`mmlocalmamba.ops.stand_ins`."""
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.directions import ScanTables
from mmlocalmamba.ops import directional_scan, linear, selective_scan
from mmlocalmamba.ops.dispatch import (
    check_dtypes,
    compute_dtype,
    expect_shape,
    fused_op,
    without_autocast,
)
from mmlocalmamba.ops.stand_ins.causal_conv1d import causal_conv1d_fn

# No table: steps read the tokens in their order.
_IN_ORDER: Any = ScanTables(None, None)


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                      z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                      return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`mmlocalmamba.ops.selective_scan` on the fastest backend."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                       z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                       return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`mmlocalmamba.ops.selective_scan` step by step, with derivatives of any order."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend='reference')


def inner_scan(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
               delta_proj_weight: Tensor, A: Tensor, B: Tensor | None = None, C: Tensor | None = None,
               D: Tensor | None = None, delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
               C_proj_bias: Tensor | None = None, delta_softplus: bool = True, b_rms_weight: Tensor | None = None,
               c_rms_weight: Tensor | None = None, dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6,
               A_b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute a Mamba block between its first and its last projection.

    Args: Those of :func:`mamba_inner_fn`, and
        A_b: (D, N) of a second scan from the last step to the first, whose outputs are added, or None.

    Returns:
        The outputs (B, D, L) and the last states (B, D, N) of the scan from first to last step.

    Raises:
        ValueError: As :func:`mamba_inner_fn`.
    """
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
            raise ValueError(f'{name} is constant, so {name}_proj_bias and {name.lower()}_rms_weight must be None')
        if A.is_complex() and norm is not None:
            raise ValueError(f'{name.lower()}_rms_weight must be None if A is complex')

    x: Any
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (B, L, D)
    x = _convolve(x, conv1d_weight, conv1d_bias)
    projected = linear(x, x_proj_weight)  # (B, L, rows)

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
    delta, dt_weight = projected[..., :rank], delta_proj_weight
    if dt_rms_weight is not None:
        delta, dt_weight = _rms_norm(linear(delta, delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps), None
    y, last = _scan_tokens(x, delta, A, B, C, D, delta_bias, delta_softplus, dt_weight)
    gate = F.silu(z)
    y = y * gate
    if A_b is not None:
        x, delta = x.flip(1), delta.flip(1)
        B, C = (matrix if matrix.dim() == 2 else matrix.flip(-1) for matrix in (B, C))
        back, _ = _scan_tokens(x, delta, A_b, B, C, D, delta_bias, delta_softplus, dt_weight)
        y = y + back.flip(1) * gate
    return y.transpose(1, 2), last


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve tokens (B, L, D) causally, with weight (D, 1, W), and apply SiLU."""
    fused, (weight, bias) = fused_op('directional_conv', None, [x], [weight[:, 0], bias])
    if fused is None:
        y: Any = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation='silu')
        return y.transpose(1, 2)
    return fused(x, weight[None], None if bias is None else bias[None], _IN_ORDER)[:, 0]


def _scan_tokens(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                 delta_bias: Tensor | None, delta_softplus: bool, dt_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scan tokens x (B, L, D), whose step sizes have a low-rank factor delta (B, L, R) if ``dt_weight`` is given.

    Returns:
        (B, L, D) and the last states (B, D, N).
    """
    y: Any
    if B.dim() == 3 and C.dim() == 3 and not A.is_complex():
        y, last = directional_scan(x[:, None], delta[:, None], A[None], B.mT[:, None], C.mT[:, None],
                                   None if D is None else D[None], None,
                                   None if delta_bias is None else delta_bias[None], delta_softplus, True,
                                   None if dt_weight is None else dt_weight[None], True)
        return y[:, 0], last[:, 0]
    if dt_weight is not None:
        delta = linear(delta, dt_weight)
    y, last = selective_scan(x.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, None, delta_bias, delta_softplus,
                             return_last_state=True)
    return y.transpose(1, 2), last


def mamba_inner_fn(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                   delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                   B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                   delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                   C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
                   b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
                   dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6) -> Tensor:
    """Compute a Mamba block after its first projection: convolution, projections, scan, gate, last projection.

    Args:
        xz: (B, 2 D, L), the inputs of the convolution and of the gate.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,) or None.
        x_proj_weight: (R + N + N, D), the rows of the step sizes, B and C; without those of B or C if it is given. With
            a complex A, B and C have 2 N rows each, real and imaginary parts interleaved.
        delta_proj_weight: (D, R).
        out_proj_weight: (E, D).
        out_proj_bias: (E,) or None.
        A: (D, N), real or complex.
        B, C: (D, N) constants, or None: they are projected from the input.
        D, delta_bias: (D,) or None.
        B_proj_bias, C_proj_bias: (N,) or None, added to the projected B and C.
        delta_softplus: dt = softplus(delta + delta_bias) instead of delta + delta_bias.
        checkpoint_lvl: 0 or 1. Both keep all tensors that autograd needs: to save memory, use
            ``torch.utils.checkpoint`` around the call.
        b_rms_weight, c_rms_weight: (N,) weights of an RMSNorm of projected B and C, or None.
        dt_rms_weight: (D,) weight of an RMSNorm of the step sizes before bias and softplus, or None.
        b_c_dt_rms_eps: Added to the mean squares of these norms.

    Returns:
        (B, L, E).

    Raises:
        ValueError: Shapes do not match, a constant B or C has a norm or a bias, or a complex one has a norm.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f'checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}')
    y, _ = inner_scan(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
                      B_proj_bias, C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight,
                      b_c_dt_rms_eps)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                    C_proj_bias: Tensor | None = None, delta_softplus: bool = True) -> Tensor:
    """Call :func:`mamba_inner_fn`, with the arguments of mamba_ssm's reference.

    mamba_ssm's reference ignores ``delta_softplus`` and always applies softplus; this function does not.
    """
    return mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
                          out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus)


def mamba_inner_fn_no_out_proj(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                               delta_proj_weight: Tensor, A: Tensor, B: Tensor | None = None, C: Tensor | None = None,
                               D: Tensor | None = None, delta_bias: Tensor | None = None,
                               B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None,
                               delta_softplus: bool = True) -> Tensor:
    """Compute :func:`mamba_inner_fn` without the last projection, as Vim's fork of mamba_ssm.

    Returns:
        (B, D, L).
    """
    return inner_scan(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
                      B_proj_bias, C_proj_bias, delta_softplus)[0]


def bimamba_inner_fn(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                     delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                     A_b: Tensor, B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                     delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                     C_proj_bias: Tensor | None = None, delta_softplus: bool = True) -> Tensor:
    """Compute :func:`mamba_inner_fn` with a second scan from the last step to the first, as Vim's fork of mamba_ssm.

    Both scans have the same convolution, projections and gate; the second has A_b (D, N). Their outputs are added
    before the last projection.
    """
    y, _ = inner_scan(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
                      B_proj_bias, C_proj_bias, delta_softplus, A_b=A_b)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_ref(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                      delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                      A_b: Tensor, B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                      delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                      C_proj_bias: Tensor | None = None, delta_softplus: bool = True) -> Tensor:
    """Call :func:`bimamba_inner_fn`. The reference of Vim's fork always applies softplus; this function does not."""
    return bimamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
                            out_proj_bias, A, A_b, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    compute = compute_dtype(x)
    return F.rms_norm(x.to(compute), weight.shape, weight.to(compute), eps).to(x.dtype)


def selective_state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                           D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
                           dt_softplus: bool = False, state_batch_indices: Tensor | None = None) -> Tensor:
    """Compute one step of a selective scan, to generate token by token. All tensors may lack the dimension of heads, H.

    Args:
        state: (B, H, D, N). It is updated in place. With ``state_batch_indices`` it may have more entries than B.
        x, dt: (B, H, D).
        A: (H, D, N), real.
        B, C: (B, G, N) for G groups of H / G consecutive heads; (B, N) without heads.
        D: (H, D) or None.
        z: (B, H, D) or None; the output is multiplied by silu(z).
        dt_bias: (H, D) or None.
        dt_softplus: Step sizes are softplus(dt + dt_bias) instead of dt + dt_bias.
        state_batch_indices: (B,) integers or None: the entry of ``state`` that each item of the batch continues.

    Returns:
        (B, H, D) in x's dtype, computed in float32 at least, from the new state before it is rounded to its dtype.

    Raises:
        ValueError: Shapes do not match.
        TypeError: A tensor holds integers.
        NotImplementedError: A tensor is complex.
    """
    check_dtypes(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if state.dim() not in (3, 4):
        raise ValueError(f'state must be (B, D, N) or (B, H, D, N), got {tuple(state.shape)}')
    with_heads = state.dim() == 4

    def heads(tensor: Any, axis: int, dims: int) -> Any:
        """Return a tensor of ``dims`` dimensions: insert the axis of heads if it is missing."""
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
        # A copy, because the derivatives need the state that this step overwrites.
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
    """Call :func:`selective_state_update`, with the arguments of mamba_ssm's reference."""
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
