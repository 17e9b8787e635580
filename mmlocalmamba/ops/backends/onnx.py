"""The scan for graphs that are exported to ONNX, as ONNX's operator ``Scan``.

While a model is exported, the backend computes a scan in plain PyTorch, except for its recurrence: that becomes one
node of the domain ``mmlocalmamba``. :func:`expand` replaces these nodes in the ONNX graph that torch has made, so that
the graph holds ONNX's own operators only.

States are (N, D) in the graph, channels innermost: runtimes compute that twice as fast as (D, N).
"""
from typing import Any

import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import Backend, ScanInputs
from mmlocalmamba.ops.scan_order import step_size

DOMAIN = 'mmlocalmamba'


def _node(name: str, inputs: list[Tensor], *shapes: tuple[int, ...]) -> list[Tensor]:
    """Add a node that torch does not know, and return its outputs. They have values in an exported graph only."""
    return list(torch.onnx.ops.symbolic_multi_out(
        f'{DOMAIN}::{name}', inputs, dtypes=[torch.float32] * len(shapes), shapes=shapes))


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


def _tokens_first(y: Tensor, inv: Tensor | None) -> Tensor:
    """Return y (T, B, K, F) at its tokens' positions, (B, K, L, F), or without ``inv`` (K, L) as (B, K, T, F)."""
    if inv is None:
        return y.permute(1, 2, 0, 3)
    K = inv.shape[0]
    rows = inv * K + torch.arange(K, dtype=inv.dtype, device=inv.device)[:, None]
    return _swap(y).flatten(1, 2).index_select(1, rows.flatten()).unflatten(1, (K, inv.shape[1]))


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


class OnnxBackend(Backend):
    name = 'onnx'
    automatic = False
    dtypes = (torch.float32, )
    low_rank_steps = True

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
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
            y = y + D * u.permute(2, 0, 1, 3)
        y = _tokens_first(y, inv)
        if not inputs.in_scan_order and D is not None:
            y = y + D[:, None] * u
        return y, last.transpose(2, 3)

    def unavailable(self, u: Tensor) -> str | None:
        is_exporting = getattr(torch.compiler, 'is_exporting', None)  # torch 2.6 does not have it
        if is_exporting is None or not is_exporting():
            return 'it is for graphs that are exported to ONNX'
        return None if u.dtype == torch.float32 else f'it computes in float32, not in {u.dtype}'


BACKEND = OnnxBackend()

# The inputs of each loop at one step, and its body: (operator, inputs, output). ``A`` belongs to the outer graph.
_LOOPS = {
    'Recurrence': (('a', 'b'), (
        ('Mul', ('a', 'state'), 'kept'), ('Add', ('kept', 'b'), 'next'), ('Identity', ('next', ), 'out'))),
    'SelectiveScan': (('dt', 'du', 'B', 'C'), (
        ('Mul', ('dt', 'A'), 'exponent'), ('Exp', ('exponent', ), 'decay'), ('Mul', ('decay', 'state'), 'kept'),
        ('MatMul', ('B', 'du'), 'fed'), ('Add', ('kept', 'fed'), 'next'), ('MatMul', ('C', 'next'), 'out'))),
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

    found = [node for node in model.graph if node.domain == DOMAIN]
    for count, node in enumerate(found):
        if node.op_type not in _LOOPS:
            raise NotImplementedError(f'the node {node.op_type} of {DOMAIN} cannot be replaced by ONNX operators: '
                                      f'known are {", ".join(_LOOPS)}')
        steps, body = _LOOPS[node.op_type]
        zero, *sequences = node.inputs
        outer = dict(zip('A', sequences[len(steps):]))
        sequences = sequences[:len(steps)]
        inner = {name: ir.Value(name=f'{name}_{count}', type=ir.TensorType(ir.DataType.FLOAT),
                                shape=None if value.shape is None else ir.Shape(value.shape[axis:]))
                 for name, value, axis in (('state', zero, 0), *((n, v, 1) for n, v in zip(steps, sequences)))}
        values, nodes = {**inner, **outer}, []
        for operator, names, output in body:
            made = ir.Node('', operator, [values[name] for name in names], num_outputs=1)
            values[output] = made.outputs[0]
            made.outputs[0].name = f'{output}_{count}'
            nodes.append(made)
        for name, like in (('next', node.outputs[0]), ('out', node.outputs[1])):
            values[name].type = ir.TensorType(ir.DataType.FLOAT)
            values[name].shape = None if like.shape is None else ir.Shape(like.shape[name == 'out':])
        graph = ir.Graph(list(inner.values()), [values['next'], values['out']], nodes=nodes, name=f'scan_{count}')
        loop = ir.Node('', 'Scan', [zero, *sequences],
                       [ir.AttrGraph('body', graph), ir.AttrInt64('num_scan_inputs', len(steps))],
                       num_outputs=2, name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [loop], list(node.outputs),
                                                list(loop.outputs))
    model.opset_imports.pop(DOMAIN, None)
    return len(found)
