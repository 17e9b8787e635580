"""The operators of the library ``mmlocalmamba``: schemas, shapes, derivatives. Backends implement them.

They are declared whatever can run here, so that an exported graph that holds them can be read everywhere:

- ``directional_scan``: outputs, last states, and (``save``) the states at the start of every chunk of :data:`CHUNK`
  steps but the first, from which the backward pass recomputes all others; ``directional_scan_backward``;
- ``directional_conv``, ``linear`` and ``scattn_sum``, what stands around the scan in a mixer, and ``add_rms_norm``,
  what stands between two mixers; their backwards.

Last states are (B, K, N, D) here. Tokens, and their gradients, may be 16 bits wide; states, parameters, their gradients
and statistics are float32, or float64 if the tokens are. A backward operator is told which gradients
are wanted (``wanted``, in the order of its outputs); the others come out empty.

Operators are called by :func:`call`, which also works under ``torch.func.grad`` and ``torch.func.vmap``. Derivatives
that they do not have, second and forward-mode ones, are refused.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmlocalmamba.ops.dispatch import BACKEND_VARIABLE, ScanInputs, compute_dtype, without_autocast
from mmlocalmamba.ops.plain import linear, rotate_back

# Also in csrc/interface.h.
CHUNK = 32

_LIBRARY = torch.library.Library('mmlocalmamba', 'FRAGMENT')
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_REMEDY = f"use backend='reference', or {BACKEND_VARIABLE}=reference in the environment for a whole model"


def refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(f'the fused operators have no second derivatives: {_REMEDY}')


def refuse_tangent(ctx, *tangents):
    raise NotImplementedError(f'the fused operators have no forward-mode derivatives (jvp, jacfwd): {_REMEDY}')


def one_by_one(function: Callable) -> Callable:
    """The ``vmap`` of an autograd function: one call after the other. What is shared by the samples, weights say, has a
    gradient for each of them."""

    def vmap(info, in_dims, *args):

        def sample(i: int) -> list[Any]:
            return [x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)]

        results = [function(*sample(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0, ) * len(results[0])

    return vmap


def _save_nothing(ctx, inputs, output):
    pass


def declare(name: str, schema: str, fake: Callable, backward: Callable = refuse_second_derivative,
            setup_context: Callable = _save_nothing) -> None:
    """Declare an operator.

    Args:
        fake: outputs of the right shape, dtype and strides.
        backward, setup_context: as those of ``torch.autograd.Function``. Without them it cannot be differentiated.
    """
    _LIBRARY.define(name + schema)
    torch.library.register_fake(f'mmlocalmamba::{name}', fake, lib=_LIBRARY)
    operator = getattr(torch.ops.mmlocalmamba, name).default

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    methods = dict(forward=forward, setup_context=setup_context, backward=backward, jvp=refuse_tangent,
                   vmap=one_by_one(partial(call, name)))
    function: Any = type(name, (torch.autograd.Function, ),
                         {key: staticmethod(value) for key, value in methods.items()})

    def differentiable(*args):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(f'torch.ops.mmlocalmamba.{name} cannot be transformed by torch.func: call it by '
                                      f'mmlocalmamba.ops, or {_REMEDY}')
        tracked = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        # With forward-mode derivatives about, there may be some here.
        return function.apply(*args) if tracked or forward_ad._current_level >= 0 else forward(*args)

    _LIBRARY.impl(name, differentiable, 'Autograd')
    _FUNCTIONS[name] = function


def call(name: str, *args):
    """An operator's result. ``torch.func`` must see the function behind it, which it looks for above the dispatcher."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name].apply(*args)
    return getattr(torch.ops.mmlocalmamba, name)(*args)


def _product(x, weight):
    """x (..., I) times weight (O, I)^T, or (B, K, T, I) times (K, O, I)^T, in x's dtype even under autocast."""
    weight = weight.to(x.dtype)
    if x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64, torch.bfloat16):
        return call('linear', x, weight, None)
    with without_autocast(x):
        return linear(x, weight)


# Scan

_SCAN = ('(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? src, SymInt tokens, '
         'Tensor? delta_bias, Tensor? dt_weight, bool delta_softplus, bool in_scan_order, bool save) '
         '-> (Tensor y, Tensor last, Tensor checkpoints)')
_SCAN_BACKWARD = (
    '(Tensor? grad_y, Tensor? grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? src, '
    'SymInt tokens, Tensor? delta_bias, Tensor? dt_weight, Tensor checkpoints, bool delta_softplus, '
    'bool in_scan_order, bool[7] wanted) '
    '-> (Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias)')


