"""The scan for graphs that are exported to ONNX, as ONNX's operator ``Scan``.

While a model is exported, the backend computes a scan in plain PyTorch, except for its recurrence: that becomes one
node of the domain ``mmlocalmamba``. :func:`expand` replaces these nodes in the ONNX graph that torch has made, so that
the graph holds ONNX's own operators only.

Another node names the inputs and the output of a whole scan. :func:`take_scans` removes it and returns these names, by
which a runtime's extension finds what it may compute by a kernel.

States are (N, D) in the graph, channels innermost: runtimes compute that twice as fast as (D, N).

A step of a scan with one state (N = 1) has so little to compute that the overhead of a runtime's loop dominates. There,
each sequence is cut into chunks, all chunks advance together, and a short loop over the chunks carries the states
along. The loop's body also makes the step sizes, in arrays that stay in the processor's cache.

(Opset 27's ``LinearAttention`` can express such a scan, too: D heads with one key and one value each. ONNX Runtime 1.32
turns it into a ``Scan`` over single steps, which is many times slower.)
"""
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import Backend, ScanInputs
from mmlocalmamba.ops.scan_order import step_size

DOMAIN = 'mmlocalmamba'
# A node that hands its first input on. Its inputs are those of a scan.
_WHOLE = 'DirectionalScan'


def _node(name: str, inputs: list[Tensor], *shapes: tuple[int, ...], **attributes: Any) -> list[Tensor]:
    """Add a node that torch does not know, and return its outputs. They have values in an exported graph only."""
    return list(torch.onnx.ops.symbolic_multi_out(
        f'{DOMAIN}::{name}', inputs, attributes, dtypes=[torch.float32] * len(shapes), shapes=shapes))


def _swap(x: Tensor) -> Tensor:
    """Swap the first two dimensions, for a batch of 1 by a reshape, which runtimes do not copy."""
    one = any(isinstance(side, int) and side == 1 for side in x.shape[:2])
    return x.reshape(x.shape[1], x.shape[0], *x.shape[2:]) if one else x.transpose(0, 1)


def _steps_first(x: Tensor, src: Tensor | None, fill: Tensor | None = None) -> Tensor:
    """Return x (B, K, L, F) in the order of ``src`` (K, T): (T, B, K, F).

    Pads are ``fill`` (K, F). Without src, x is in scan order already.
    """
    if src is None:
        return x.permute(2, 0, 1, 3)
    batch, K, L, _ = x.shape
    rows = src.clamp(min=0).t() + torch.arange(K, dtype=src.dtype, device=src.device) * L
    x = _swap(x.flatten(1, 2).index_select(1, rows.flatten()).unflatten(1, (src.shape[1], K)))
    if fill is not None and src.shape[1] > L:
        x = torch.where((src < 0).t()[:, None, :, None], fill, x)
    return x


def _rows(inv: Tensor, chunks: int = 1, steps: int = 0) -> Tensor:
    """Return where the output of each token is among steps x K x chunks rows: (K, L), from ``inv`` (K, L).

    Step t is step t % steps of chunk t // steps. With one chunk, ``steps`` is not read.
    """
    K = inv.shape[0]
    place = (inv if chunks == 1 else inv % steps) * K + torch.arange(K, dtype=inv.dtype, device=inv.device)[:, None]
    return place if chunks == 1 else place * chunks + inv.div(steps, rounding_mode='floor')


