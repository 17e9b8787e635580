"""The host side of the Triton kernels: it checks arguments, allocates memory and launches kernels.py."""
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mmlocalmamba.directions import ScanTables
from mmlocalmamba.ops import library
from mmlocalmamba.ops.backends.triton import tuning
from mmlocalmamba.ops.dispatch import Backend, ScanInputs

# Constants of the module: torch.compile traces the functions that choose a backend.
_INSTALLED = find_spec('triton') is not None
_INTERPRETING = os.environ.get('TRITON_INTERPRET', '0').lower() in ('1', 'true', 'on', 'yes')

_OLDEST_TRITON = (3, 3)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# State elements that a thread can hold. Programs with more states take fewer channels.
_STATES = dict(forward=32, backward=16)
# Programs of the backward pass in one launch: several times as many as run at once. The number is limited because each
# program has its own memory for the states of a chunk.
_BACKWARD_PROGRAMS = 8192
# Up to this rank the scan kernels multiply step sizes themselves; above it a kernel of its own does it before.
_MAX_RANK = 16
# A segment has at least so many chunks, so that the carry along segments is short in comparison.
_MIN_CHUNKS = 2
# Rows and channels of a program of scan_pack and of step_sizes.
_PACK = dict(BLOCK_T=64, num_warps=4)
_STEP_SIZES = dict(BLOCK_T=64, BLOCK_D=64, BLOCK_R=16, num_warps=4)
# Triton 3.10 has another default. Without fused multiply-adds the kernels need more instructions.
_OPTIONS = dict(enable_fp_fusion=True)


@cache
def _kernels():
    if _INTERPRETING:
        _repair_interpreter()
    return import_module('mmlocalmamba.ops.backends.triton.kernels')


def _repair_interpreter() -> None:
    """Let Triton's interpreter run with numpy >= 2.4, which does not convert arrays of one element to integers."""
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):  # without a scope before Triton 3.6
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, '__index__', lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


@cache
def _triton_problem() -> str | None:
    """Return the reason why the installed Triton cannot compile the kernels, or None."""
    try:
        import triton
    except Exception as error:  # a library that it links to may be missing
        return f'triton cannot be imported: {type(error).__name__}: {error}'
    if tuple(map(int, re.findall(r'\d+', triton.__version__)[:2])) < _OLDEST_TRITON:
        return (f'it needs triton >= {".".join(map(str, _OLDEST_TRITON))}, which torch >= 2.7 brings; '
                f'triton {triton.__version__} does not compile its kernels')
    return None


@torch.compiler.assume_constant_result
def _too_old(device: torch.device) -> str | None:
    if not (torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)):
        return 'it needs a GPU of compute capability 8.0 or later'
    return _triton_problem()


