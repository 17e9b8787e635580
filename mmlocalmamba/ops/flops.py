"""FLOPs of our ops for MMEngine's analyzer (or fvcore's, which has the same handles) and for PyTorch's counter.

In :data:`HANDLES`, a multiply-add counts once. Element-wise operations count inside a scan only. A scan of L steps,
pads included, costs 9*B*L*D*N for the recurrence and its output and B*L*D for the skip, for each direction
(state-spaces/mamba issue 110, as VMamba and LocalVMamba report it)::

    from mmengine.analysis import FlopAnalyzer
    analyzer = FlopAnalyzer(model, images).set_op_handle(**HANDLES)

A handle gets the values of a traced graph and uses their shapes only.

``torch.utils.flop_counter.FlopCounterMode`` knows our operators once :mod:`mmlocalmamba.ops` is imported. As it does
elsewhere, it counts a multiply-add of products and convolutions twice, and no norms; a scan costs what is said above. A
backward operator costs twice its forward operator, without what it recomputes.
"""
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = 'mmlocalmamba::'
SCAN = 'directional_scan'


def scan_flops(sequences: int, steps: int, channels: int, d_state: int) -> int:
    """Return the FLOPs of ``sequences`` selective scans (images times directions) with skip connection."""
    return sequences * steps * channels * (9 * d_state + 1)


def _shape(value: Any) -> Any:
    """Return the shape as a list of ints, or None if the value has none."""
    return value.type().sizes() if value.isCompleteTensor() else None


def _arguments(op: str, inputs: Sequence[Any]) -> dict[str, Any]:
    """Return {argument: shape or None}, with the names of the op's schema."""
    schema = getattr(torch.ops.mmlocalmamba, op).default._schema
    return {argument.name: _shape(value) for argument, value in zip(schema.arguments, inputs)}


