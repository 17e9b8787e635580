"""The scan for graphs that leave PyTorch, and what makes an ONNX ``Scan`` of it.

While a model is exported, :data:`BACKEND` computes all of a scan but its recurrence in plain PyTorch, and puts one node
of the domain ``mmlocalmamba`` where the recurrence stands; :func:`expand` replaces these nodes in the ONNX graph that
torch has made. What is left are operators of ONNX alone.

States are laid out (N, D) there, channels innermost, which runtimes compute twice as fast as (D, N).
"""
from typing import Any

import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import Backend, ScanInputs
from mmlocalmamba.ops.scan_order import step_size

DOMAIN = 'mmlocalmamba'


def _node(name: str, inputs: list[Tensor], *shapes: tuple[int, ...]) -> list[Tensor]:
    """Outputs of these shapes of a node that torch knows nothing of; it has values in an exported graph alone."""
    return list(torch.onnx.ops.symbolic_multi_out(
        f'{DOMAIN}::{name}', inputs, dtypes=[torch.float32] * len(shapes), shapes=shapes))


def _swap(x: Tensor) -> Tensor:
    """The first two dimensions. Of a single image, known to be one, that moves nothing, and must not look as if."""
    one = any(isinstance(side, int) and side == 1 for side in x.shape[:2])
    return x.reshape(x.shape[1], x.shape[0], *x.shape[2:]) if one else x.transpose(0, 1)


def _steps_first(x: Tensor, src: Tensor | None, fill: Tensor | None = None) -> Tensor:
    """(B, K, L, F) at tokens -> (T, B, K, F) in the order of ``src`` (K, T), pads as ``fill`` (K, F) has it; without
    src it is in scan order already."""
    if src is None:
        return x.permute(2, 0, 1, 3)
    batch, K, L, _ = x.shape
    rows = src.clamp(min=0).t() + torch.arange(K, dtype=src.dtype, device=src.device) * L
    x = _swap(x.flatten(1, 2).index_select(1, rows.flatten()).unflatten(1, (src.shape[1], K)))
    if fill is not None and src.shape[1] > L:
        x = torch.where((src < 0).t()[:, None, :, None], fill, x)
    return x


def _tokens_first(y: Tensor, inv: Tensor | None) -> Tensor:
    """(T, B, K, F) -> (B, K, L, F) at tokens, or (B, K, T, F) without ``inv`` (K, L)."""
    if inv is None:
        return y.permute(1, 2, 0, 3)
    K = inv.shape[0]
    rows = inv * K + torch.arange(K, dtype=inv.dtype, device=inv.device)[:, None]
    return _swap(y).flatten(1, 2).index_select(1, rows.flatten()).unflatten(1, (K, inv.shape[1]))


# 2 atanh(sqrt(q)) / sqrt(q) on 0 < q <= 1/9, to a relative 4e-9: Chebyshev's interpolation.
_ATANH = (2.000000007681759, 0.6666632164138138, 0.400245952306173, 0.2796515774545786, 0.28157778363552016)


def _softplus(x: Tensor) -> Tensor:
    """max(x, 0) + log1p(exp(-|x|)), without an operator Softplus or Log: ONNX Runtime computes these number by number,
    the former 150 times slower than an addition. log1p(e) = 2 atanh(e / (2 + e))."""
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


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """See :func:`mmlocalmamba.ops.directional_scan`; one step of T is one iteration of the runtime's loop."""
    u, delta, A, B, C, D, src, inv, delta_bias, dt_weight, delta_softplus, in_scan_order = inputs
    if dt_weight is not None:  # runtimes are slower at an Einsum
        delta = delta @ dt_weight.mT
    if u.dim() == 3:
        u = u[:, None]
    dt = _step_size(delta, delta_bias, delta_softplus)
    order = None if in_scan_order else src
    # What a pad reads is 0 but for its step size.
    at_pad = _step_size(delta.new_zeros(1, A.shape[0], 1, A.shape[1]), delta_bias, delta_softplus)[0, :, 0]
    du = _steps_first(dt * u, order, torch.zeros_like(at_pad))
    dt, B, C = _steps_first(dt, order, at_pad), _steps_first(B, order), _steps_first(C, order)
    A = A.transpose(1, 2)
    T, batch, K, width = dt.shape
    N = A.shape[1]
    zero = A.new_zeros(batch, K, N, width)
    if N == 1:
        # All but the recurrence itself is done for all steps at once.
        last, states = _node('Recurrence', [zero, (dt[..., None, :] * A).exp(), du[..., None, :] * B[..., None]],
                             zero.shape, (T, *zero.shape))
        y = states[..., 0, :] * C
    else:
        last, y = _node('SelectiveScan', [zero, dt[..., None, :], du[..., None, :], B[..., None], C[..., None, :], A],
                        zero.shape, (T, batch, K, 1, width))
        y = y.squeeze(-2)
    if in_scan_order and D is not None:
        y = y + D * u.permute(2, 0, 1, 3)
    y = _tokens_first(y, inv)
    if not in_scan_order and D is not None:
        y = y + D[:, None] * u
    return y, last.transpose(2, 3)


def _unavailable(u: Tensor) -> str | None:
    is_exporting = getattr(torch.compiler, 'is_exporting', None)  # not in torch 2.6
    if is_exporting is None or not is_exporting():
        return 'it is for graphs that are exported to ONNX'
    return None if u.dtype == torch.float32 else f'it computes in float32, not in {u.dtype}'


BACKEND = Backend('onnx', scan, _unavailable, home='none', dtypes=(torch.float32, ), low_rank_steps=True)


# What each loop reads at a step, and its body: (operator, inputs, output). ``A`` is of the graph around it.
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
        model: ``onnx_ir.Model``; it is changed.

    Returns:
        How many there were.
    """
    import onnx_ir as ir

    found = [node for node in model.graph if node.domain == DOMAIN]
    for count, node in enumerate(found):
        if node.op_type not in _LOOPS:
            raise NotImplementedError(f'the graph has a node {node.op_type} of {DOMAIN} that no ONNX operator stands '
                                      'for')
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