def _power(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


def _empty(*shape: int, **options) -> Tensor:
    """Allocate memory that kernels write. Tests replace it to fill the memory with NaN."""
    return torch.empty(shape, **options)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def _segment(sequences: int, blocks: int, steps: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Return the number of segments, and the steps in each: a multiple of CHUNK.

    There is one program for each block of channels of each sequence. If these are more than half of the ``programs``
    that keep each multiprocessor busy, there is one segment: with more, every exponential is computed twice.
    """
    wanted = programs * _multiprocessors(device) // max(1, sequences * blocks)
    chunks = -(-steps // library.CHUNK)
    segments = max(1, min(wanted, chunks // _MIN_CHUNKS))
    length = -(-chunks // segments) * library.CHUNK
    return max(1, -(-steps // length)), max(library.CHUNK, length)


def _registers(choice: tuning.Choice, states: int) -> dict[str, int]:
    """Return the option that keeps a thread's registers so few that the planned programs run at once.

    A multiprocessor has four parts of 16384 registers, and a warp's come from one part. ``states``: those of a thread.
    With more than 16, the limit would cost more than it gains.
    """
    limit = 16384 // (32 * -(-choice.programs * choice.warps // 4)) // 8 * 8
    return {} if torch.version.hip or limit > 255 or states > 16 else dict(maxnreg=limit)


def _check_table(src: Tensor | None, K: int, device: torch.device) -> None:
    """Check dtype, shape and device of a table. Checking its values would make the CPU wait for the GPU."""
    if src is not None and (src.dtype != torch.int32 or src.dim() != 2 or src.shape[0] != K or src.device != device):
        raise ValueError(f'src must be an int32 table of {K} rows on {device}, got {src.dtype} '
                         f'{tuple(src.shape)} on {src.device}')


class _Problem:
    """The checked arguments of a scan, and the arguments of the kernels that follow from them.

    ``kernel``: 'forward' or 'backward'; ``grad_y``: the gradient of y. The others are the arguments of the operator
    ``directional_scan``.
    """

    def __init__(self, kernel, *, u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus,
                 in_scan_order, grad_y=None):
        self.batch, self.K, self.rows = delta.shape[:3]
        self.channels, self.N = A.shape[1:]
        self.R = 0 if dt_weight is None else dt_weight.shape[-1]
        shared = u.dim() == 3
        batch, K, rows, N = self.batch, self.K, self.rows, self.N
        shapes = dict(u=(batch, rows, self.channels) if shared else (batch, K, rows, self.channels),
                      delta=(batch, K, rows, self.R or self.channels), A=(K, self.channels, N), B=(batch, K, rows, N),
                      C=(batch, K, rows, N), D=(K, self.channels), delta_bias=(K, self.channels),
                      dt_weight=(K, self.channels, self.R))
        tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias, dt_weight=dt_weight)
        for name, x in tensors.items():
            if x is None:
                continue
            if tuple(x.shape) != shapes[name]:
                raise ValueError(f'{name} must have shape {shapes[name]}, got {tuple(x.shape)}')
            if x.dtype not in _DTYPES:
                raise TypeError(f'{name} must be float32, bfloat16 or float16, got {x.dtype}')
            if x.device != u.device:
                raise ValueError(f'{name} must be on {u.device} like u, got {x.device}')
        _check_table(src, K, u.device)
        self.steps = rows if src is None else src.shape[1]
        if (self.steps if in_scan_order else tokens) != rows or (src is None and tokens != rows):
            raise ValueError(f'delta has {rows} rows for {self.steps} steps and {tokens} tokens')
        # Channels are lanes of a warp, so they must be contiguous.
        self.u, self.delta, self.B, self.C = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, delta, B, C))
        self.grad_y = grad_y if grad_y is None or grad_y.stride(-1) == 1 else grad_y.contiguous()
        self.A = A.float().transpose(1, 2).contiguous()
        # A missing tensor is never read, but Triton still needs a pointer.
        self.D, self.bias, self.weight, self.src = (
            self.A if x is None else x.contiguous()
            for x in (D, delta_bias, None if dt_weight is None else dt_weight.transpose(1, 2), src))
        self.block_N = _power(N)
        choice = tuning.choose(kernel, u.device, self.block_N, u.dtype)
        self.warps = choice.warps
        self.block_D = min(choice.channels, _power(self.channels),
                           max(1, 32 * self.warps * _STATES[kernel] // self.block_N))
        self.blocks = -(-self.channels // self.block_D)
        self.grid = (self.blocks * batch * K, )
        self.has_D = D is not None
        self.empty = self.channels * self.N * self.steps * self.batch * self.K == 0
        # From here on, R is the rank that the scan kernels multiply; 0: step sizes are given in full.
        if self.R > _MAX_RANK:
            self.delta, self.R = self.full_step_sizes(), 0
        block_R = _power(self.R)
        # Rows of ``packed`` are read 16 bytes at a time.
        packed_R = max(4, block_R) if self.R else 0
        self.width = -(-(packed_R + 2 * self.block_N) // 4) * 4
        self.sizes = dict(N=N, R=self.R, BLOCK_N=self.block_N, PACKED_R=packed_R, WIDTH=self.width, **_OPTIONS)
        strides = [x.stride(-2) for x in (self.u, self.delta, self.grad_y) if x is not None]
        wide = rows * max(self.width, self.channels, *strides) >= 2 ** 31
        self.flags = dict(HAS_BIAS=delta_bias is not None, HAS_SRC=src is not None, IN_ORDER=in_scan_order,
                          SOFTPLUS=delta_softplus, WIDE=wide, BLOCK_D=self.block_D, BLOCK_R=block_R,
                          GROUP=choice.group, num_warps=self.warps,
                          **_registers(choice, self.block_D * self.block_N // (32 * self.warps)))
        self.packed = self.pack()
        # The scan kernels read delta only if step sizes are given in full.
        self.delta_and_strides = (self.packed, (0, 0, 0)) if self.R else (self.delta, self.strides(self.delta))
        self.segments, self.segment = _segment(batch * K, self.blocks, self.steps, choice.programs, u.device)

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Return the strides of batch, direction (0: shared) and row."""
        return (x.stride(0), 0 if x.dim() == 3 else x.stride(1), x.stride(-2))

    def partial(self, *shape: int) -> Tensor:
        return _empty(*shape, dtype=torch.float32, device=self.u.device)

    def full_step_sizes(self) -> Tensor:
        """Return delta (batch, K, rows, channels), in float32, from its low-rank factor."""
        full = self.partial(self.batch, self.K, self.rows, self.channels)
        if not self.empty:
            grid = (self.batch * self.K, -(-self.rows // _STEP_SIZES['BLOCK_T']),
                    -(-self.channels // _STEP_SIZES['BLOCK_D']))
            with _on(self.u.device):
                _kernels().step_sizes[grid](self.delta, self.weight, full, self.K, self.rows, self.channels,
                                            *self.strides(self.delta), R=self.R, **_STEP_SIZES, **_OPTIONS)
        return full

    def pack(self) -> Tensor:
        """Return what the channels of a step share, (sequences, 1 + rows, width): see kernels.py."""
        packed = self.partial(self.batch * self.K, 1 + self.rows, self.width)
        if not self.empty:
            grid = (self.batch * self.K, -(-(1 + self.rows) // _PACK['BLOCK_T']))
            with _on(self.u.device):
                _kernels().scan_pack[grid](
                    self.delta if self.R else packed, self.B, self.C, packed, self.K, self.rows,
                    *self.strides(self.delta), *self.strides(self.B), *self.strides(self.C), **self.sizes, **_PACK)
        return packed

    def entering(self, grad_y: Tensor | None, leave: Tensor | None) -> Tensor:
        """Return the states that enter the segments from before, (sequences, segments, N, D).

        With ``grad_y``, return the gradients of the states that enter from after; ``leave`` enters the last segment.
        """
        reverse = grad_y is not None
        grad_y = self.u if grad_y is None else grad_y
        states = self.partial(self.batch * self.K, self.segments, self.N, self.channels)
        sizes = self.partial(self.batch * self.K, self.segments, self.channels)
        grid = (*self.grid, self.segments)
        delta, delta_strides = self.delta_and_strides
        _kernels().scan_local[grid](
            self.u, delta, self.packed, self.A, grad_y, self.src, self.bias, self.weight, states, sizes,
            self.K, self.rows, self.steps, self.channels, self.segment, 0,
            *self.strides(self.u), *delta_strides, *self.strides(grad_y), REVERSE=reverse, **self.sizes,
            **self.flags)
        _kernels().scan_carry[self.grid](
            states, sizes, self.A, states if leave is None else leave, self.K, self.channels, self.segments, 0,
            N=self.N, BLOCK_D=self.block_D, BLOCK_N=self.block_N, REVERSE=reverse, HAS_LEAVE=leave is not None,
            num_warps=self.warps, **_OPTIONS)
        return states


def _on(device: torch.device):
    """Return a context in which this device is the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == 'cuda' else nullcontext()


def _forward(*, save: bool, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = _Problem('forward', **inputs)
    u, tokens = inputs['u'], inputs['tokens']
    y = _empty(p.batch, p.K, tokens, p.channels, dtype=u.dtype, device=u.device)
    last = p.partial(p.batch, p.K, p.N, p.channels)
    checkpoints = p.partial(p.batch, p.K, max(0, (p.steps - 1) // library.CHUNK) if save else 0, p.N, p.channels)
    if p.empty:
        return y.zero_(), last.zero_(), checkpoints.zero_()
    with _on(u.device):
        segmented = p.segments > 1
        enter = p.entering(None, None) if segmented else last
        grid = (*p.grid, p.segments)
        delta, delta_strides = p.delta_and_strides
        _kernels().scan_forward[grid](
            p.u, delta, p.packed, p.A, p.D, p.src, p.bias, p.weight, enter, y, last, checkpoints,
            p.K, p.rows, p.steps, tokens, p.channels, p.segment, 0, *p.strides(p.u), *delta_strides,
            CHUNK=library.CHUNK, HAS_D=p.has_D, SAVE=save, SEGMENTED=segmented, **p.sizes, **p.flags)
    return y, last, checkpoints


def _backward(*, grad_y: Tensor | None, grad_last: Tensor | None, checkpoints: Tensor, wanted: list[bool],
              **inputs: Any) -> tuple[Tensor, ...]:
    p = _Problem('backward', grad_y=grad_y, **inputs)
    grad_y = p.grad_y
    u, delta, A, B, C = (inputs[name] for name in ('u', 'delta', 'A', 'B', 'C'))
    tokens = inputs['tokens']
    batch, K, rows, channels, N = p.batch, p.K, p.rows, p.channels, p.N
    want_u, want_delta, want_A = wanted[:3]
    want_vectors = any(wanted[3:5])  # B or C
    # Unwanted gradients are not written, but Triton still needs a pointer.
    nothing = p.A
    grad_u = _empty(batch, K, rows, channels, dtype=u.dtype, device=u.device) if want_u else nothing
    grad_delta = nothing
    if want_delta and inputs['dt_weight'] is None:
        grad_delta = _empty(batch, K, rows, channels, dtype=delta.dtype, device=u.device)
    elif want_delta:  # as declared in library.py: contiguous for each direction, for the products that follow
        grad_delta = _empty(K, batch, rows, channels, dtype=delta.dtype, device=u.device).transpose(0, 1)
    grad_A = p.partial(p.segments, batch, K, N, channels) if want_A else nothing
    grad_B, grad_C = (p.partial(p.blocks, batch, K, rows, N) if want_vectors else nothing for _ in range(2))
    grad_D, grad_bias = (p.partial(p.segments, batch, K, channels) for _ in range(2))
    if p.empty:
        for x in (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias):
            if x is not nothing:
                x.zero_()
    else:
        leave = None if grad_last is None else grad_last.float().contiguous()
        sizes = {key: value for key, value in p.sizes.items() if key != 'BLOCK_N'}
        block_N2 = min(4, p.block_N)
        with _on(u.device):
            if p.segments > 1 and grad_y is None:
                grad_y = torch.zeros((), dtype=u.dtype, device=u.device).expand(batch, K, tokens, channels).contiguous()
            if p.segments > 1:
                leave = p.entering(grad_y, leave)
            dy = p.u if grad_y is None else grad_y
            sequences = batch * K
            together = max(1, min(sequences, _BACKWARD_PROGRAMS // (p.blocks * p.segments)))
            starts = p.partial(p.segments * together * p.blocks, library.CHUNK // p.flags['GROUP'],
                               p.block_N * p.block_D)
            checkpoints = checkpoints.contiguous()
            full_delta, delta_strides = p.delta_and_strides
            for first in range(0, sequences, together):
                _kernels().scan_backward[(min(together, sequences - first) * p.blocks, p.segments)](
                    p.u, full_delta, p.packed, p.A, p.D, p.src, p.bias, p.weight, dy, p.A if leave is None else leave,
                    checkpoints, starts, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
                    K, rows, p.steps, channels, p.segment, sequences, first, 1, 0,
                    *p.strides(p.u), *delta_strides, *p.strides(dy), *grad_delta.stride()[:2],
                    BLOCK_N1=p.block_N // block_N2, BLOCK_N2=block_N2, CHUNK=library.CHUNK, HAS_D=p.has_D,
                    HAS_GRAD_Y=grad_y is not None, HAS_LEAVE=leave is not None, WANT_U=want_u, WANT_DELTA=want_delta,
                    WANT_A=want_A, WANT_VECTORS=want_vectors, **sizes, **p.flags)
    results = (lambda: grad_u.sum(1) if u.dim() == 3 else grad_u,
               lambda: grad_delta,
               lambda: grad_A.sum((0, 1)).transpose(1, 2).contiguous().to(A.dtype),
               lambda: grad_B.sum(0).to(B.dtype),
               lambda: grad_C.sum(0).to(C.dtype),
               lambda: grad_D.sum((0, 1)).to(A.dtype),
               lambda: grad_bias.sum((0, 1)).to(A.dtype))
    likes = (u, delta, A, B, C, A, A)
    return tuple(result() if needed else like.new_empty(0)
                 for result, needed, like in zip(results, wanted, likes, strict=True))


# Block sizes of the convolution: steps and channels of a program.
_CONV = dict(BLOCK_T=32, BLOCK_D=64, num_warps=4)


class _Convolution:
    """The checked arguments of a convolution, and the arguments of the kernels that follow from them."""

    def __init__(self, x, weight, bias, src):
        self.batch, self.tokens, self.channels = x.shape
        self.K, _, self.taps = weight.shape
        shapes = dict(weight=(self.K, self.channels, self.taps), bias=(self.K, self.channels))
        for name, tensor in dict(x=x, weight=weight, bias=bias).items():
            if tensor is not None and tuple(tensor.shape) != shapes.get(name, tuple(x.shape)):
                raise ValueError(f'{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}')
            if tensor is not None and tensor.dtype not in _DTYPES:
                raise TypeError(f'{name} must be float32, bfloat16 or float16, got {tensor.dtype}')
        _check_table(src, self.K, x.device)
        self.steps = self.tokens if src is None else src.shape[1]
        self.x = x if x.stride(-1) == 1 else x.contiguous()
        self.weight = weight.transpose(1, 2).contiguous()
        self.bias = self.weight if bias is None else bias.contiguous()
        self.src = self.weight if src is None else src.contiguous()
        self.flags = dict(TAPS=self.taps, **_CONV, **_OPTIONS)
        self.optional = dict(HAS_BIAS=bias is not None, HAS_SRC=src is not None)
        self.empty = self.batch * self.K * self.steps * self.channels == 0

    def grid(self, sequences: int, rows: int) -> tuple[int]:
        return (sequences * -(-rows // _CONV['BLOCK_T']) * -(-self.channels // _CONV['BLOCK_D']), )

    def forward(self, out: Tensor, grad: Tensor | None = None, sums: Tensor | None = None) -> None:
        strides = (0, 0, 0) if grad is None else grad.stride()[:3]
        with _on(self.x.device):
            _kernels().conv_forward[self.grid(self.batch * self.K, self.steps)](
                self.x, self.weight, self.bias, self.src, out, out if grad is None else grad,
                out if sums is None else sums, self.batch, self.K, self.steps, self.channels, *self.x.stride()[:2],
                *strides, BACKWARD=grad is not None, WANT_WEIGHT=sums is not None, **self.optional,
                **self.flags)


def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, src: Tensor | None, inv: Tensor | None) -> Tensor:
    p = _Convolution(x, weight, bias, src)
    out = _empty(p.K, p.batch, p.steps, p.channels, dtype=x.dtype, device=x.device)
    if not p.empty:
        p.forward(out)
    return out.transpose(0, 1)


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, src: Tensor | None,
                   inv: Tensor | None, wanted: list[bool]) -> tuple[Tensor, ...]:
    p = _Convolution(x, weight, bias, src)
    want_x, want_weight, want_bias = wanted
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if p.empty:
        return (torch.zeros_like(x) if want_x else grad_x, torch.zeros_like(weight) if want_weight else grad_weight,
                weight.new_zeros(weight.shape[:2]) if want_bias else grad_bias)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    inner = _empty(p.K, p.batch, p.steps, p.channels, dtype=x.dtype, device=x.device)
    sums = None
    if want_weight or want_bias:
        parts = -(-p.steps // _CONV['BLOCK_T'])
        sums = _empty(parts, p.batch, p.K, p.taps + 1, p.channels, dtype=torch.float32, device=x.device)
    p.forward(inner, grad, sums)
    if want_x:
        if inv is None:  # step t is token t
            inv = torch.arange(p.steps, dtype=torch.int32, device=x.device).expand(p.K, -1)
        grad_x = _empty(p.batch, p.tokens, p.channels, dtype=x.dtype, device=x.device)
        with _on(x.device):
            _kernels().conv_backward[p.grid(p.batch, p.tokens)](
                inner, p.weight, inv.contiguous(), grad_x, p.batch, p.K, p.steps, p.tokens, p.channels, **p.flags)
    if sums is not None:
        sums = sums.sum((0, 1)).to(weight.dtype)
        grad_weight = sums[:, :-1].transpose(1, 2).contiguous() if want_weight else grad_weight
        grad_bias = sums[:, -1].contiguous() if want_bias else grad_bias
    return grad_x, grad_weight, grad_bias


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    'directional_scan': _forward,
    'directional_scan_backward': _backward,
    'directional_conv': _conv_forward,
    'directional_conv_backward': _conv_backward,
}
# On CPU tensors the operators run the native CPU kernels, so the interpreter has operators of its own.
_SUFFIX = '_interpreted'
if _INTERPRETING:
    library.declare_scan_and_conv(_SUFFIX)
for _name, _function in _IMPLEMENTATIONS.items():
    torch.library.impl(f'mmlocalmamba::{_name}', 'CUDA')(library.by_name(_name, _function))
    if _INTERPRETING:
        torch.library.impl(f'mmlocalmamba::{_name}{_SUFFIX}', 'CPU')(library.by_name(_name, _function))


def _suffix(x: Tensor) -> str:
    return _SUFFIX if x.device.type == 'cpu' else ''


class TritonBackend(Backend):
    name = 'triton'
    device_type = 'cuda'
    dtypes = _DTYPES
    mixed_dtypes = True
    low_rank_steps = True

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        return library.run_scan(inputs, _suffix(inputs.u))

    def unavailable(self, u: Tensor) -> str | None:
        if not _INSTALLED:
            return 'triton is not installed'
        if u.dtype not in _DTYPES:
            return f'it computes in float32, and does not take {u.dtype}'
        if u.device.type == 'cpu':
            return None if _INTERPRETING else 'it is for CUDA tensors'
        if u.device.type != 'cuda':
            return f'it is for CUDA tensors, not for {u.device.type}'
        return _too_old(u.device)

    def directional_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, tables: ScanTables) -> Tensor:
        return library.call(f'directional_conv{_suffix(x)}', x, weight, bias, tables.src, tables.inv)


BACKEND = TritonBackend()