def table_of(rows: np.ndarray, directions: int, tokens: int, steps: int, chunks: int) -> np.ndarray:
    """Return the table src (K, T), int32, from the constant that a file's scan has in its place.

    Args:
        rows: what :func:`_rows` returned, in any shape.
        directions: K.
        tokens: L.
        steps: T.
        chunks: number of chunks; they may begin with pads.
    """
    rows = rows.reshape(directions, tokens)
    length = -(-steps // chunks)
    inv = rows // chunks // directions + rows % chunks * length - (chunks * length - steps)
    src = np.full((directions, steps), -1, dtype=np.int32)
    np.put_along_axis(src, inv, np.arange(tokens, dtype=np.int32)[None], axis=1)
    return src


def _tokens_first(y: Tensor, inv: Tensor | None) -> Tensor:
    """Return y (T, B, K, F) at its tokens' positions, (B, K, L, F), or without ``inv`` (K, L) as (B, K, T, F)."""
    if inv is None:
        return y.permute(1, 2, 0, 3)
    return _swap(y).flatten(1, 2).index_select(1, _rows(inv).flatten()).unflatten(1, tuple(inv.shape))


# Elements (directions x chunks x channels) of a step of a chunked scan: a few such arrays fit in a processor's cache.
_STEP_ELEMENTS = 20000


class _Chunks(NamedTuple):
    """How K sequences of T steps are cut into chunks, which advance together.

    Attributes:
        tokens: (steps, K, chunks), token of each step of each chunk; -1 for a pad.
        rows: (K, L), where the output of each token is among steps x K x chunks rows.
        with_pads: True if there are pads.
    """
    tokens: Tensor
    rows: Tensor
    with_pads: bool

    def read(self, x: Tensor, with_zeros: bool = False) -> Tensor:
        """Return x (B, K, L, F), or (B, L, F) of all directions, as (steps, B, K, chunks, F).

        Pads are zeros or token 0.
        """
        steps, K, chunks = self.tokens.shape
        index = self.tokens.clamp(min=0)
        if x.dim() == 4:
            index = index + torch.arange(K, dtype=index.dtype, device=index.device)[:, None] * x.shape[2]
            x = x.flatten(1, 2)
        x = _swap(x.index_select(1, index.flatten()).unflatten(1, (steps, K * chunks))).unflatten(2, (K, chunks))
        return x * (self.tokens >= 0)[:, None, ..., None].to(x.dtype) if with_zeros and self.with_pads else x

    def write(self, y: Tensor) -> Tensor:
        """Return y (steps, B, K, chunks, F) at its tokens' positions: (B, K, L, F)."""
        return _swap(y).flatten(1, 3).index_select(1, self.rows.flatten()).unflatten(1, tuple(self.rows.shape))


def _chunks(inputs: ScanInputs) -> _Chunks:
    _, K, rows, _ = inputs.delta.shape
    width, device = inputs.A.shape[1], inputs.A.device
    src, inv = inputs.src, inputs.inv
    if src is None or inputs.in_scan_order:
        src = torch.arange(rows, device=device).expand(K, rows)
    if inv is None:
        inv = src
    T = src.shape[1]
    chunks = max(1, min(_STEP_ELEMENTS // (K * width), 2 * math.isqrt(T)))
    steps = -(-T // chunks)
    # What is missing for whole chunks are pads in front, where they leave the state at zero.
    tokens = torch.nn.functional.pad(src, (chunks * steps - T, 0), value=-1).unflatten(1, (chunks, steps))
    return _Chunks(tokens.permute(2, 0, 1), _rows(inv + chunks * steps - T, chunks, steps),
                   chunks * steps > inv.shape[1])


def _chunked(inputs: ScanInputs, cut: _Chunks) -> tuple[Tensor, Tensor]:
    """Compute a scan with one state and low-rank step sizes; see the module's description."""
    x, C = cut.read(inputs.u), cut.read(inputs.C)
    delta, B = (cut.read(tokens, with_zeros=True) for tokens in (inputs.delta, inputs.B))
    K, width, _ = inputs.A.shape
    zero = x.new_zeros(*x.shape[1:])
    nothing = x.new_zeros(K, 1, width)
    bias, D = (nothing if row is None else row[:, None] for row in (inputs.delta_bias, inputs.D))
    numbers = [x.new_full((), number) for number in (2., *_ATANH)]
    assert inputs.dt_weight is not None
    last, total, y, read = _node(
        'ChunkedScan', [zero, zero + 1, x, delta, B, C, inputs.dt_weight.mT, bias, inputs.A.mT, D, *numbers],
        zero.shape, zero.shape, x.shape, x.shape)
    # last and total: what each chunk adds to the state, and its decay. The state that enters a chunk follows.
    first = zero[:, :, 0]
    end, after = _node('Recurrence', [first, total.permute(2, 0, 1, 3), last.permute(2, 0, 1, 3)], first.shape,
                       (zero.shape[2], *first.shape))
    enter = torch.cat([first[None], after[:-1]]).permute(1, 2, 0, 3)
    return cut.write(y + read * enter), end[..., None]


# Coefficients of 2 atanh(sqrt(q)) / sqrt(q) on 0 < q <= 1/9 by Chebyshev interpolation; relative error 4e-9.
_ATANH = (2.000000007681759, 0.6666632164138138, 0.400245952306173, 0.2796515774545786, 0.28157778363552016)


def _softplus(x: Tensor) -> Tensor:
    """Return max(x, 0) + log1p(exp(-|x|)) without the operators Softplus and Log, by log1p(e) = 2 atanh(e / (2 + e)).

    ONNX Runtime does not vectorise these operators: Softplus takes 150 times as long as an addition.
    """
    e = (-x.abs()).exp()
    s = e / (e + 2)
    q = s * s
    series = _ATANH[4] * q + _ATANH[3]
    for coefficient in _ATANH[2::-1]:
        series = series * q + coefficient
    return x.relu() + s * series


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    delta = step_size(delta, bias, softplus=False)
    return _softplus(delta) if softplus else delta


def _stepwise(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute a scan step by step."""
    u, delta, D, inv = inputs.u, inputs.delta, inputs.D, inputs.inv
    if inputs.dt_weight is not None:  # not by einsum: runtimes are slower at an Einsum
        delta = delta @ inputs.dt_weight.mT
    if u.dim() == 3:
        u = u[:, None]
    A = inputs.A.transpose(1, 2)
    K, N, width = A.shape
    dt = _step_size(delta, inputs.delta_bias, inputs.delta_softplus)
    order = None if inputs.in_scan_order else inputs.src
    # At a pad, u, B and C are 0 and dt is the step size of delta = 0.
    dt_at_pad = _step_size(delta.new_zeros(1, K, 1, width), inputs.delta_bias, inputs.delta_softplus)[0, :, 0]
    du = _steps_first(dt * u, order, torch.zeros_like(dt_at_pad))
    dt = _steps_first(dt, order, dt_at_pad)
    B, C = _steps_first(inputs.B, order), _steps_first(inputs.C, order)
    T, batch = dt.shape[:2]
    zero = A.new_zeros(batch, K, N, width)
    if N == 1:
        # Everything except the recurrence is computed for all steps at once.
        last, states = _node('Recurrence', [zero, (dt[..., None, :] * A).exp(), du[..., None, :] * B[..., None]],
                             zero.shape, (T, *zero.shape))
        y = states[..., 0, :] * C
    else:
        last, y = _node('SelectiveScan',
                        [zero, dt[..., None, :], du[..., None, :], B[..., None], C[..., None, :], A],
                        zero.shape, (T, batch, K, 1, width))
        y = y.squeeze(-2)
    if inputs.in_scan_order and D is not None:
        y = y + (D[:, None] * u).permute(2, 0, 1, 3)
    y = _tokens_first(y, inv)
    if not inputs.in_scan_order and D is not None:
        y = y + D[:, None] * u
    return y, last.transpose(2, 3)


class OnnxBackend(Backend):
    name = 'onnx'
    automatic = False
    dtypes = (torch.float32, )
    low_rank_steps = True

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        chunks, rows = 1, None
        if inputs.A.shape[-1] == 1 and inputs.dt_weight is not None and inputs.delta_softplus:
            cut = _chunks(inputs)
            chunks, rows = cut.tokens.shape[2], cut.rows
            y, last = _chunked(inputs, cut)
        else:
            rows = None if inputs.inv is None else _rows(inputs.inv)
            y, last = _stepwise(inputs)
        # What the scan reads, in the forms that it has in the graph anyway: no constant is in the file twice.
        roles = {'y': y, 'u': inputs.u, 'delta': inputs.delta, 'B': inputs.B, 'C': inputs.C, 'A': inputs.A.mT,
                 'weight': None if inputs.dt_weight is None else inputs.dt_weight.mT,
                 'bias': None if inputs.delta_bias is None else inputs.delta_bias[:, None],
                 'skip': None if inputs.D is None else inputs.D[:, None],
                 'rows': None if rows is None else rows.flatten().long()}  # as Gather reads them
        given = {role: x for role, x in roles.items() if x is not None}
        steps = inputs.delta.shape[2] if inputs.src is None or inputs.in_scan_order else inputs.src.shape[1]
        y, = _node(_WHOLE, list(given.values()), tuple(y.shape), roles=list(given), steps=steps, chunks=chunks,
                   in_scan_order=inputs.in_scan_order, softplus=inputs.delta_softplus)
        return y, last

    def unavailable(self, u: Tensor) -> str | None:
        is_exporting = getattr(torch.compiler, 'is_exporting', None)  # torch 2.6 does not have it
        if is_exporting is None or not is_exporting():
            return 'it is for graphs that are exported to ONNX'
        return None if u.dtype == torch.float32 else f'it computes in float32, not in {u.dtype}'


BACKEND = OnnxBackend()

# Each loop's states, the inputs of a step, values of the outer graph, results that are stacked, and the body:
# (operator, inputs, output). A state x becomes ``next x``.
_LOOPS = {
    'Recurrence': (('h', ), ('a', 'b'), (), ('out', ), (
        # In this order: OpenVINO 2026.4 computes a sum with a product of an input and the state wrongly, in that order.
        ('Mul', ('h', 'a'), 'kept'), ('Add', ('kept', 'b'), 'next h'), ('Identity', ('next h', ), 'out'))),
    'SelectiveScan': (('h', ), ('dt', 'du', 'B', 'C'), ('A', ), ('out', ), (
        ('Mul', ('dt', 'A'), 'exponent'), ('Exp', ('exponent', ), 'decay'), ('Mul', ('decay', 'h'), 'kept'),
        ('MatMul', ('B', 'du'), 'fed'), ('Add', ('kept', 'fed'), 'next h'), ('MatMul', ('C', 'next h'), 'out'))),
    # h: the states if each chunk began with zeros; p: products of the decays since the chunk's first step.
    'ChunkedScan': (('h', 'p'), ('x', 'delta', 'B', 'C'), ('W', 'bias', 'A', 'D', 'two', 'c0', 'c1', 'c2', 'c3', 'c4'),
                    ('out', 'read'), (
        ('MatMul', ('delta', 'W'), 'product'), ('Add', ('product', 'bias'), 'z'),
        # softplus, as in _softplus
        ('Abs', ('z', ), 'abs'), ('Neg', ('abs', ), 'neg'), ('Exp', ('neg', ), 'e'), ('Add', ('e', 'two'), 'e2'),
        ('Div', ('e', 'e2'), 's'), ('Mul', ('s', 's'), 'q'), ('Mul', ('q', 'c4'), 'm4'), ('Add', ('m4', 'c3'), 's3'),
        ('Mul', ('s3', 'q'), 'm3'), ('Add', ('m3', 'c2'), 's2'), ('Mul', ('s2', 'q'), 'm2'),
        ('Add', ('m2', 'c1'), 's1'), ('Mul', ('s1', 'q'), 'm1'), ('Add', ('m1', 'c0'), 's0'),
        ('Mul', ('s', 's0'), 'log1p'), ('Relu', ('z', ), 'ramp'),
        ('Add', ('ramp', 'log1p'), 'dt'),
        ('Mul', ('dt', 'A'), 'exponent'), ('Exp', ('exponent', ), 'decay'), ('Mul', ('dt', 'x'), 'du'),
        ('Mul', ('du', 'B'), 'fed'), ('Mul', ('decay', 'h'), 'kept'), ('Add', ('kept', 'fed'), 'next h'),
        ('Mul', ('decay', 'p'), 'next p'), ('Mul', ('next p', 'C'), 'read'),
        ('Mul', ('next h', 'C'), 'y'), ('Mul', ('x', 'D'), 'skip'), ('Add', ('y', 'skip'), 'out'))),
}


def expand(model: Any) -> int:
    """Replace the nodes of this module in an ONNX graph by loops of ONNX's own operators.

    Args:
        model: The ``onnx_ir.Model`` to change in place.

    Returns:
        The number of nodes that were replaced.

    Raises:
        NotImplementedError: The graph holds a node of this domain that this module does not define.
    """
    import onnx_ir as ir

    found = [node for node in model.graph if node.domain == DOMAIN and node.op_type != _WHOLE]
    for count, node in enumerate(found):
        if node.op_type not in _LOOPS:
            raise NotImplementedError(f'the node {node.op_type} of {DOMAIN} cannot be replaced by ONNX operators: '
                                      f'known are {", ".join(_LOOPS)}')
        states, steps, outer, results, body = _LOOPS[node.op_type]
        given = dict(zip((*states, *steps, *outer), node.inputs, strict=True))
        inner = {name: ir.Value(name=f'{name}_{count}', type=ir.TensorType(ir.DataType.FLOAT),
                                shape=None if value.shape is None else ir.Shape(value.shape[name in steps:]))
                 for name, value in given.items() if name not in outer}
        values, nodes = {**inner, **{name: given[name] for name in outer}}, []
        for operator, names, output in body:
            nodes.append(ir.Node('', operator, [values[name] for name in names], num_outputs=1))
            values[output] = nodes[-1].outputs[0]
            values[output].name = f'{output.replace(" ", "_")}_{count}'
        made = [values[f'next {name}'] for name in states] + [values[name] for name in results]
        for value, like, stacked in zip(made, node.outputs, [False] * len(states) + [True] * len(results), strict=True):
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = None if like.shape is None else ir.Shape(like.shape[stacked:])
        graph = ir.Graph(list(inner.values()), made, nodes=nodes, name=f'scan_{count}')
        loop = ir.Node('', 'Scan', [given[name] for name in (*states, *steps)],
                       [ir.AttrGraph('body', graph), ir.AttrInt64('num_scan_inputs', len(steps))],
                       num_outputs=len(made), name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [loop], list(node.outputs),
                                                list(loop.outputs))
    return len(found)


def take_scans(model: Any) -> list[dict[str, Any]]:
    """Remove the nodes that name whole scans from an ONNX graph, and return what they say.

    Args:
        model: The ``onnx_ir.Model`` to change in place, after :func:`expand` and after constants were folded.

    Returns:
        For each scan the names of its values: ``y`` (B, K, L, D); u, delta, B and C as
        :func:`mmlocalmamba.ops.directional_scan` takes them; and constants, where there are such: ``A`` (K, N, D),
        ``weight`` (K, R, D) of the step sizes, ``bias`` and ``skip`` (K, 1, D), and ``rows``, for :func:`table_of`.
        Also ``steps``, ``chunks``, ``in_scan_order`` and ``softplus``.
    """
    scans = []
    for node in [node for node in model.graph if node.domain == DOMAIN and node.op_type == _WHOLE]:
        about = {name: attribute.value for name, attribute in node.attributes.items()}
        roles = about.pop('roles')
        y, whole = node.inputs[0], node.outputs[0]
        is_output, name = whole.is_graph_output(), whole.name
        whole.replace_all_uses_with(y, replace_graph_outputs=True)
        if is_output:
            y.name = name
        scans.append({**dict(zip(roles, (value.name for value in node.inputs), strict=True)),
                      **{name: bool(x) if name in ('in_scan_order', 'softplus') else x for name, x in about.items()}})
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    return scans
