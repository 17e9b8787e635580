"""The arguments of a scan, the abilities of a backend, and the choice of the backend that runs.

Backends are registered in :data:`BACKENDS`; :func:`run_scan` and :func:`fused_op` choose among them. All rules about
dtypes are in this file:

- Tokens (u, delta, B and C of a scan; features of a fused op) are read and written in the dtype they are stored in,
  16 bits included, if the backend reads it (:meth:`Backend.reads`).
- Parameters, states and sums have the dtype of the computation, :func:`compute_dtype`.
- A scan converts tokens that its backend does not read. A fused op converts parameters only; tokens that its backend
  does not read are computed by plain PyTorch.
"""
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BACKEND_VARIABLE = 'MMLOCALMAMBA_BACKEND'
# A scan of at least so many elements warns if it does not run on the fastest backend of its device.
_LARGE = 1 << 16


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that inputs like x are computed in: float32 at least, since 16 bits are for storage only."""
    return torch.promote_types(x.dtype, torch.float32)


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocasts(x: Tensor) -> bool:
    """Return True if autocast is on for x's device. Some devices have no autocast."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which matrix products keep the dtype of their factors."""
    # torch.autocast takes some microseconds even if it changes nothing.
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


_OptionalTensor = TypeVar('_OptionalTensor', Tensor, Tensor | None)


def _to(x: _OptionalTensor, dtype: torch.dtype) -> _OptionalTensor:
    # An exported graph would keep a conversion to the dtype that x has.
    return x if x is None or x.dtype == dtype else x.to(dtype)


def expect_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError if a tensor does not have this shape. ``meaning`` spells the shape in letters; None passes."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f'{name} must have shape {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}')


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise NotImplementedError for a complex tensor and TypeError for an integer one. None passes."""
    for name, x in tensors.items():
        if x is None or x.is_floating_point():
            continue
        if x.is_complex():
            raise NotImplementedError(f'{name} is complex ({x.dtype}): only A, B and C of a scan can be')
        raise TypeError(f'{name} must be a floating point tensor, got {x.dtype}')


def check_states(A: Tensor, B: Tensor, C: Tensor) -> None:
    """Raise TypeError if A, B or C is an integer tensor, or if B or C is complex and A is real."""
    if not A.is_complex():
        check_dtypes(A=A)
    for name, x in (('B', B), ('C', C)):
        if x.is_complex() and not A.is_complex():
            raise TypeError(f'{name} is complex ({x.dtype}), but A is real ({A.dtype}): pass A + 0j')
        if not x.is_complex():
            check_dtypes(**{name: x})


@dataclass(frozen=True, kw_only=True)
class ScanInputs:
    """The arguments of :func:`mmlocalmamba.ops.directional_scan`, where they are documented, as one object.

    The fields have the names of the operator's arguments (:mod:`mmlocalmamba.ops.library`) and are used by name only.
    :meth:`replace` returns a changed copy.
    """
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

    def replace(self, **changes: Any) -> 'ScanInputs':
        """Return a copy with these fields changed. Raises TypeError for an unknown field."""
        return replace(self, **changes)

    def tokens(self) -> list[Tensor]:
        """Return the tensors with one row per token or step."""
        return [self.u, self.delta, self.B, self.C]

    def parameters(self) -> list[Tensor]:
        """Return the parameters that are not None."""
        return [x for x in (self.A, self.D, self.delta_bias, self.dt_weight) if x is not None]

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are not None, without the tables."""
        return self.tokens() + self.parameters()

    def check(self) -> 'ScanInputs':
        """Check shapes and dtypes, and return self.

        Raises:
            ValueError: Shapes do not match.
            TypeError: A tensor holds integers, or B or C is complex and A is not.
            NotImplementedError: A tensor other than A, B and C is complex.
        """
        check_dtypes(u=self.u, delta=self.delta, D=self.D, delta_bias=self.delta_bias, dt_weight=self.dt_weight)
        check_states(self.A, self.B, self.C)
        if self.delta.dim() != 4 or self.A.dim() != 3:
            raise ValueError(f'delta must be (B, K, L, D) and A (K, D, N), got {tuple(self.delta.shape)} and '
                             f'{tuple(self.A.shape)}')
        batch, K, rows, rank = self.delta.shape
        width, N = self.A.shape[1:] if self.dt_weight is not None else (rank, self.A.shape[-1])
        expect_shape('dt_weight', self.dt_weight, (K, width, rank), '(K, D, R)')
        expect_shape('A', self.A, (K, width, N), '(K, D, N)')
        expect_shape('B', self.B, (batch, K, rows, N), '(B, K, L, N)')
        expect_shape('C', self.C, (batch, K, rows, N), '(B, K, L, N)')
        expect_shape('D', self.D, (K, width), '(K, D)')
        expect_shape('delta_bias', self.delta_bias, (K, width), '(K, D)')
        if self.in_scan_order or self.u.dim() != 3:
            expect_shape('u', self.u, (batch, K, rows, width), '(B, K, L, D)')
        else:
            expect_shape('u', self.u, (batch, rows, width), '(B, L, D)')
        if self.src is None or self.inv is None:
            if not self.in_scan_order:
                raise ValueError('tables must be given unless in_scan_order=True')
        else:
            if self.src.shape[0] != K or self.inv.shape[0] != K:
                raise ValueError(f'tables hold {self.src.shape[0]} directions, the tensors {K}')
            expected = self.src.shape[1] if self.in_scan_order else self.inv.shape[1]
            if expected != rows:
                unit = 'steps' if self.in_scan_order else 'tokens'
                raise ValueError(f'tables are for {expected} {unit}, delta holds {rows}')
        return self

    def to(self, dtype: torch.dtype) -> 'ScanInputs':
        """Return the inputs with tokens in this dtype and parameters in the dtype that it is computed in.

        If A is complex, A, B and C get the complex dtype of that precision.
        """
        parameter = torch.promote_types(dtype, torch.float32)
        state, vector = parameter, dtype
        if self.A.is_complex():
            state = vector = parameter.to_complex()
        dtypes = dict(u=dtype, delta=dtype, A=state, B=vector, C=vector, D=parameter, delta_bias=parameter,
                      dt_weight=parameter)
        changes = {}
        for name, wanted in dtypes.items():
            x = getattr(self, name)
            if x is not None and x.dtype != wanted:
                changes[name] = x.to(wanted)
        return self.replace(**changes) if changes else self

    def with_full_step_sizes(self) -> 'ScanInputs':
        """Return the inputs with delta (B, K, L, D) in place of its low-rank factor and ``dt_weight``."""
        if self.dt_weight is None:
            return self
        delta = torch.einsum('bklr,kdr->bkld', self.delta, self.dt_weight.to(self.delta.dtype))
        return self.replace(delta=delta, dt_weight=None)


