"""The selective scan in chunks, in plain PyTorch: it runs and trains on any device and needs no compiler.

The launches of L tiny kernels limit a step-by-step loop over L tokens. Here the sequence is cut into chunks that
advance together: one loop over the steps of a chunk computes what each chunk adds to the state (start state zero), one
short loop over the chunks carries the states along, and a second loop over the steps computes the outputs. The backward
pass recomputes the states block by block, so it uses far less memory than the (B, K, L, D, N) of a parallel scan.

The layout is step-major, (steps, G, chunks, N, D) with G = B * K sequences. D is innermost, so every operation is one
contiguous sweep.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import Backend, ScanInputs, without_autocast
from mmlocalmamba.ops.library import one_by_one, refuse_second_derivative, refuse_tangent
from mmlocalmamba.ops.scan_order import from_scan_order, real_output, step_size, to_scan_order

# State elements of one step: enough to hide the cost of launching an operation, few enough to stay in cache.
_STEP_ELEMENTS = 1 << 17
# State elements that the backward pass may hold at a time (times three buffers of 4 bytes).
_BLOCK_ELEMENTS = 1 << 22
_MIN_STEPS = 8


def _chunk_steps(G: int, T: int, D: int, N: int) -> int:
    """Return the steps per chunk with which all chunks together have about _STEP_ELEMENTS state elements a step."""
    chunks = max(1, min(_STEP_ELEMENTS // max(1, G * D * N), T // _MIN_STEPS, int(T ** 0.5)))
    return max(1, -(-T // chunks))


def _split(x: Tensor, steps: int) -> Tensor:
    """(G, T, F) -> (steps, G, chunks, F), with zeros after T. A step of size 0 keeps the state unchanged."""
    G, T, F = x.shape
    chunks = max(1, -(-T // steps))
    x = torch.nn.functional.pad(x, (0, 0, 0, chunks * steps - T))
    return x.view(G, chunks, steps, F).permute(2, 0, 1, 3).contiguous()


def _join(x: Tensor, T: int) -> Tensor:
    """Inverse of :func:`_split`."""
    steps, G, chunks, F = x.shape
    return x.permute(1, 2, 0, 3).reshape(G, chunks * steps, F)[:, :T]


def _decay(dt: Tensor, A: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(dt A): dt (..., G, chunks, D), A (G, N, D) -> (..., G, chunks, N, D)."""
    return torch.mul(dt[..., None, :], A[:, None], out=out).exp_()


def _carry(local: Tensor, decay: Tensor, reverse: bool = False) -> Tensor:
    """Return the state that enters each chunk from what each chunk adds and its decay; all (G, chunks, N, D)."""
    enter = torch.zeros_like(local)
    order = range(local.shape[1] - 1)
    for j in (reversed(order) if reverse else order):
        here, there = (j + 1, j) if reverse else (j, j + 1)
        # Not addcmul(out=): torch.compile (2.11) cannot trace out= with a tensor that is not contiguous.
        enter[:, there].copy_(local[:, here]).addcmul_(decay[:, here], enter[:, here])
    return enter


