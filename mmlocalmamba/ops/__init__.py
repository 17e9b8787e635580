"""Selective scans, and what stands around them in a mixer: several backends, one dispatcher. Needs torch alone.

``backend=None`` takes the fastest backend that can run the tensors at hand; the environment variable
``MMLOCALMAMBA_BACKEND`` or the argument names one instead, and naming one that cannot run is an error. Scans are
computed in float32 (float64 for float64 inputs) whatever the dtype of the inputs or of autocast.

All backends have first derivatives, also those of ``torch.func.grad`` and ``torch.func.vmap``. Second ones and
forward-mode ones (``jvp``, ``jacfwd``) have 'reference' alone, for all of these ops; the fused operators refuse them.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.ops import chunked, cpu, cuda, onnx, plain, reference, triton
from mmlocalmamba.ops.dispatch import (
    BACKEND_VARIABLE,
    BACKENDS,
    Backend,
    ScanInputs,
    autocasts,
    available_backends,
    check_dtypes,
    check_states,
    compute_dtype,
    expect_shape,
    fused_op,
    run_scan,
)
from mmlocalmamba.ops.plain import rotate
from mmlocalmamba.scans import ScanTables

__all__ = ['BACKENDS', 'BACKEND_VARIABLE', 'Backend', 'ScanInputs', 'add_rms_norm', 'available_backends',
           'directional_conv', 'directional_scan', 'linear', 'rotate', 'scattn_sum', 'selective_scan']

# The order of preference.
BACKENDS.update((module.BACKEND.name, module.BACKEND) for module in (cpu, triton, cuda, chunked, reference, onnx))


def directional_scan(u: Tensor,
                     delta: Tensor,
                     A: Tensor,
                     B: Tensor,
                     C: Tensor,
                     D: Tensor | None = None,
                     tables: ScanTables | None = None,
                     delta_bias: Tensor | None = None,
                     delta_softplus: bool = False,
                     in_scan_order: bool = False,
                     dt_weight: Tensor | None = None,
                     return_last_state: bool = False,
                     backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scans of the same L tokens along K directions, without permuted copies at the interface.

    Step t of direction k reads token ``tables.src[k, t]``; a pad (-1) has u = B = C = 0 and delta = 0, so that its step
    size is softplus(delta_bias) and the state decays, as in the authors' code. Outputs stand at their tokens' original
    positions. Recurrence: paper eq. 3 with Mamba's discretisation (:mod:`mmlocalmamba.ops.reference`).

    Args:
        u: (B, L, D) tokens shared by all directions, or (B, K, L, D).
        delta: (B, K, L, D) step sizes before bias and softplus; with ``dt_weight`` (B, K, L, R), their low-rank factor.
        A: (K, D, N) state matrices, diagonal, of negative real part for a stable scan.
        B, C: (B, K, L, N). If A is complex they may be; outputs are 2 Re(C h) then.
        D: (K, D) skip weights, or None.
        tables: :func:`mmlocalmamba.scans.scan_tables` for these tokens, on the device of u: each direction reads every
            token once. CPU kernels check that; others would leave rows of y unwritten.
        delta_bias: (K, D) or None.
        delta_softplus: dt = softplus(delta + delta_bias) instead of delta + delta_bias.
        in_scan_order: u (B, K, T, D), delta, B and C are given step by step, pads included, with the values that
            these steps shall have (LocalVim's come out of a convolution along the scan). Outputs stand at original
            positions all the same. ``tables`` may be None: then T = L and outputs stay in scan order.
        dt_weight: (K, D, R) or None: the step sizes are delta times its transpose, which no backend has to write down.
        return_last_state: also return the state after the last step.
        backend: a name of :data:`BACKENDS`; None chooses.

    Returns:
        y (B, K, L, D) in u's dtype, and with ``return_last_state`` the states (B, K, D, N) in float32 (float64 for
        float64 inputs), or the complex dtype of that precision.

    Raises:
        ValueError: shapes that do not fit, an unknown backend.
        TypeError, NotImplementedError: integer tensors; complex ones other than A, B and C; B or C alone complex.
        RuntimeError: the backend that was named cannot run here, or takes no complex A.
    """
    src, inv = tables if tables is not None else (None, None)
    inputs = ScanInputs(u, delta, A, B, C, D, src, inv, delta_bias, dt_weight, delta_softplus, in_scan_order).check()
    y, last = run_scan(inputs, backend)
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def selective_scan(u: Tensor,
                   delta: Tensor,
                   A: Tensor,
                   B: Tensor,
                   C: Tensor,
                   D: Tensor | None = None,
                   z: Tensor | None = None,
                   delta_bias: Tensor | None = None,
                   delta_softplus: bool = False,
                   return_last_state: bool = False,
                   backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan, with the layouts of ``mamba_ssm``'s ``selective_scan_fn``.

    Args:
        u, delta: (B, D, L).
        A: (D, N), real or complex; outputs are 2 Re(C h) if it is complex.
        B, C: (B, N, L), or (B, G, N, L) for G groups of D / G consecutive channels, or (D, N) where they are constant
            (each channel is a group of its own then, which is slower). With a complex A they are complex; those that
            vary may also be real and of length 2 L, real and imaginary parts in turns, as ``mamba_ssm`` has them.
        D: (D,) or None.
        z: (B, D, L) or None; the output is multiplied by silu(z).
        delta_bias: (D,) or None.
        delta_softplus: dt = softplus(delta + delta_bias).
        return_last_state: also return the state after the last step.
        backend: a name of :data:`BACKENDS`; None chooses.

    Returns:
        out (B, D, L) in u's dtype, and with ``return_last_state`` the state (B, D, N) in float32 (float64 for float64
        inputs), or the complex dtype of that precision.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`directional_scan`.
    """
    check_dtypes(u=u, delta=delta, D=D, z=z, delta_bias=delta_bias)
    check_states(A, B, C)
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f'u must be (B, D, L) and A (D, N), got {tuple(u.shape)} and {tuple(A.shape)}')
    batch, width, L = u.shape
    N = A.shape[-1]
    expect_shape('delta', delta, (batch, width, L), '(B, D, L)')
    expect_shape('A', A, (width, N), '(D, N)')
    expect_shape('D', D, (width, ), '(D,)')
    expect_shape('z', z, (batch, width, L), '(B, D, L)')
    expect_shape('delta_bias', delta_bias, (width, ), '(D,)')
    B, C = _of_groups('B', B, A, batch, L), _of_groups('C', C, A, batch, L)
    G = math.lcm(B.shape[1], C.shape[1])
    B, C = (x[:, :, None].expand(-1, -1, G // x.shape[1], -1, -1).flatten(1, 2) for x in (B, C))

    def tokens(x: Tensor) -> Tensor:
        return x.reshape(batch, G, width // G, L).transpose(2, 3)

    def channels(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(G, width // G, *x.shape[1:])

    inputs = ScanInputs(tokens(u), tokens(delta), channels(A), B.transpose(2, 3), C.transpose(2, 3), channels(D),
                        delta_bias=channels(delta_bias), delta_softplus=delta_softplus, in_scan_order=True)
    y, last = run_scan(inputs, backend)
    y = y.transpose(2, 3).reshape(batch, width, L)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last.reshape(batch, width, N)) if return_last_state else y


def _of_groups(name: str, x: Tensor, A: Tensor, batch: int, L: int) -> Tensor:
    """B or C of :func:`selective_scan` as (B, G, N, L) for some G that divides D."""
    width, N = A.shape
    if x.dim() == 2:
        expect_shape(name, x, (width, N), '(D, N)')
        if A.is_complex() and not x.is_complex():
            raise TypeError(f'a constant {name} must be complex like A, got {x.dtype}')
        return x[None, :, :, None].expand(batch, -1, -1, L)
    if x.dim() not in (3, 4):
        raise ValueError(f'{name} must be (D, N), (B, N, L) or (B, G, N, L), got {tuple(x.shape)}')
    x = x[:, None] if x.dim() == 3 else x
    if A.is_complex() and not x.is_complex():
        if x.shape[-1] != 2 * L:
            raise ValueError(f'{name} of a complex A must be complex or of length 2 L = {2 * L}, '
                             f'got length {x.shape[-1]}')
        x = torch.view_as_complex(x.to(compute_dtype(x)).unflatten(-1, (L, 2)).contiguous())
    G = x.shape[1]
    if G == 0 or width % G:
        raise ValueError(f'{width} channels cannot be split into {G} groups')
    expect_shape(name, x, (batch, G, N, L), '(B, G, N, L)')
    return x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """torch's ``F.linear``, by its faster way on a CPU.

    Args:
        x: (..., I), or (B, K, T, I) for K weights.
        weight: (O, I), or (K, O, I).
        bias: (O,) or None; None for K weights.
        backend: a name of :data:`BACKENDS`; None chooses. Whatever a backend has no version of, or not for these
            dtypes, plain PyTorch does.

    Returns:
        (..., O), or (B, K, T, O).
    """
    if x.dim() < 2 or autocasts(x):
        return plain.linear(x, weight, bias)
    fused, _ = fused_op('linear', backend, [x, weight, bias], [])
    return (fused or plain.linear)(x, weight, bias)


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tables: ScanTables,
                     backend: str | None = None) -> Tensor:
    """Causal depthwise convolution along K scans, and SiLU: silu(bias + sum_j weight[j] x[t - W + 1 + j]).

    Args:
        x: (B, L, D) tokens shared by all directions. Pads, and what lies before the first step, are zeros.
        weight: (K, D, W).
        bias: (K, D) or None.
        tables: :func:`mmlocalmamba.scans.scan_tables` for these tokens, on the device of x.
        backend: as in :func:`linear`.

    Returns:
        (B, K, T, D), in scan order: what ``directional_scan(in_scan_order=True)`` takes.
    """
    fused, (weight, bias) = fused_op('directional_conv', backend, [x], [weight, bias])
    return (fused or plain.directional_conv)(x, weight, bias, tables)


def scattn_sum(y: Tensor, z: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, reduce_weight: Tensor,
               reduce_bias: Tensor, select_weight: Tensor, select_bias: Tensor, backend: str | None = None) -> Tensor:
    """The sum of K directions' features, each gated by SCAttn's channel branch (paper Fig. 3b).

    With f = y * silu(z), gate = sigmoid(select(gelu(reduce(mean over tokens of layer_norm(f))))), it is the sum over
    directions of f * gate.

    Args:
        y: (B, K, L, C).
        z: (B, L, C), or None: f = y.
        norm_weight, norm_bias: (C,); eps: of the LayerNorm.
        reduce_weight, reduce_bias: (R, C), (R,).
        select_weight, select_bias: (C, R), (C,).
        backend: as in :func:`linear`.

    Returns:
        (B, L, C).
    """
    fused, weights = fused_op('scattn_sum', backend, [y, z], [norm_weight, norm_bias, reduce_weight, reduce_bias,
                                                              select_weight, select_bias])
    run: Callable[..., Tensor] = fused or plain.scattn_sum
    return run(y, z, *weights[:2], eps, *weights[2:])


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cos: Tensor | None = None,
                 sin: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The step between two blocks of a residual stream: rotate(x + residual), and its RMSNorm.

    A rotation is linear: turning the sum is turning both, as the authors do.

    Args:
        x: (B, L, C).
        residual: (B, L, C), or None before the first block.
        weight: (C,) of the norm.
        eps: added to the mean square.
        cos, sin: (L, C) of the angles that neighbouring channel pairs are turned by, or None.
        backend: as in :func:`linear`.

    Returns:
        The normalised sum in x's dtype, and the sum in the residual's, if there is one; both (B, L, C).
    """
    tokens = [x]
    # Under autocast the residual stream keeps its 32 bits between blocks of 16.
    if residual is not None and residual.dtype != compute_dtype(x):
        tokens.append(residual)
    fused, (weight, cos, sin) = fused_op('add_rms_norm', backend, tokens, [weight, cos, sin])
    return (fused or plain.add_rms_norm)(x, residual, weight, eps, cos, sin)
