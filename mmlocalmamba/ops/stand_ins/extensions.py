"""The functions of the compiled extensions below ``mamba_ssm``, ``causal_conv1d`` and VMamba's kernels.

The extensions are ``selective_scan_cuda``, ``selective_scan_cuda_core``, ``selective_scan_cuda_oflex`` and
``causal_conv1d_cuda``. Arguments are given by position only, as there. A backward function computes the forward pass
once more, so that what a forward function saves for it is not read.
"""
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.ops import selective_scan
from mmlocalmamba.ops.dispatch import compute_dtype
from mmlocalmamba.ops.stand_ins.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, with_history

# Steps of a chunk, whose last states the CUDA kernels save.
_CHUNK = 2048
_OptionalTensors = Sequence[Tensor | None]


def _gradients(function: Callable[..., Any], inputs: _OptionalTensors, grads: _OptionalTensors) -> list[Tensor | None]:
    """Return the gradients of the inputs, None for those that are None, from those of the function's outputs."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs, )
        pairs = [(y, grad.to(y.dtype)) for y, grad in zip(outputs, grads, strict=True) if grad is not None]
        found = iter(torch.autograd.grad([y for y, _ in pairs], [x for x in leaves if x is not None],
                                         [grad for _, grad in pairs], materialize_grads=True))
    return [None if x is None else next(found) for x in leaves]


def _saved_states(A: Tensor, last: Tensor, length: int) -> Tensor:
    """Return (B, D, chunks, 2 N) as the CUDA kernels save it, with the last states in its only part that is read."""
    batch, width, N = last.shape
    saved = last.new_zeros(batch, width, max(1, math.ceil(length / _CHUNK)), 2 * N, dtype=A.dtype)
    saved[:, :, -1, 1::2] = last
    return saved


# ---- selective_scan_cuda: mamba_ssm ----

def _scan_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                  delta_bias: Tensor | None, delta_softplus: bool, /) -> list[Tensor]:
    """Run a selective scan: u, delta, z (B, D, L), B and C (B, G, N, L) or (D, N).

    Returns:
        The outputs before the gate (B, D, L), saved states (B, D, chunks, 2 N), whose [:, :, -1, 1::2] are the last
        states, and with z the outputs after the gate.
    """
    out: Any
    out, last = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state=True)
    gated = [] if z is None else [(out * F.silu(z.to(compute_dtype(z)))).to(u.dtype)]
    return [out, _saved_states(A, last, u.shape[-1]), *gated]


def _scan_backward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, dout: Tensor, x: Tensor | None, out: Tensor | None, dz: Tensor | None,
                   delta_softplus: bool, recompute_out_z: bool, /) -> list[Tensor | None]:
    """Return the gradients of u, delta, A, B, C, D and delta_bias; with z its gradient, which is written to ``dz`` if
    that is given; with ``recompute_out_z`` the outputs after the gate."""
    more: list[Tensor | None] = []
    if z is not None:
        if out is None:
            raise ValueError('out must be given with z')
        gate, wide = z.to(compute_dtype(z)), dout.to(compute_dtype(z))
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        grad = (wide * out * (sigmoid + silu * (1 - sigmoid))).to(z.dtype)
        more = [grad if dz is None else dz.copy_(grad)]
        if recompute_out_z:
            more.append((out * silu).to(out.dtype))
        dout = (wide * silu).to(dout.dtype)

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
             delta_bias: Tensor | None) -> Any:
        return selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)

    return [*_gradients(scan, (u, delta, A, B, C, D, delta_bias), [dout]), *more]


# ---- selective_scan_cuda_core, selective_scan_cuda_oflex: VMamba ----

def _groups_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                 delta_bias: Tensor | None, delta_softplus: bool, last: bool = False) -> Any:
    """:func:`selective_scan`; the step sizes (B, D / r, L) may serve r consecutive channels each."""
    repeats = u.shape[1] // delta.shape[1]
    if repeats > 1:
        delta = delta.repeat_interleave(repeats, dim=1)
        delta_bias = None if delta_bias is None else delta_bias.repeat_interleave(repeats)
    return selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state=last)


def _core_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                  delta_bias: Tensor | None, delta_softplus: bool, nrows: int, /) -> list[Tensor]:
    """Run a selective scan, and return its outputs (B, D, L) and saved states; ``nrows`` is not used."""
    return _oflex_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, False)


def _oflex_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, nrows: int, out_float: bool, /) -> list[Tensor]:
    """:func:`_core_forward`; with ``out_float`` the outputs have 32 bits at least."""
    wide = u.to(compute_dtype(u)) if out_float else u
    out, last = _groups_scan(wide, delta, A, B, C, D, delta_bias, delta_softplus, last=True)
    return [out, _saved_states(A, last, u.shape[-1])]


def _core_backward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                   delta_bias: Tensor | None, dout: Tensor, x: Tensor | None, delta_softplus: bool, nrows: int,
                   /) -> list[Tensor | None]:
    """Return the gradients of u, delta, A, B, C, D and delta_bias."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
             delta_bias: Tensor | None) -> Any:
        wide = u.to(torch.promote_types(u.dtype, dout.dtype))  # gradients of 32-bit outputs have 32 bits
        return _groups_scan(wide, delta, A, B, C, D, delta_bias, delta_softplus)

    return _gradients(scan, (u, delta, A, B, C, D, delta_bias), [dout])


