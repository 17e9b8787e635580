"""Selective scans and the ops that surround them in a mixer: several backends, one dispatcher. Needs torch only.

``backend=None`` chooses the fastest backend that can run the given tensors. The argument or the environment variable
``MMLOCALMAMBA_BACKEND`` names one instead; if that one cannot run, it is an error. Scans are computed in float32
(float64 for float64 inputs), whatever the dtype of the inputs or of autocast.

All backends have first derivatives, also under ``torch.func.grad`` and ``torch.func.vmap``. Only 'reference' has second
and forward-mode derivatives (``jvp``, ``jacfwd``) of all ops; the fused operators raise NotImplementedError.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.directions import ScanTables
from mmlocalmamba.ops import flops, unfused
from mmlocalmamba.ops.backends import chunked, cpu, mamba_ssm, onnx, reference, triton
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
from mmlocalmamba.ops.unfused import rotate

__all__ = ['BACKENDS', 'BACKEND_VARIABLE', 'Backend', 'ScanInputs', 'add_rms_norm', 'available_backends',
           'conv2d_silu', 'directional_conv', 'directional_scan', 'linear', 'linear_gelu', 'norm_gate', 'rotate',
           'scattn_sum', 'selective_scan']

# In the order of preference.
BACKENDS.update((module.BACKEND.name, module.BACKEND) for module in (cpu, triton, mamba_ssm, chunked, reference, onnx))
flops.register_totals()


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
    """Run selective scans of the same L tokens along K directions, without permuted copies at the interface.

    Step t of direction k reads token ``tables.src[k, t]``. A pad (-1) has u = B = C = 0 and delta = 0, so its step size
    is softplus(delta_bias) and the state decays, as in the authors' code. Outputs are at their tokens' original
    positions. Recurrence: paper eq. 3 with Mamba's discretisation (:mod:`mmlocalmamba.ops.backends.reference`).

    Args:
        u: (B, L, D) tokens shared by all directions, or (B, K, L, D).
        delta: (B, K, L, D) step sizes before bias and softplus; with ``dt_weight``, their low-rank factor (B, K, L, R).
        A: (K, D, N) diagonal state matrices, with negative real parts for a stable scan.
        B, C: (B, K, L, N). They may be complex if A is; outputs are 2 Re(C h) then.
        D: (K, D) skip weights, or None.
        tables: :func:`mmlocalmamba.directions.scan_tables` for these tokens, on the device of u. Each direction must
            read every token once: CPU kernels check it; on other devices, rows of y would stay unwritten.
        delta_bias: (K, D) or None.
        delta_softplus: dt = softplus(delta + delta_bias) instead of delta + delta_bias.
        in_scan_order: If True, u (B, K, T, D), delta, B and C hold the values of each step, pads included (LocalVim's
            are the outputs of a convolution along the scan). Outputs are at original positions. ``tables`` may be
            None: then T = L and outputs are in scan order.
        dt_weight: (K, D, R) or None. The step sizes are delta times its transpose; fused backends never store them.
        return_last_state: If True, also return the state after the last step.
        backend: A name of :data:`BACKENDS`; None chooses automatically.

    Returns:
        y (B, K, L, D) in u's dtype. With ``return_last_state`` also the states (B, K, D, N) in float32 (float64 for
        float64 inputs), or in the complex dtype of that precision.

    Raises:
        ValueError: Shapes do not match, or the backend is unknown.
        TypeError: A tensor holds integers, or B or C is complex and A is not.
        NotImplementedError: A tensor other than A, B and C is complex.
        RuntimeError: The named backend cannot run here, or takes no complex A.
    """
    src, inv = tables if tables is not None else (None, None)
    inputs = ScanInputs(u=u, delta=delta, A=A, B=B, C=C, D=D, src=src, inv=inv, delta_bias=delta_bias,
                        dt_weight=dt_weight, delta_softplus=delta_softplus, in_scan_order=in_scan_order).check()
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
    """Run Mamba's selective scan, with the layouts of ``mamba_ssm``'s ``selective_scan_fn``.

    Args:
        u, delta: (B, D, L).
        A: (D, N), real or complex. If it is complex, outputs are 2 Re(C h).
        B, C: (B, N, L), or (B, G, N, L) for G groups of D / G consecutive channels, or (D, N) if they are constant
            (each channel is then its own group, which is slower). With a complex A they are complex; if they are not
            constant, they may also be real with length 2 L, real and imaginary parts interleaved, as in ``mamba_ssm``.
        D: (D,) or None.
        z: (B, D, L) or None; the output is multiplied by silu(z).
        delta_bias: (D,) or None.
        delta_softplus: dt = softplus(delta + delta_bias) instead of delta + delta_bias.
        return_last_state: If True, also return the state after the last step.
        backend: A name of :data:`BACKENDS`; None chooses automatically.

    Returns:
        out (B, D, L) in u's dtype. With ``return_last_state`` also the state (B, D, N) in float32 (float64 for float64
        inputs), or in the complex dtype of that precision.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: As :func:`directional_scan`.
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
    B, C = _grouped('B', B, A, batch, L), _grouped('C', C, A, batch, L)
    G = math.lcm(B.shape[1], C.shape[1])
    B, C = (x[:, :, None].expand(-1, -1, G // x.shape[1], -1, -1).flatten(1, 2) for x in (B, C))

    def tokens(x: Tensor) -> Tensor:
        return x.reshape(batch, G, width // G, L).transpose(2, 3)

    def channels(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(G, width // G, *x.shape[1:])

    inputs = ScanInputs(u=tokens(u), delta=tokens(delta), A=channels(A), B=B.transpose(2, 3), C=C.transpose(2, 3),
                        D=channels(D), delta_bias=channels(delta_bias), delta_softplus=delta_softplus,
                        in_scan_order=True)
    y, last = run_scan(inputs, backend)
    y = y.transpose(2, 3).reshape(batch, width, L)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last.reshape(batch, width, N)) if return_last_state else y


def _grouped(name: str, x: Tensor, A: Tensor, batch: int, L: int) -> Tensor:
    """Return B or C of :func:`selective_scan` as (B, G, N, L) for some G that divides D."""
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
            raise ValueError(f'{name} of a complex A must be complex or have length 2 L = {2 * L}, '
                             f'got length {x.shape[-1]}')
        x = torch.view_as_complex(x.to(compute_dtype(x)).unflatten(-1, (L, 2)).contiguous())
    G = x.shape[1]
    if G == 0 or width % G:
        raise ValueError(f'{width} channels cannot be split into {G} groups')
    expect_shape(name, x, (batch, G, N, L), '(B, G, N, L)')
    return x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Compute torch's ``F.linear``, on a CPU by the faster of its algorithms.

    Args:
        x: (..., I), or (B, K, T, I) for K weights.
        weight: (O, I), or (K, O, I).
        bias: (O,) or None; None for K weights.
        backend: A name of :data:`BACKENDS`; None chooses automatically. If the backend has no version of this op for
            these dtypes, plain PyTorch computes it.

    Returns:
        (..., O), or (B, K, T, O).
    """
    if x.dim() < 2 or autocasts(x):
        return unfused.linear(x, weight, bias)
    fused, _ = fused_op('linear', backend, [x, weight, bias], [])
    return (unfused.linear if fused is None else fused)(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Compute GELU of :func:`linear`, without a copy of its product where there is no gradient to compute.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        backend: As in :func:`linear`.

    Returns:
        (..., O).
    """
    if x.dim() < 2 or autocasts(x):
        return unfused.linear_gelu(x, weight, bias)
    fused, _ = fused_op('linear_gelu', backend, [x, weight, bias], [])
    return (unfused.linear_gelu if fused is None else fused)(x, weight, bias)


def conv2d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int],
                backend: str | None = None) -> Tensor:
    """Convolve tokens on a grid by 3x3 taps, for each channel alone and with zeros around the grid, then take SiLU.

    Args:
        x: (B, H*W, D).
        weight: (D, 1, 3, 3).
        bias: (D,) or None.
        size: (H, W).
        backend: As in :func:`linear`.

    Returns:
        (B, H*W, D).
    """
    fused, (weight, bias) = fused_op('conv2d_silu', backend, [x], [weight, bias])
    return (unfused.conv2d_silu if fused is None else fused)(x, weight, bias, size)


def norm_gate(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
              backend: str | None = None) -> Tensor:
    """Compute layer_norm(sum over directions of y) * silu(z): what follows the scans of LocalVMamba.

    Args:
        y: (B, K, L, D).
        z: (B, L, D), or None: no gate.
        weight, bias: (D,) parameters of the LayerNorm.
        eps: The LayerNorm's epsilon.
        backend: As in :func:`linear`.

    Returns:
        (B, L, D).
    """
    fused, weights = fused_op('norm_gate', backend, [y, z], [weight, bias])
    run: Callable[..., Tensor] = unfused.norm_gate if fused is None else fused
    return run(y, z, *weights, eps)


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tables: ScanTables,
                     backend: str | None = None) -> Tensor:
    """Convolve causally along K scans, for each channel alone: silu(bias + sum_j weight[j] x[t - W + 1 + j]).

    Args:
        x: (B, L, D) tokens shared by all directions. Pads and the steps before the first one are zeros.
        weight: (K, D, W).
        bias: (K, D) or None.
        tables: :func:`mmlocalmamba.directions.scan_tables` for these tokens, on the device of x.
        backend: As in :func:`linear`.

    Returns:
        (B, K, T, D) in scan order, as ``directional_scan(in_scan_order=True)`` takes it.
    """
    fused, (weight, bias) = fused_op('directional_conv', backend, [x], [weight, bias])
    return (unfused.directional_conv if fused is None else fused)(x, weight, bias, tables)


def scattn_sum(y: Tensor, z: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, reduce_weight: Tensor,
               reduce_bias: Tensor, select_weight: Tensor, select_bias: Tensor, backend: str | None = None) -> Tensor:
    """Sum the features of K directions, each gated by SCAttn's channel branch (paper Fig. 3b).

    With f = y * silu(z) and gate = sigmoid(select(gelu(reduce(mean over tokens of layer_norm(f))))), the result is the
    sum over directions of f * gate.

    Args:
        y: (B, K, L, C).
        z: (B, L, C), or None: f = y.
        norm_weight, norm_bias: (C,) parameters of the LayerNorm.
        eps: The LayerNorm's epsilon.
        reduce_weight, reduce_bias: (R, C), (R,).
        select_weight, select_bias: (C, R), (C,).
        backend: As in :func:`linear`.

    Returns:
        (B, L, C).
    """
    fused, weights = fused_op('scattn_sum', backend, [y, z], [norm_weight, norm_bias, reduce_weight, reduce_bias,
                                                              select_weight, select_bias])
    run: Callable[..., Tensor] = unfused.scattn_sum if fused is None else fused
    return run(y, z, *weights[:2], eps, *weights[2:])


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cos: Tensor | None = None,
                 sin: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Compute the step between two blocks of a residual stream: rotate(x + residual), and its RMSNorm.

    The authors rotate x and the residual. A rotation is linear, so rotating their sum is the same.

    Args:
        x: (B, L, C).
        residual: (B, L, C), or None before the first block.
        weight: (C,) weight of the norm.
        eps: Added to the mean square.
        cos, sin: (L, C) of the angles by which neighbouring channel pairs are rotated, or None.
        backend: As in :func:`linear`.

    Returns:
        The normalised sum in x's dtype, and the sum in the dtype of the residual (of x if it is None); both (B, L, C).
    """
    tokens = [x]
    # Under autocast the residual stream has 32 bits, and the blocks have 16.
    if residual is not None and residual.dtype != compute_dtype(x):
        tokens.append(residual)
    fused, (weight, cos, sin) = fused_op('add_rms_norm', backend, tokens, [weight, cos, sin])
    return (unfused.add_rms_norm if fused is None else fused)(x, residual, weight, eps, cos, sin)