def _enter_states(dt: Tensor, dtu: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return the state at the start of every chunk (G, chunks, N, D)."""
    shape = (*dt.shape[1:3], A.shape[1], A.shape[2])
    if shape[1] == 1:
        return A.new_zeros(shape)
    h, a = A.new_zeros(shape), A.new_empty(shape)
    for t in range(dt.shape[0]):
        h.mul_(_decay(dt[t], A, out=a)).addcmul_(dtu[t][:, :, None], B[t][..., None])
    return _carry(h, _decay(dt.sum(0), A))


def _blocks(G: int, D: int, T: int, N: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of sequences and channels whose states over all T steps fit in _BLOCK_ELEMENTS."""
    channels = max(1, min(D, _BLOCK_ELEMENTS // (T * N)))
    groups = max(1, _BLOCK_ELEMENTS // (T * N * channels))
    for g in range(0, G, groups):
        for d in range(0, D, channels):
            yield slice(g, g + groups), slice(d, d + channels)


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _outputs(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """u, dt (B, K, T, D), A (K, D, N), B, C (B, K, T, N) in scan order -> y (B, K, T, D), last state (B, K, D, N).

    With complex A, B and C, y and the state are complex.
    """
    batch, K, T, D = u.shape
    N, G = A.shape[-1], batch * K
    steps = _chunk_steps(G, T, D, N)
    # If all sequences are too many for one step, they run in blocks.
    groups = max(1, _STEP_ELEMENTS // max(1, -(-T // steps) * D * N))
    u, dt, B, C = (x.flatten(0, 1) for x in (u, dt, B, C))
    A = A.transpose(1, 2).repeat(batch, 1, 1)
    y = A.new_empty(G, T, D)
    last = A.new_empty(G, D, N)
    for first in range(0, G, groups):
        g = slice(first, first + groups)
        dts, Bs, Cs = (_split(x[g], steps) for x in (dt, B, C))
        dtu = _split(dt[g] * u[g], steps)
        h = _enter_states(dts, dtu, A[g], Bs)
        a, ys = torch.empty_like(h), h.new_empty(dts.shape)
        for t in range(steps):
            h.mul_(_decay(dts[t], A[g], out=a)).addcmul_(dtu[t][:, :, None], Bs[t][..., None])
            torch.sum(torch.mul(h, Cs[t][..., None], out=a), dim=2, out=ys[t])
        y[g] = _join(ys, T)
        last[g] = h[:, -1].transpose(1, 2)
    return y.view(batch, K, T, D), last.view(batch, K, D, N)


def _gradients(dy: Tensor, dlast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
               ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the inputs of :func:`_outputs`: conjugates of the derivatives, as autograd has them."""
    (batch, K, T, D), N = u.shape, A.shape[-1]
    G = batch * K
    steps = _chunk_steps(G, T, D, N)
    u, dt, B, C, dy = (x.flatten(0, 1) for x in (u, dt, B, C, dy))
    A = A.transpose(1, 2).repeat(batch, 1, 1)
    dlast = dlast.flatten(0, 1).transpose(1, 2)
    du, ddt = torch.empty_like(u), torch.empty_like(u)
    dA = torch.empty_like(A)
    dB, dC = torch.zeros_like(B), torch.zeros_like(C)
    for g, d in _blocks(G, D, max(1, -(-T // steps)) * steps, N):
        dts, us, dys = (_split(x[g, :, d], steps) for x in (dt, u, dy))
        Bs, Cs = _split(B[g], steps), _split(C[g], steps)
        Ad, dtu = A[g, :, d], (dts * us).to(A.dtype)
        a = _decay(dts, Ad)
        total = _decay(dts.sum(0), Ad).conj()
        # h[t] is the state before step t, h[t + 1] the state after it.
        h = a.new_empty(steps + 1, *a.shape[1:])
        h[0] = _enter_states(dts, dtu, Ad, Bs)
        for t in range(steps):
            torch.mul(h[t], a[t], out=h[t + 1]).addcmul_(dtu[t][:, :, None], Bs[t][..., None])
        dC[g] += _join(torch.einsum('sgcnd,sgcd->sgcn', h[1:].conj(), dys), T)
        a, Cs = a.conj(), Cs.conj()
        # dh[t] is the gradient of the state after step t. The gradient that enters a chunk comes from later chunks and
        # is computed like the states: first each chunk alone, then the carry, then each chunk again.
        dh = torch.empty_like(a)
        enter = torch.zeros_like(total)
        enter[:, -1] = dlast[g, :, d]
        for final in ((True, ) if enter.shape[1] == 1 else (False, True)):
            torch.mul(Cs[-1][..., None], dys[-1][:, :, None], out=dh[-1])
            dh[-1] += enter
            for t in range(steps - 2, -1, -1):
                torch.mul(dh[t + 1], a[t + 1], out=dh[t]).addcmul_(Cs[t][..., None], dys[t][:, :, None])
            if not final:
                local = dh[0] * a[0]
                carried = _carry(local, total, reverse=True)
                carried[:, -1] = enter[:, -1]
                enter = carried
        dB[g] += _join(torch.einsum('sgcnd,sgcd->sgcn', dh, dtu), T)
        ddtu = _real(torch.einsum('sgcnd,sgcn->sgcd', dh, Bs.conj()))
        da = dh.mul_(h[:-1].conj()).mul_(a)
        # einsum would copy the whole block into another order. The products reuse the buffer of h.
        h = h[:-1]
        ddt[g, :, d] = _join(_real(torch.mul(da, Ad[:, None].conj(), out=h).sum(3)).addcmul_(ddtu, us), T)
        dA[g, :, d] = torch.mul(da, dts[..., None, :], out=h).sum((0, 2))
        du[g, :, d] = _join(ddtu.mul_(dts), T)
    dA = dA.view(batch, K, N, D).sum(0).transpose(1, 2)
    shape = (batch, K, T)
    return du.view(*shape, D), ddt.view(*shape, D), dA, dB.view(*shape, N), dC.view(*shape, N)


class _ScanBackward(torch.autograd.Function):

    @staticmethod
    def forward(*tensors):
        # backward may be called under autocast, which would compute products in 16 bits.
        with without_autocast(tensors[0]):
            return _gradients(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(refuse_second_derivative)
    vmap = staticmethod(one_by_one(lambda *args: _ScanBackward.apply(*args)))


class _Scan(torch.autograd.Function):
    """The scan in eager code. Counters of FLOPs find it by this name."""

    @staticmethod
    def forward(*tensors):
        return _outputs(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy, dlast):
        return _ScanBackward.apply(dy, dlast, *ctx.saved_tensors)

    jvp = staticmethod(refuse_tangent)
    vmap = staticmethod(one_by_one(lambda *args: _Scan.apply(*args)))


class _CompiledScan(torch.autograd.Function):
    """The scan for torch.compile (2.11).

    It cannot trace an autograd function with ``jvp`` or ``vmap``, nor one with ``setup_context`` without gradients.
    """

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return _outputs(*tensors)

    @staticmethod
    def backward(ctx, dy, dlast):
        return _ScanBackward.forward(dy, dlast, *ctx.saved_tensors)


class ChunkedBackend(Backend):
    name = 'chunked'
    complex_states = True

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        u, delta, B, C, D = inputs.u, inputs.delta, inputs.B, inputs.C, inputs.D
        if not inputs.in_scan_order:
            u, delta, B, C = (to_scan_order(x, inputs.src, inputs.inv) for x in (u, delta, B, C))
        function = _CompiledScan if torch.compiler.is_compiling() else _Scan
        y, last = function.apply(u, step_size(delta, inputs.delta_bias, inputs.delta_softplus), inputs.A, B, C)
        y = real_output(y)
        if D is not None:
            y = torch.addcmul(y, D[:, None], u)
        return (y if inputs.inv is None else from_scan_order(y, inputs.src, inputs.inv)), last


BACKEND = ChunkedBackend()