# ---- causal_conv1d_cuda ----

def _activation(silu: bool) -> str | None:
    return 'silu' if silu else None


def _wrong_number(name: str, args: Sequence[Any]) -> TypeError:
    return TypeError(f'causal_conv1d_cuda.{name} of causal_conv1d 1.0 to 1.7 takes no {len(args)} arguments')


def _conv_forward(*args: Any) -> Tensor | None:
    """Convolve as :func:`causal_conv1d_fn`, with the arguments of causal_conv1d 1.0 (4), 1.1 (5), 1.2 to 1.5 (7) or
    later (8): x, weight, bias, [seq_idx, [initial_states, [out,] final_states_out,]] silu_activation.

    Returns:
        (B, D, L), or None if it is written to ``out``.
    """
    seq_idx = initial = out = final = None
    x, weight, bias, *middle, silu = args
    if len(args) == 5:
        seq_idx, = middle
    elif len(args) == 7:
        seq_idx, initial, final = middle
    elif len(args) == 8:
        seq_idx, initial, out, final = middle
    elif len(args) != 4:
        raise _wrong_number('causal_conv1d_fwd', args)
    y: Any = causal_conv1d_fn(x, weight, bias, seq_idx, initial, final is not None, final, _activation(silu))
    y = y if final is None else y[0]
    if out is None:
        return y
    out.copy_(y)
    return None


def _conv_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, seq_idx: Tensor | None,
                    initial: Tensor | None, dfinal: Tensor | None, silu: bool) -> list[Tensor | None]:
    """Return the gradients of x, weight, bias and initial states. There is no autograd in causal_conv1d's operators."""
    compute, (width, L) = torch.promote_types(compute_dtype(x), weight.dtype), (weight.shape[1], x.shape[-1])
    whole, grad, taps = with_history(x, width, initial).to(compute), dout.to(compute), weight.to(compute)[..., None]
    windows = [whole[..., tap:tap + L] for tap in range(width)]
    same: list[Any] = [1] * width
    if seq_idx is not None:
        numbers = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=-1)
        same = [(numbers[:, tap:tap + L] == seq_idx)[:, None] for tap in range(width)]
        windows = [window * mask for window, mask in zip(windows, same, strict=True)]
        grad = grad.masked_fill((seq_idx < 0)[:, None], 0)
    if silu:
        y = sum(taps[:, tap] * window for tap, window in enumerate(windows))
        y = y if bias is None else y + bias.to(compute)[:, None]
        sigmoid = y.sigmoid()
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    dwhole = torch.zeros_like(whole)
    for tap in range(width):
        dwhole[..., tap:tap + L] += taps[:, tap] * grad * same[tap]
    if dfinal is not None:
        dwhole[..., L:] += dfinal
    dweight = torch.stack([(grad * window).sum((0, 2)) for window in windows], dim=-1).to(weight.dtype)
    return [dwhole[..., width - 1:].to(x.dtype), dweight, None if bias is None else grad.sum((0, 2)).to(bias.dtype),
            None if initial is None else dwhole[..., :width - 1].to(initial.dtype)]