def _like(x, src, shape):
    """Of the shape (B, K, L, D). The CPU kernel lays it out as x where x's steps lie side by side; see csrc/host.h."""
    in_columns = x.shape[-1] > 1 and x.stride(-1) != 1 and x.stride(-2) == 1
    if in_columns and src is None and x.device.type == 'cpu':
        return x.new_empty(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    return x.new_empty(shape)


def _only(wanted, outputs):
    """An output that nobody wants is empty."""
    return tuple(x if needed else x.new_empty(0) for x, needed in zip(outputs, wanted, strict=True))


def _fake_scan(u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus, in_scan_order, save):
    batch, K, rows = delta.shape[:3]
    steps = rows if src is None else src.shape[1]
    width, N = A.shape[1:]
    state = u.new_empty(0, dtype=compute_dtype(u))
    return (_like(u, src, (batch, K, tokens, width)), state.new_empty(batch, K, N, width),
            state.new_empty(batch, K, max(0, (steps - 1) // CHUNK) if save else 0, N, width))


def _fake_scan_backward(suffix, grad_y, grad_last, u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight,
                        checkpoints, delta_softplus, in_scan_order, wanted):
    channels = A.shape[:2]
    batch, K, rows = delta.shape[:3]
    shape = (batch, K, rows, channels[1])
    # With a factor of delta, all rows of a direction lie together, for the products that follow; on a CPU in 32 bits.
    product = compute_dtype(delta) if delta.device.type == 'cpu' and not suffix else delta.dtype
    grad_delta = (_like(delta, src, shape) if dt_weight is None
                  else delta.new_empty(K, batch, *shape[2:], dtype=product).transpose(0, 1))
    return _only(wanted, (_like(u, src, u.shape), grad_delta, A.new_empty(A.shape), B.new_empty(B.shape),
                          C.new_empty(C.shape), A.new_empty(channels), A.new_empty(channels)))


def _setup_scan(ctx, inputs, output):
    *tensors, ctx.tokens, delta_bias, dt_weight, ctx.softplus, ctx.in_scan_order, ctx.saved = inputs
    # An output that nobody uses has no gradient; a tensor of zeros for it would cost as much as the output.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, delta_bias, dt_weight, output[2])


def _scan_backward(suffix):

    def backward(ctx, grad_y, grad_last, _):
        *tensors, delta_bias, dt_weight, checkpoints = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad_y is None and grad_last is None:
            return (None, ) * len(needs)
        if not ctx.saved:
            checkpoints = call(f'directional_scan{suffix}', *tensors, ctx.tokens, delta_bias, dt_weight, ctx.softplus,
                               ctx.in_scan_order, True)[2]
        # u, delta (or one of its factors), A, B, C, D, delta_bias
        wanted = [needs[0], needs[1] or needs[9], *needs[2:6], needs[8]]
        grads = call(f'directional_scan_backward{suffix}', grad_y, grad_last, *tensors, ctx.tokens, delta_bias,
                     dt_weight, checkpoints, ctx.softplus, ctx.in_scan_order, wanted)
        # Not `*grads, grad_bias = ...`, which torch.compile makes a tuple of where it traces this function.
        grads = [x if needed else None for x, needed in zip(grads, wanted, strict=True)]
        grad_bias = grads.pop()
        grad_weight = None
        if dt_weight is not None:  # delta = factor (B, K, L, R) times weight (K, D, R)
            grad: Any = grads[1]
            factor = tensors[1]
            grads[1] = _product(grad, dt_weight.mT).to(factor.dtype) if needs[1] else None
            grad_weight = _grad_weight(grad, factor.to(grad.dtype), 3).to(dt_weight.dtype) if needs[9] else None
        return *grads, None, None, grad_bias, grad_weight, None, None, None

    return backward


# Convolution along scans

_CONV = '(Tensor x, Tensor weight, Tensor? bias, Tensor? src, Tensor? inv) -> Tensor'
_CONV_BACKWARD = ('(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? src, Tensor? inv, bool[3] wanted) '
                  '-> (Tensor x, Tensor weight, Tensor bias)')


def _fake_conv(x, weight, bias, src, inv):
    steps = x.shape[1] if src is None else src.shape[1]
    return x.new_empty(weight.shape[0], x.shape[0], steps, x.shape[2]).transpose(0, 1)


def _fake_conv_backward(grad, x, weight, bias, src, inv, wanted):
    return _only(wanted, (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])))


def _conv_backward(suffix):

    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:3])
        grads = call(f'directional_conv_backward{suffix}', grad, *ctx.saved_tensors, wanted)
        return *(x if needed else None for x, needed in zip(grads, wanted, strict=True)), None, None

    return backward


def declare_scan_and_conv(suffix: str = '') -> None:
    """Declare both operators, with ``suffix`` behind their names: one device can then have two implementations."""
    declare(f'directional_scan{suffix}', _SCAN, _fake_scan, _scan_backward(suffix), _setup_scan)
    declare(f'directional_scan_backward{suffix}', _SCAN_BACKWARD, partial(_fake_scan_backward, suffix))
    declare(f'directional_conv{suffix}', _CONV, _fake_conv, _conv_backward(suffix),
            lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    declare(f'directional_conv_backward{suffix}', _CONV_BACKWARD, _fake_conv_backward)


declare_scan_and_conv()


def run_scan(inputs: ScanInputs, suffix: str = '') -> tuple[Tensor, Tensor]:
    """The scan as it is declared here."""
    u, delta, A, B, C, D, src, inv, delta_bias, dt_weight, delta_softplus, in_scan_order = inputs
    tokens = delta.shape[2] if inv is None else inv.shape[1]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors())
    y, last, _ = call(f'directional_scan{suffix}', u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight,
                      delta_softplus, in_scan_order, save)
    return y, last.transpose(2, 3)