class Backend:
    """One way to compute the ops on some device. Subclasses define :attr:`name` and :meth:`scan`.

    A backend may also define fused versions of the ops ``linear``, ``linear_gelu``, ``conv2d_silu``,
    ``directional_conv``, ``scattn_sum``, ``norm_gate`` and ``add_rms_norm``, with the arguments of their unfused
    versions in :mod:`mmlocalmamba.ops.unfused`. They are None where it has none.

    Attributes:
        name: The name that users choose it by.
        device_type: The only type of device on which it is chosen automatically; None: any.
        automatic: False if it runs only where it is named.
        dtypes: Dtypes of tokens that it reads without conversion, if all tokens have the same.
        mixed_dtypes: True if each tensor, parameters included, may have its own of these dtypes.
        low_rank_steps: True if its scan takes ``dt_weight``.
        complex_states: True if its scan takes complex A, B and C.
    """
    name: str
    device_type: str | None = None
    automatic = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    mixed_dtypes = False
    low_rank_steps = False
    complex_states = False

    linear: Callable[..., Tensor] | None = None
    linear_gelu: Callable[..., Tensor] | None = None
    conv2d_silu: Callable[..., Tensor] | None = None
    norm_gate: Callable[..., Tensor] | None = None
    directional_conv: Callable[..., Tensor] | None = None
    scattn_sum: Callable[..., Tensor] | None = None
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] | None = None

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        """Compute :func:`mmlocalmamba.ops.directional_scan`.

        Returns:
            y (B, K, L, D) and the last states (B, K, D, N), in u's dtype or the dtype of the computation.
        """
        raise NotImplementedError(f'the backend {self.name!r} has no scan')

    def unavailable(self, u: Tensor) -> str | None:
        """Return the reason why it cannot run tensors like u (device, dtype), or None if it can."""
        return None

    def reads(self, tokens: list[Tensor]) -> bool:
        """Return True if it takes these tokens without conversion."""
        return all(x.dtype in self.dtypes and (self.mixed_dtypes or x.dtype == tokens[0].dtype) for x in tokens)

    def refuses(self, u: Tensor, complex_states: bool = False) -> str | None:
        """Return the reason why it cannot run a scan of tensors like u, or None if it can."""
        if complex_states and not self.complex_states:
            able = ' and '.join(name for name, backend in BACKENDS.items() if backend.complex_states)
            return f'it takes no complex A, B and C, which {able} do'
        return self.unavailable(u)