def _conv_backward(*args: Any) -> list[Tensor | None] | None:
    """Return the gradients of x, weight and bias, in the versions of :func:`_conv_forward` with 7 and 8 arguments also
    of the initial states. The arguments are x, weight, bias, dout and 6 (1.0), 7 (1.1), 10 or 12 in all; a gradient of
    x is written to ``dx`` if that is given. With 12, all gradients are written to arguments, and None is returned.
    """
    x, weight, bias, dout, *middle, silu = args
    seq_idx = initial = dfinal = dx = None
    wanted = False
    written: tuple[Tensor | None, ...] = ()
    if len(args) == 6:
        dx, = middle
    elif len(args) == 7:
        seq_idx, dx = middle
    elif len(args) == 10:
        seq_idx, initial, dfinal, dx, wanted = middle
    elif len(args) == 12:
        seq_idx, initial, dfinal, dx, *rest = middle
        written = tuple(rest)
    else:
        raise _wrong_number('causal_conv1d_bwd', args)

    grads = _conv_gradients(x, weight, bias, dout, seq_idx, initial, dfinal, silu)
    if dx is not None and grads[0] is not None:
        grads[0] = dx.copy_(grads[0])
    if len(args) == 12:
        for target, grad in zip(written, grads[1:], strict=True):
            if target is not None and grad is not None:
                target.copy_(grad)
        return None
    if len(args) < 10:
        return grads[:3]
    return grads if wanted else [*grads[:3], None]


def _conv_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor | None:
    """Compute :func:`causal_conv1d_update`: x, conv_state, weight, bias and silu_activation (1.0), cache_seqlens (1.2),
    conv_state_indices; from 1.6 on, the output is the argument before silu_activation, and None is returned."""
    out = None
    if isinstance(rest[0], Tensor):
        out, *rest = rest  # type: ignore[assignment]
    if not 1 <= len(rest) <= 3:
        raise _wrong_number('causal_conv1d_update', (x, conv_state, weight, bias, *rest))
    silu, *places = rest
    y = causal_conv1d_update(x, conv_state, weight, bias, _activation(silu), *places)
    if out is None:
        return y
    out.copy_(y)
    return None


# ---- causal_conv1d.cpp_functions: causal_conv1d 1.6 and later ----

def causal_conv1d_fwd_function(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None,
                               initial_states: Tensor | None, final_states_out: Tensor | None,
                               silu_activation: bool) -> Tensor:
    """Convolve as :func:`causal_conv1d_fn`, without a gradient."""
    with torch.no_grad():
        y: Any = _conv_forward(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)
    return y


def causal_conv1d_bwd_function(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, seq_idx: Tensor | None,
                               initial_states: Tensor | None, dfinal_states: Tensor | None, dx: Tensor | None,
                               return_dinitial_states: bool, silu_activation: bool) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and the initial states; x's is written to ``dx`` if that is given."""
    grads: Any = _conv_backward(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
                                return_dinitial_states, silu_activation)
    return tuple(grads)


def causal_conv1d_update_function(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None,
                                  silu_activation: bool, cache_seqlens: Tensor | None,
                                  conv_state_indices: Tensor | None) -> Tensor:
    """Compute :func:`causal_conv1d_update`."""
    y: Any = _conv_update(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices)
    return y


selective_scan_cuda = SimpleNamespace(fwd=_scan_forward, bwd=_scan_backward)
selective_scan_cuda_core = SimpleNamespace(fwd=_core_forward, bwd=_core_backward)
selective_scan_cuda_oflex = SimpleNamespace(fwd=_oflex_forward, bwd=_core_backward)
causal_conv1d_cuda = SimpleNamespace(causal_conv1d_fwd=_conv_forward, causal_conv1d_bwd=_conv_backward,
                                     causal_conv1d_update=_conv_update)
