"""What a scan is given, what a backend can do, and which one runs.

The backends stand in :data:`BACKENDS`; :func:`run_scan` and :func:`fused_op` choose among them. Every rule about dtypes
is in this file: what is computed in (:func:`compute_dtype`), what a backend reads as it is (:meth:`Backend.reads`).
Tokens (u, delta, B and C of a scan, features) are read and written as they are stored, in 16 bits where the backend
can; parameters, states and sums have the dtype that is computed in. What has another is converted, in a fused op
parameters alone: tokens that its backend does not read go to plain PyTorch.
"""
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

BACKEND_VARIABLE = 'MMLOCALMAMBA_BACKEND'
# Elements from which a user should know that a scan does not take the fastest backend of its device.
_LARGE = 1 << 16


def compute_dtype(x: Tensor) -> torch.dtype:
    """What is computed in for inputs like x: 16 bits are for storage only."""
    return torch.promote_types(x.dtype, torch.float32)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; not every device has it."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which products keep the dtype of their factors."""
    return torch.autocast(x.device.type, enabled=False) if _has_autocast(x.device.type) else nullcontext()


_Given = TypeVar('_Given', Tensor, Tensor | None)


def _to(x: _Given, dtype: torch.dtype) -> _Given:
    # Exported graphs would keep a conversion that changes nothing.
    return x if x is None or x.dtype == dtype else x.to(dtype)


def expect_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f'{name} must have shape {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}')


