"""Selective scans, and what stands around them in a mixer: several backends, one dispatcher. Needs torch alone.

``backend=None`` takes the fastest backend that can run the tensors at hand; the environment variable
``MMLOCALMAMBA_BACKEND`` or the argument names one instead, and naming one that cannot run is an error. Backends
compute in float32 (float64 for float64 inputs) whatever the dtype of the inputs or of autocast.
"""
import os
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.ops import chunked, cpu, cuda, reference, triton
from mmlocalmamba.ops.common import to_scan_order
from mmlocalmamba.ops.library import rotate
from mmlocalmamba.scans import ScanTables

# Fastest first. A backend is a module with scan(...) and unavailable(u) -> None or the reason why it cannot run.
BACKENDS = {'cpu': cpu, 'triton': triton, 'cuda': cuda, 'chunked': chunked, 'reference': reference}
BACKEND_VARIABLE = 'MMLOCALMAMBA_BACKEND'
# Elements of u from which a user should know that a CPU scan does not take the native kernel.
_LARGE = 1 << 16


def available_backends(u: Tensor) -> dict[str, str | None]:
    """Every backend in the order of preference, with None or the reason why it cannot run tensors like ``u``."""
    return {name: backend.unavailable(u) for name, backend in BACKENDS.items()}


@cache
def _warn_of_slow_scan(reason: str) -> None:
    """Once for each reason."""
    warnings.warn(f'selective scans run in plain PyTorch, many times slower than the native CPU kernel: {reason}',
                  stacklevel=5)


def _choose(u: Tensor, name: str | None):
    name = name or os.environ.get(BACKEND_VARIABLE) or None
    if name is None:
        if u.device.type == 'cpu' and u.numel() >= _LARGE and cpu.unavailable(u) is not None:
            _warn_of_slow_scan(cpu.unavailable(u))
        # Triton's interpreter runs on CPU tensors for the sake of tests: to be named, never to be chosen.
        return next(backend for backend in BACKENDS.values() if backend.unavailable(u) is None
                    and not (backend is triton and u.device.type == 'cpu'))
    if name not in BACKENDS:
        raise ValueError(f'unknown backend {name!r}: known are {", ".join(BACKENDS)} '
                         f'(argument backend or environment variable {BACKEND_VARIABLE})')
    reason = BACKENDS[name].unavailable(u)
    if reason is not None:
        raise RuntimeError(f'backend {name!r} cannot run here: {reason}')
    return BACKENDS[name]


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f'{name} must have shape {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}')