# Linear


def _fake_linear(x, weight, bias):
    if weight.dim() == 3:
        return x.new_empty(weight.shape[0], x.shape[0], *x.shape[2:-1], weight.shape[1]).transpose(0, 1)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _grad_weight(grad, x, weight_dim=2):
    """Of a product x (..., I) times weight (O, I)^T, from its gradient (..., O); or of K products."""
    if grad.dim() == 4 and weight_dim == 3:
        return torch.stack([_grad_weight(grad[:, k], x[:, k]) for k in range(grad.shape[1])])
    # In this order oneDNN is fast at every shape; the result is a transposed view.
    return _product(x.flatten(0, -2).t(), grad.flatten(0, -2).t()).t()


def _linear_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (_product(grad, weight.mT) if needs[0] else None,
            _grad_weight(grad, x, weight.dim()) if needs[1] else None,
            grad.flatten(0, -2).sum(0) if needs[2] else None)


declare('linear', '(Tensor x, Tensor weight, Tensor? bias) -> Tensor', _fake_linear, _linear_backward,
        lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))

# Sum over directions, gated by SCAttn


def _fake_sum(y, z, norm_weight, norm_bias, eps, reduce_weight, reduce_bias, select_weight, select_bias):
    batch, K, tokens, width = y.shape
    kept = [(width, ), (tokens, ), (tokens, ), (reduce_weight.shape[0], ), (width, )]
    return y.new_empty(batch, tokens, width), *(norm_weight.new_empty(batch, K, *shape) for shape in kept)


def _fake_sum_backward(grad, y, z, norm_weight, norm_bias, reduce_weight, select_weight, average, mean, inverse,
                       reduced, gate, wanted):
    new, width = norm_weight.new_empty, y.shape[-1]
    return _only(wanted, (y.new_empty(y.shape), grad.new_empty(grad.shape), new(width), new(width),
                          new(reduce_weight.shape), new(reduce_weight.shape[0]), new(select_weight.shape), new(width)))


def _setup_sum(ctx, inputs, output):
    y, z, norm_weight, norm_bias, _, reduce_weight, _, select_weight, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(y, z, norm_weight, norm_bias, reduce_weight, select_weight, *output[1:])


def _sum_backward(ctx, grad, *_):
    needs = ctx.needs_input_grad
    wanted = [*needs[:4], *needs[5:]]
    grads = call('scattn_sum_backward', grad, *ctx.saved_tensors, wanted)
    grads = [x if needed else None for x, needed in zip(grads, wanted, strict=True)]
    return *grads[:4], None, *grads[4:]


declare('scattn_sum',
        '(Tensor y, Tensor? z, Tensor norm_weight, Tensor norm_bias, float eps, Tensor reduce_weight, '
        'Tensor reduce_bias, Tensor select_weight, Tensor select_bias) '
        '-> (Tensor out, Tensor average, Tensor mean, Tensor inverse, Tensor reduced, Tensor gate)',
        _fake_sum, _sum_backward, _setup_sum)
declare('scattn_sum_backward',
        '(Tensor grad, Tensor y, Tensor? z, Tensor norm_weight, Tensor norm_bias, Tensor reduce_weight, '
        'Tensor select_weight, Tensor average, Tensor mean, Tensor inverse, Tensor reduced, Tensor gate, '
        'bool[8] wanted) '
        '-> (Tensor y, Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor reduce_weight, Tensor reduce_bias, '
        'Tensor select_weight, Tensor select_bias)',
        _fake_sum_backward)

# Sum, rotation and norm between two mixers


def _fake_norm(x, residual, weight, eps, cos, sin):
    return x.new_empty(x.shape), (x if residual is None else residual).new_empty(x.shape)


def _setup_norm(ctx, inputs, output):
    x, _, weight, ctx.eps, cos, sin = inputs
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, cos, sin, output[1])


def _norm_backward(ctx, grad, grad_sum):
    weight, cos, sin, total = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_weight = None
    stream = total.dtype
    if grad is not None:
        total, grad = total.to(weight.dtype), grad.to(weight.dtype)
        inverse = (total.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normal = total * inverse
        if needs[2]:
            grad_weight = (grad * normal).sum((0, 1))
        if needs[0] or needs[1]:
            grad = grad * weight
            grad = (grad - normal * (grad * normal).mean(-1, keepdim=True)) * inverse
            grad_sum = grad if grad_sum is None else grad_sum + grad
    if grad_sum is not None and cos is not None:
        grad_sum = rotate_back(grad_sum, cos, sin)
    grad_x = grad_sum.to(ctx.dtype) if grad_sum is not None and needs[0] else None
    grad_residual = grad_sum.to(stream) if grad_sum is not None and needs[1] else None
    return grad_x, grad_residual, grad_weight, None, None, None


declare('add_rms_norm',
        '(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor? cos, Tensor? sin) -> (Tensor out, Tensor sum)',
        _fake_norm, _norm_backward, _setup_norm)