# By name, the fastest first.
BACKENDS: dict[str, Backend] = {}


def available_backends(u: Tensor) -> dict[str, str | None]:
    """Return all backends in the order of preference: None, or the reason why one cannot run tensors like ``u``."""
    return {name: backend.unavailable(u) for name, backend in BACKENDS.items()}


@cache
def _warn_of_slow_scan(name: str, best: str, reason: str) -> None:
    """Warn once for each reason."""
    warnings.warn(f'the backend {name!r} computes selective scans, many times slower than {best!r} would: {reason}',
                  stacklevel=5)


def choose(u: Tensor, name: str | None = None, complex_states: bool = False) -> Backend:
    """Return the backend that is named, or the fastest one that can run tensors like u.

    Args:
        u: A tensor with the device and the dtype of the computation.
        name: A name of :data:`BACKENDS`. None: the environment variable :data:`BACKEND_VARIABLE`, or else automatic.
        complex_states: True if the backend has to take complex A, B and C.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The named backend cannot run here.
    """
    name = name or os.environ.get(BACKEND_VARIABLE) or None
    if name is None:
        device_types = (None, u.device.type)
        candidates = (backend for backend in BACKENDS.values()
                      if backend.automatic and backend.device_type in device_types)
        best = chosen = next(candidates)
        while chosen.refuses(u, complex_states) is not None:
            chosen = next(candidates)
        if chosen is not best and u.numel() >= _LARGE:
            _warn_of_slow_scan(chosen.name, best.name, best.refuses(u, complex_states))
        return chosen
    if name not in BACKENDS:
        raise ValueError(f'unknown backend {name!r}: known are {", ".join(BACKENDS)} '
                         f'(argument backend or environment variable {BACKEND_VARIABLE})')
    reason = BACKENDS[name].refuses(u, complex_states)
    if reason is not None:
        raise RuntimeError(f'backend {name!r} cannot run here: {reason}')
    return BACKENDS[name]


def run_scan(inputs: ScanInputs, name: str | None) -> tuple[Tensor, Tensor]:
    """Run a scan on the backend that :func:`choose` returns."""
    backend = choose(inputs.u, name, inputs.A.is_complex())
    # Autocast would compute the recurrence in 16 bits.
    with without_autocast(inputs.u):
        if not (backend.mixed_dtypes and backend.reads(inputs.tensors())):
            inputs = inputs.to(inputs.u.dtype if backend.reads(inputs.tokens()) else compute_dtype(inputs.u))
        if not backend.low_rank_steps:
            inputs = inputs.with_full_step_sizes()
        return backend.scan(inputs)


def fused_op(op: str, name: str | None, tokens: list[Tensor | None],
             parameters: list[Tensor | None]) -> tuple[Callable | None, list[Tensor | None]]:
    """Find the fused version of an op.

    Args:
        op: The name of the op, an attribute of :class:`Backend`.
        name: As in :func:`choose`.
        tokens: Inputs in the dtype they are stored in. The first one is not None.
        parameters: Inputs that may be converted.

    Returns:
        The fused op of the chosen backend, and the parameters in the dtype of the computation. If the backend has no
        fused version for these tokens: None, and the parameters as they are. So it is for tensors that hold others, as
        quantised and sharded weights do: PyTorch's ops know them, and the fused ones do not.
    """
    given = [x for x in tokens if x is not None]
    if any(is_traceable_wrapper_subclass(x) for x in (*given, *parameters)):
        return None, parameters
    backend = choose(given[0], name)
    function = getattr(backend, op)
    if function is None or not backend.reads(given):
        return None, parameters
    dtype = compute_dtype(given[0])
    return function, [_to(x, dtype) for x in parameters]