def _check_dtypes(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.is_complex():
            raise NotImplementedError(f'{name} is complex ({x.dtype}): only real state spaces are supported')
        if x is not None and not x.is_floating_point():
            raise TypeError(f'{name} must be a floating point tensor, got {x.dtype}')


def _run(backend: str | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
         tables: ScanTables | None, delta_bias: Tensor | None, delta_softplus: bool,
         in_scan_order: bool, dt_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    module = _choose(u, backend)
    src, inv = tables if tables is not None else (None, None)
    optional = {}
    if dt_weight is not None:
        if module in (cpu, triton):
            optional['dt_weight'] = dt_weight
        else:
            delta = torch.einsum('bklr,kdr->bkld', delta, dt_weight)
    # Autocast would take the recurrence to 16 bits.
    with torch.autocast(u.device.type, enabled=False):
        if module not in (triton, cuda):  # which read 16 bits and compute in 32
            compute = torch.float64 if u.dtype == torch.float64 else torch.float32
            u, delta, A, B, C, D, delta_bias = (
                None if x is None else x.to(compute) for x in (u, delta, A, B, C, D, delta_bias))
            optional = {name: x.to(compute) for name, x in optional.items()}
        return module.scan(u, delta, A, B, C, D, src, inv, delta_bias, delta_softplus, in_scan_order, **optional)


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
        A: (K, D, N) state matrices, diagonal, real, negative for a stable scan.
        B, C: (B, K, L, N).
        D: (K, D) skip weights, or None.
        tables: :func:`mmlocalmamba.scans.scan_tables` for these tokens, on the device of u.
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
        float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an unknown backend.
        TypeError, NotImplementedError: integer or complex tensors.
        RuntimeError: the backend that was named cannot run here.
    """
    _check_dtypes(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias, dt_weight=dt_weight)
    if delta.dim() != 4 or A.dim() != 3:
        raise ValueError(f'delta must be (B, K, L, D) and A (K, D, N), got {tuple(delta.shape)} and {tuple(A.shape)}')
    batch, K, S, rank = delta.shape
    width, N = A.shape[1:] if dt_weight is not None else (rank, A.shape[-1])
    _expect('dt_weight', dt_weight, (K, width, rank), '(K, D, R)')
    _expect('A', A, (K, width, N), '(K, D, N)')
    _expect('B', B, (batch, K, S, N), '(B, K, L, N)')
    _expect('C', C, (batch, K, S, N), '(B, K, L, N)')
    _expect('D', D, (K, width), '(K, D)')
    _expect('delta_bias', delta_bias, (K, width), '(K, D)')
    if in_scan_order or u.dim() != 3:
        _expect('u', u, (batch, K, S, width), '(B, K, L, D)')
    else:
        _expect('u', u, (batch, S, width), '(B, L, D)')
    if tables is None:
        if not in_scan_order:
            raise ValueError('tables are needed unless in_scan_order=True')
    else:
        if tables.src.shape[0] != K or tables.inv.shape[0] != K:
            raise ValueError(f'tables hold {tables.src.shape[0]} directions, the tensors {K}')
        steps = tables.src.shape[1] if in_scan_order else tables.inv.shape[1]
        if steps != S:
            raise ValueError(f'tables are for {steps} {"steps" if in_scan_order else "tokens"}, delta holds {S}')
    y, last = _run(backend, u, delta, A, B, C, D, tables, delta_bias, delta_softplus, in_scan_order,
                   dt_weight)
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
        A: (D, N), real.
        B, C: (B, N, L), or (B, G, N, L) for G groups of D / G consecutive channels.
        D: (D,) or None.
        z: (B, D, L) or None; the output is multiplied by silu(z).
        delta_bias: (D,) or None.
        delta_softplus: dt = softplus(delta + delta_bias).
        return_last_state: also return the state after the last step.
        backend: a name of :data:`BACKENDS`; None chooses.

    Returns:
        out (B, D, L) in u's dtype, and with ``return_last_state`` the state (B, D, N) in float32 (float64 for float64
        inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as :func:`directional_scan`.
    """
    _check_dtypes(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f'u must be (B, D, L) and A (D, N), got {tuple(u.shape)} and {tuple(A.shape)}')
    batch, width, L = u.shape
    N = A.shape[-1]
    _expect('delta', delta, (batch, width, L), '(B, D, L)')
    _expect('A', A, (width, N), '(D, N)')
    _expect('D', D, (width, ), '(D,)')
    _expect('z', z, (batch, width, L), '(B, D, L)')
    _expect('delta_bias', delta_bias, (width, ), '(D,)')
    if B.dim() == 2 or C.dim() == 2:
        raise NotImplementedError('input-independent B or C (D, N) is not supported: expand to (B, N, L)')
    B = B[:, None] if B.dim() == 3 else B
    C = C[:, None] if C.dim() == 3 else C
    G = max(B.shape[1], C.shape[1])
    if width % G:
        raise ValueError(f'{width} channels cannot be split into {G} groups')
    B, C = (x.expand(-1, G, -1, -1) if x.shape[1] == 1 else x for x in (B, C))
    _expect('B', B, (batch, G, N, L), '(B, G, N, L)')
    _expect('C', C, (batch, G, N, L), '(B, G, N, L)')

    def tokens(x: Tensor) -> Tensor:
        return x.reshape(batch, G, -1, L).transpose(2, 3)

    def channels(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(G, width // G, *x.shape[1:])

    y, last = _run(backend, tokens(u), tokens(delta), channels(A), B.transpose(2, 3), C.transpose(2, 3), channels(D),
                   None, channels(delta_bias), delta_softplus, True)
    y = y.transpose(2, 3).reshape(batch, width, L)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last.reshape(batch, width, N)) if return_last_state else y


def runs_native(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the CPU kernels, which know no mixed precision, are to be used for these tensors."""
    return (_choose(x, None) is cpu and x.dtype in (torch.float32, torch.float64)
            and all(weight is None or weight.dtype == x.dtype for weight in weights))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's ``F.linear``, by its faster way on a CPU.

    Args:
        x: (..., I), or (B, K, T, I) for K weights.
        weight: (O, I), or (K, O, I).
        bias: (O,) or None; None for K weights.

    Returns:
        (..., O), or (B, K, T, O).
    """
    if x.dim() > 1 and runs_native(x, weight, bias) and not torch.is_autocast_enabled('cpu'):
        return cpu.linear(x, weight, bias)
    return torch.einsum('bkti,koi->bkto', x, weight) if weight.dim() == 3 else F.linear(x, weight, bias)


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tables: ScanTables) -> Tensor:
    """Causal depthwise convolution along K scans, and SiLU: silu(bias + sum_j weight[j] x[t - W + 1 + j]).

    Args:
        x: (B, L, D) tokens shared by all directions. Pads, and what lies before the first step, are zeros.
        weight: (K, D, W).
        bias: (K, D) or None.
        tables: :func:`mmlocalmamba.scans.scan_tables` for these tokens, on the device of x.

    Returns:
        (B, K, T, D), in scan order: what ``directional_scan(in_scan_order=True)`` takes.
    """
    if _choose(x, None) is triton:
        return triton.directional_conv(x, weight, bias, tables.src)
    if runs_native(x, weight, bias):
        return cpu.directional_conv(x, weight, bias, tables.src)
    K, width, taps = weight.shape
    x = to_scan_order(x, *tables)
    batch, _, T, _ = x.shape
    x = F.conv1d(x.transpose(2, 3).reshape(batch, K * width, T), weight.flatten(0, 1)[:, None],
                 None if bias is None else bias.flatten(), padding=taps - 1, groups=K * width)
    return F.silu(x[..., :T].unflatten(1, (K, width)).transpose(2, 3))


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cos: Tensor | None = None,
                 sin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The step between two blocks of a residual stream: rotate(x + residual), and its RMSNorm.

    A rotation is linear: turning the sum is turning both, as the authors do.

    Args:
        x: (B, L, C).
        residual: (B, L, C), or None before the first block.
        weight: (C,) of the norm.
        eps: added to the mean square.
        cos, sin: (L, C) of the angles that neighbouring channel pairs are turned by
            (:func:`mmlocalmamba.layers.rotary_tables`), or None.

    Returns:
        The normalised sum and the sum, both (B, L, C). Under autocast the sum keeps the residual's precision.
    """
    if runs_native(x, residual, weight, cos) and not torch.is_autocast_enabled('cpu'):
        return cpu.add_rms_norm(x, residual, weight, eps, cos, sin)
    total = x if residual is None else residual + x
    if cos is not None:
        total = rotate(total, cos, sin)
    return F.rms_norm(total, weight.shape, weight, eps), total