def _native_scan(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    shapes = _arguments('directional_scan', inputs)
    (batch, K, rows, _), (_, width, N) = shapes['delta'], shapes['A']
    steps = shapes['src'][1] if shapes['src'] else rows
    counts = Counter({SCAN: scan_flops(batch * K, steps, width, N)})
    if shapes.get('dt_weight'):  # step sizes from their low-rank factor
        counts['linear'] = prod(shapes['delta']) * width
    return counts


def _native_linear(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    shapes = _arguments('linear', inputs)
    return prod(shapes['x']) * shapes['weight'][-2]


def _native_conv(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    shapes = _arguments('directional_conv', inputs)
    batch, steps = shapes['x'][0], (shapes['src'] or shapes['x'])[1]
    return Counter(conv=batch * steps * prod(shapes['weight']))


def _native_linear_gelu(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    shapes = _arguments('linear_gelu', inputs)
    return Counter(linear=prod(shapes['x']) * shapes['weight'][-2])


def _native_conv2d(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    shapes = _arguments('conv2d_silu', inputs)
    return Counter(conv=prod(shapes['x'][:2]) * prod(shapes['weight']))


def _native_norm_gate(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    batch, _, tokens, width = _arguments('norm_gate', inputs)['y']
    return Counter(layer_norm=5 * batch * tokens * width)


def _native_scattn(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    shapes = _arguments('scattn_sum', inputs)
    batch, K = shapes['y'][:2]
    gates = batch * K * (prod(shapes['reduce_weight']) + prod(shapes['select_weight']))
    return Counter(layer_norm=5 * prod(shapes['y']), linear=gates)  # 5 as in MMEngine


def _native_norm(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    return Counter()  # MMEngine does not count an RMSNorm


def _chunked_scan(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter:
    (batch, K, steps, width), N = _shape(inputs[0]), _shape(inputs[2])[-1]
    return Counter({SCAN: scan_flops(batch * K, steps, width, N)})


# Handles of the ops of a traced graph. check_all_known refuses an op of ours that is missing. The gathers of the
# chunked backend (_Read, _Write) only move data.
HANDLES: dict[str, Callable] = {
    f'{NAMESPACE}directional_scan': _native_scan,
    f'{NAMESPACE}linear': _native_linear,
    f'{NAMESPACE}linear_gelu': _native_linear_gelu,
    f'{NAMESPACE}conv2d_silu': _native_conv2d,
    f'{NAMESPACE}norm_gate': _native_norm_gate,
    f'{NAMESPACE}directional_conv': _native_conv,
    f'{NAMESPACE}scattn_sum': _native_scattn,
    f'{NAMESPACE}add_rms_norm': _native_norm,
    'prim::PythonOp._Scan': _chunked_scan,
}



# ---- PyTorch's counter ----

def _scan_total(shapes: dict[str, Any]) -> int:
    (batch, K, rows, _), (_, width, N) = shapes['delta'], shapes['A']
    steps = shapes['src'][1] if shapes['src'] else rows
    step_sizes = 2 * prod(shapes['delta']) * width if shapes['dt_weight'] else 0
    return scan_flops(batch * K, steps, width, N) + step_sizes


def _scan_backward_total(shapes: dict[str, Any]) -> int:
    # The product's gradients are products of their own.
    return 2 * _scan_total({**shapes, 'dt_weight': None})


def _linear_total(shapes: dict[str, Any]) -> int:
    return 2 * prod(shapes['x']) * shapes['weight'][-2]


def _conv_total(shapes: dict[str, Any]) -> int:
    return 2 * shapes['x'][0] * (shapes['src'] or shapes['x'])[1] * prod(shapes['weight'])


def _conv2d_total(shapes: dict[str, Any]) -> int:
    return 2 * prod(shapes['x'][:2]) * prod(shapes['weight'])


def _scattn_total(shapes: dict[str, Any]) -> int:
    return 2 * prod(shapes['y'][:2]) * (prod(shapes['reduce_weight']) + prod(shapes['select_weight']))


# Name of an operator -> FLOPs from the shapes of its arguments by name.
TOTALS: dict[str, Callable[[dict[str, Any]], int]] = {
    'directional_scan': _scan_total,
    'directional_scan_backward': _scan_backward_total,
    'linear': _linear_total,
    'linear_gelu': _linear_total,
    'linear_gelu_backward': lambda shapes: 0,
    'conv2d_silu': _conv2d_total,
    'conv2d_silu_backward': lambda shapes: 2 * _conv2d_total(shapes),
    'norm_gate': lambda shapes: 0,
    'norm_gate_backward': lambda shapes: 0,
    'directional_conv': _conv_total,
    'directional_conv_backward': lambda shapes: 2 * _conv_total(shapes),
    'scattn_sum': _scattn_total,
    'scattn_sum_backward': lambda shapes: 2 * _scattn_total(shapes),
    'add_rms_norm': lambda shapes: 0,
}


def register_totals() -> None:
    """Tell PyTorch's counter of :data:`TOTALS`."""

    def formula(operator: Any, total: Callable[[dict[str, Any]], int]) -> Callable[..., int]:
        names = [argument.name for argument in operator.default._schema.arguments]
        return lambda *shapes, **_: total(dict(zip(names, shapes)))

    for name, total in TOTALS.items():
        operator = getattr(torch.ops.mmlocalmamba, name)
        register_flop_formula(operator)(formula(operator, total))


def check_all_known(unsupported: Sequence[str]) -> None:
    """Refuse a count that leaves out an op of ours.

    Args:
        unsupported: Names of the ops without handle: ``analyzer.unsupported_ops()``.

    Raises:
        NotImplementedError: One of them is ours.
    """
    ours = [name for name in unsupported if name.startswith(NAMESPACE)]
    if ours:
        raise NotImplementedError(f'FLOPs of {", ".join(ours)} are not known: add a handle to '
                                  'mmlocalmamba.ops.flops.HANDLES')


def authors_mixer_flops(tokens: int, steps: Sequence[int], channels: int, inner: int, directions: int, d_state: int,
                        dt_rank: int, d_conv: int, reduced: int, per_direction: bool) -> int:
    """Return the FLOPs of a LocalVim or Vim block by the authors' counters, for one image.

    These count the convolution, the projections and SCAttn of one direction, and all K scans at 5*L*D*N + 2*L*D. In
    classification they do it once for a block. In detection and segmentation they do it once for every direction, so
    every scan counts K times, and SCAttn twice (hunto/LocalMamba: ``flops`` in local_vim.py, ``mamba_get_flops.py``).

    Args:
        tokens: L.
        steps: Steps of each direction, pads included. Used with ``per_direction`` only.
        channels, inner: C and D.
        directions: K.
        d_state, dt_rank, d_conv: N, R and taps.
        reduced: Channels inside SCAttn, 0 without it.
        per_direction: If True, count as in detection and segmentation.
    """
    gate = 2 * inner * reduced

    def call(length: int) -> int:
        convolution = (length + d_conv - 1) * inner * d_conv
        projections = length * inner * (dt_rank + 2 * d_state) + length * dt_rank * inner
        scans = directions * length * inner * (5 * d_state + 2)
        return convolution + projections + scans + gate

    linear = tokens * channels * 2 * inner + tokens * inner * channels
    if not per_direction:
        return linear + tokens * channels + call(tokens)
    # Their tracer also counts the block's LayerNorm, and SCAttn's LayerNorm and products.
    norm = 5 * tokens * channels
    attention = directions * (gate + 5 * tokens * inner) if reduced else 0
    return linear + norm + attention + sum(call(length) for length in steps)