def check_dtypes(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.is_complex():
            raise NotImplementedError(f'{name} is complex ({x.dtype}): only A, B and C of a scan can be')
        if x is not None and not x.is_floating_point():
            raise TypeError(f'{name} must be a floating point tensor, got {x.dtype}')


def check_states(A: Tensor, B: Tensor, C: Tensor) -> None:
    """Dtypes of A, B and C."""
    if not A.is_complex():
        check_dtypes(A=A)
    for name, x in (('B', B), ('C', C)):
        if x.is_complex() and not A.is_complex():
            raise TypeError(f'{name} is complex ({x.dtype}), but A is real ({A.dtype}): pass A + 0j')
        if not x.is_complex():
            check_dtypes(**{name: x})


class ScanInputs(NamedTuple):
    """The arguments of :func:`mmlocalmamba.ops.directional_scan`, which explains them; checked once, by
    :meth:`check`. They travel as one object."""
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    src: Tensor | None = None
    inv: Tensor | None = None
    delta_bias: Tensor | None = None
    dt_weight: Tensor | None = None
    delta_softplus: bool = False
    in_scan_order: bool = False

    def tokens(self) -> list[Tensor]:
        return [self.u, self.delta, self.B, self.C]

    def parameters(self) -> list[Tensor]:
        """Those that are there."""
        return [x for x in (self.A, self.D, self.delta_bias, self.dt_weight) if x is not None]

    def tensors(self) -> list[Tensor]:
        """Those that are there, without the tables."""
        return self.tokens() + self.parameters()

    def check(self) -> 'ScanInputs':
        """Itself.

        Raises:
            ValueError: shapes that do not fit.
            TypeError, NotImplementedError: integer tensors; complex ones other than A, B and C; B or C alone complex.
        """
        u, delta, A, B, C, D, src, inv, delta_bias, dt_weight, _, in_scan_order = self
        check_dtypes(u=u, delta=delta, D=D, delta_bias=delta_bias, dt_weight=dt_weight)
        check_states(A, B, C)
        if delta.dim() != 4 or A.dim() != 3:
            raise ValueError(f'delta must be (B, K, L, D) and A (K, D, N), got {tuple(delta.shape)} and '
                             f'{tuple(A.shape)}')
        batch, K, rows, rank = delta.shape
        width, N = A.shape[1:] if dt_weight is not None else (rank, A.shape[-1])
        expect_shape('dt_weight', dt_weight, (K, width, rank), '(K, D, R)')
        expect_shape('A', A, (K, width, N), '(K, D, N)')
        expect_shape('B', B, (batch, K, rows, N), '(B, K, L, N)')
        expect_shape('C', C, (batch, K, rows, N), '(B, K, L, N)')
        expect_shape('D', D, (K, width), '(K, D)')
        expect_shape('delta_bias', delta_bias, (K, width), '(K, D)')
        if in_scan_order or u.dim() != 3:
            expect_shape('u', u, (batch, K, rows, width), '(B, K, L, D)')
        else:
            expect_shape('u', u, (batch, rows, width), '(B, L, D)')
        if src is None or inv is None:
            if not in_scan_order:
                raise ValueError('tables are needed unless in_scan_order=True')
        else:
            if src.shape[0] != K or inv.shape[0] != K:
                raise ValueError(f'tables hold {src.shape[0]} directions, the tensors {K}')
            given = src.shape[1] if in_scan_order else inv.shape[1]
            if given != rows:
                raise ValueError(f'tables are for {given} {"steps" if in_scan_order else "tokens"}, delta holds {rows}')
        return self

    def to(self, dtype: torch.dtype) -> 'ScanInputs':
        """With tokens in this dtype, and parameters in what is computed in for it; A, B and C in the complex one of
        that precision if A is complex."""
        computed = torch.promote_types(dtype, torch.float32)
        state = computed.to_complex() if self.A.is_complex() else computed
        product = state if self.A.is_complex() else dtype
        # Not _replace, which torch.compile of torch 2.8 does not follow.
        return ScanInputs(
            _to(self.u, dtype), _to(self.delta, dtype), _to(self.A, state), _to(self.B, product), _to(self.C, product),
            _to(self.D, computed), self.src, self.inv, _to(self.delta_bias, computed), _to(self.dt_weight, computed),
            self.delta_softplus, self.in_scan_order)

    def with_all_step_sizes(self) -> 'ScanInputs':
        """delta (B, K, L, D) instead of its low-rank factor and ``dt_weight``."""
        if self.dt_weight is None:
            return self
        delta = torch.einsum('bklr,kdr->bkld', self.delta, self.dt_weight.to(self.delta.dtype))
        return ScanInputs(self.u, delta, self.A, self.B, self.C, self.D, self.src, self.inv, self.delta_bias, None,
                          self.delta_softplus, self.in_scan_order)


class Backend(NamedTuple):
    """Ways to compute the ops on some device, and what they can do.

    Attributes:
        name: by which it is chosen.
        scan: :class:`ScanInputs` -> y (B, K, L, D), last states (B, K, D, N), in the dtype that it computes in or in
            u's.
        unavailable: tensor like u -> None, or the reason why it cannot run such tensors.
        home: type of the device that it is chosen on by itself; None: any.
        dtypes: of tokens that it reads, if all have the same; others are converted to :func:`compute_dtype` before, as
            are parameters.
        mixed_dtypes: whether each tensor, parameters too, may have its own of these.
        low_rank_steps: whether its scan takes ``dt_weight``.
        complex_states: whether its scan takes complex A, B and C.
        linear, directional_conv, scattn_sum, add_rms_norm: its fused versions of these ops of
            :mod:`mmlocalmamba.ops.plain`, or None.
    """
    name: str
    scan: Callable[[ScanInputs], tuple[Tensor, Tensor]]
    unavailable: Callable[[Tensor], str | None]
    home: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    mixed_dtypes: bool = False
    low_rank_steps: bool = False
    complex_states: bool = False
    linear: Callable | None = None
    directional_conv: Callable | None = None
    scattn_sum: Callable | None = None
    add_rms_norm: Callable | None = None

    def reads(self, tokens: list[Tensor]) -> bool:
        """Whether it takes these tokens as they are."""
        return all(x.dtype in self.dtypes and (self.mixed_dtypes or x.dtype == tokens[0].dtype) for x in tokens)

    def refuses(self, u: Tensor, complex_states: bool = False) -> str | None:
        """The reason why it cannot run tensors like u, or None."""
        if complex_states and not self.complex_states:
            able = ' and '.join(name for name, backend in BACKENDS.items() if backend.complex_states)
            return f'it takes no complex A, B and C, which {able} do'
        return self.unavailable(u)


# By name, fastest first.
BACKENDS: dict[str, Backend] = {}


def available_backends(u: Tensor) -> dict[str, str | None]:
    """Every backend in the order of preference, with None or the reason why it cannot run tensors like ``u``."""
    return {name: backend.unavailable(u) for name, backend in BACKENDS.items()}


@cache
def _warn_of_slow_scan(name: str, best: str, reason: str) -> None:
    """Once for each reason."""
    warnings.warn(f'the backend {name!r} computes selective scans, many times slower than {best!r} would: {reason}',
                  stacklevel=5)


def choose(u: Tensor, name: str | None = None, complex_states: bool = False) -> Backend:
    """The backend called ``name`` or by the environment variable, or else the fastest that can run tensors like u.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend that was named cannot run here.
    """
    name = name or os.environ.get(BACKEND_VARIABLE) or None
    if name is None:
        at_home = [backend for backend in BACKENDS.values() if backend.home in (None, u.device.type)]
        chosen = next(backend for backend in at_home if backend.refuses(u, complex_states) is None)
        if chosen is not at_home[0] and u.numel() >= _LARGE:
            _warn_of_slow_scan(chosen.name, at_home[0].name, at_home[0].refuses(u, complex_states))
        return chosen
    if name not in BACKENDS:
        raise ValueError(f'unknown backend {name!r}: known are {", ".join(BACKENDS)} '
                         f'(argument backend or environment variable {BACKEND_VARIABLE})')
    reason = BACKENDS[name].refuses(u, complex_states)
    if reason is not None:
        raise RuntimeError(f'backend {name!r} cannot run here: {reason}')
    return BACKENDS[name]


def run_scan(inputs: ScanInputs, name: str | None) -> tuple[Tensor, Tensor]:
    """The scan by the backend of this name, or by the chosen one."""
    backend = choose(inputs.u, name, inputs.A.is_complex())
    # Autocast would take the recurrence to 16 bits.
    with without_autocast(inputs.u):
        if not (backend.mixed_dtypes and backend.reads(inputs.tensors())):
            inputs = inputs.to(inputs.u.dtype if backend.reads(inputs.tokens()) else compute_dtype(inputs.u))
        if not backend.low_rank_steps:
            inputs = inputs.with_all_step_sizes()
        return backend.scan(inputs)


def fused_op(op: str, name: str | None, tokens: list[Tensor | None],
             parameters: list[Tensor | None]) -> tuple[Callable | None, list[Tensor | None]]:
    """The version of an op that the backend of this name, or the chosen one, has for these tokens, and the parameters
    in the dtype that it computes in; None, and the parameters as they are, if plain PyTorch has to do it."""
    given = [x for x in tokens if x is not None]
    backend = choose(given[0], name)
    function = getattr(backend, op)
    if function is None or not backend.reads(given):
        return None, parameters
    dtype = compute_dtype(given[0])
    return function, [_to(x, dtype) for x in parameters]
