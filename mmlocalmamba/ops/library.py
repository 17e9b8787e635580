"""The operators of the library ``mmlocalmamba``: schemas, shapes and derivatives. Backends implement them.

All operators are declared on every machine, so that a graph that was exported elsewhere can be loaded:

- ``directional_scan`` returns outputs, last states, and with ``save`` the states at the start of every chunk of
  :data:`CHUNK` steps but the first. From these, ``directional_scan_backward`` recomputes all others.
- ``linear``, ``conv2d_silu``, ``directional_conv``, ``scattn_sum`` and ``norm_gate`` surround the scan in a mixer;
  ``add_rms_norm`` and ``linear_gelu`` are between two mixers. Their backward operators are declared here, too.

Last states are (B, K, N, D) here. Tokens and their gradients may be 16 bits wide. States, parameters, their gradients
and statistics are float32, or float64 if the tokens are. ``wanted`` tells a backward operator which gradients to
compute, in the order of its outputs; the others are returned empty.

:func:`call` calls an operator and also works under ``torch.func.grad`` and ``torch.func.vmap``. Second and forward-mode
derivatives, which the operators do not have, are refused.

The schema is the only place that knows the order of an operator's arguments: all other code in this module uses their
names. A new argument of the scan is a new field of :class:`~mmlocalmamba.ops.dispatch.ScanInputs`, a new argument of
the schemas, and code in the backends.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmlocalmamba.ops.dispatch import BACKEND_VARIABLE, ScanInputs, compute_dtype, without_autocast
from mmlocalmamba.ops.unfused import linear, rotate_back

# csrc/interface.h has the same number.
CHUNK = 32

_LIBRARY = torch.library.Library('mmlocalmamba', 'FRAGMENT')
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_FORWARD: dict[str, Callable] = {}  # what calls an operator below autograd
# Names of the arguments and of the outputs of each operator, in the order of its schema.
_ARGUMENTS: dict[str, tuple[str, ...]] = {}
_OUTPUTS: dict[str, tuple[str, ...]] = {}
_REMEDY = f"use backend='reference', or {BACKEND_VARIABLE}=reference in the environment for a whole model"


def refuse_second_derivative(ctx, *grads):
    """The backward of a backward operator: raise NotImplementedError."""
    raise NotImplementedError(f'the fused operators have no second derivatives: {_REMEDY}')


def refuse_tangent(ctx, *tangents):
    """The forward-mode derivative of an operator: raise NotImplementedError."""
    raise NotImplementedError(f'the fused operators have no forward-mode derivatives (jvp, jacfwd): {_REMEDY}')


def one_by_one(function: Callable) -> Callable:
    """Return the ``vmap`` of an autograd function that calls it once for each sample.

    A tensor that all samples share, such as a weight, gets one gradient for each of them.
    """

    def vmap(info, in_dims, *args):

        def sample(i: int) -> list[Any]:
            return [x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)]

        results = [function(*sample(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0, ) * len(results[0])

    return vmap


def by_name(name: str, function: Callable[..., Any]) -> Callable:
    """Return ``function``, which takes an operator's arguments by name, as a function that takes them in order."""

    def positional(*args, **kwargs):
        return function(**dict(zip(_ARGUMENTS[name], args)), **kwargs)

    return positional


def _save(ctx, **values) -> None:
    """Keep arguments and outputs of an operator for its backward."""
    names = tuple(name for name, x in values.items() if isinstance(x, Tensor))
    ctx.save_for_backward(*(values[name] for name in names))
    ctx.names = names
    ctx.others = {name: x for name, x in values.items() if not isinstance(x, Tensor)}


def _saved(ctx) -> dict[str, Any]:
    """Return what :func:`_save` has kept, by name."""
    return {**ctx.others, **dict(zip(ctx.names, ctx.saved_tensors, strict=True))}


def _save_arguments(ctx, arguments, output):
    _save(ctx, **arguments)


def declare(name: str, schema: str, fake: Callable, backward: Callable | None = None,
            setup_context: Callable | None = None, constants: tuple[str, ...] = ()) -> None:
    """Declare an operator.

    Args:
        name: Name of the operator.
        schema: Its arguments and outputs, all of which have names.
        fake: Takes the arguments by name and returns outputs of the right shape, dtype and strides.
        backward: Maps (ctx, needs, *gradients of the outputs) to {argument: gradient}. ``needs`` tells by name which
            arguments need a gradient; an argument that is left out gets None. Without it, the operator raises
            NotImplementedError if it is differentiated.
        setup_context: Maps (ctx, {argument: value}, outputs) to None. It keeps what ``backward`` reads.
        constants: Arguments without a gradient. The operator raises NotImplementedError if one requires a gradient.
    """
    _LIBRARY.define(name + schema)
    operator = getattr(torch.ops.mmlocalmamba, name).default
    arguments = _ARGUMENTS[name] = tuple(argument.name for argument in operator._schema.arguments)
    _OUTPUTS[name] = tuple(output.name for output in operator._schema.returns)
    torch.library.register_fake(f'mmlocalmamba::{name}', by_name(name, fake), lib=_LIBRARY)

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    def setup(ctx, inputs, output):
        for argument, needed in zip(arguments, ctx.needs_input_grad, strict=True):
            if needed and argument in constants:
                raise NotImplementedError(f'the fused {name} computes no gradient of {argument}, which requires one: '
                                          f'detach it, or {_REMEDY}')
        if setup_context is not None:
            setup_context(ctx, dict(zip(arguments, inputs, strict=True)), output)

    def gradients(ctx, *grads):
        if backward is None:
            return refuse_second_derivative(ctx)
        found = backward(ctx, dict(zip(arguments, ctx.needs_input_grad, strict=True)), *grads)
        return tuple(found.get(argument) for argument in arguments)

    methods = dict(forward=forward, setup_context=setup, backward=gradients, jvp=refuse_tangent,
                   vmap=one_by_one(partial(call, name)))
    function: Any = type(name, (torch.autograd.Function, ),
                         {key: staticmethod(value) for key, value in methods.items()})

    def differentiable(*args):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(f'torch.ops.mmlocalmamba.{name} cannot be transformed by torch.func: call it by '
                                      f'mmlocalmamba.ops, or {_REMEDY}')
        return function.apply(*args) if _is_tracked(args) else forward(*args)

    _LIBRARY.impl(name, differentiable, 'Autograd')
    _FUNCTIONS[name] = function
    _FORWARD[name] = forward


def _is_tracked(args: tuple) -> bool:
    if forward_ad._current_level >= 0:  # inside a forward-mode level, any argument may carry a tangent
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def call(name: str, *args):
    """Call an operator. Under ``torch.func``, call its autograd function: torch needs it above the dispatcher.

    What is not tracked is called below autograd at once: the way through the dispatcher and back to Python takes as
    long as a small operator.
    """
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return _FUNCTIONS[name].apply(*args)
        if not _is_tracked(args) and not torch.jit.is_tracing():
            return _FORWARD[name](*args)
    return getattr(torch.ops.mmlocalmamba, name)(*args)


def _call_by_name(name: str, values: dict[str, Any]):
    """:func:`call` with arguments by name. ``values`` holds all arguments and may hold more."""
    return call(name, *[values[argument] for argument in _ARGUMENTS[name]])


def _call_backward(name: str, needs: dict[str, bool], values: dict[str, Any]) -> dict[str, Tensor | None]:
    """Call a backward operator, and return its outputs by name: None for those that are not needed."""
    wanted = [needs[output] for output in _OUTPUTS[name]]
    grads = _call_by_name(name, {**values, 'wanted': wanted})
    return {output: x if needed else None for output, x, needed in zip(_OUTPUTS[name], grads, wanted, strict=True)}


def _will_be_differentiated(*tensors: Tensor | None) -> bool:
    """Return True if an operator should save what its backward reads. Without it, the backward pass computes it anew,
    as it does for a trace, which serves both."""
    return (torch.is_grad_enabled() and not torch.jit.is_tracing()
            and any(x is not None and x.requires_grad for x in tensors))


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
    """Return an empty tensor of shape (B, K, L, D).

    The CPU kernel gives it the layout of x where the steps of x are contiguous; see csrc/host.h.
    """
    in_columns = x.shape[-1] > 1 and x.stride(-1) != 1 and x.stride(-2) == 1
    if in_columns and src is None and x.device.type == 'cpu':
        return x.new_empty(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    return x.new_empty(shape)


def _only(wanted, outputs):
    """Return the outputs, those that are not wanted as empty tensors."""
    return tuple(x if needed else x.new_empty(0) for x, needed in zip(outputs, wanted, strict=True))


def _fake_scan(u, delta, A, src, tokens, save, **_):
    batch, K, rows = delta.shape[:3]
    steps = rows if src is None else src.shape[1]
    width, N = A.shape[1:]
    state = u.new_empty(0, dtype=compute_dtype(u))
    return (_like(u, src, (batch, K, tokens, width)), state.new_empty(batch, K, N, width),
            state.new_empty(batch, K, max(0, (steps - 1) // CHUNK) if save else 0, N, width))


def _fake_scan_backward(suffix, u, delta, A, B, C, src, dt_weight, wanted, **_):
    channels = A.shape[:2]
    batch, K, rows = delta.shape[:3]
    shape = (batch, K, rows, channels[1])
    # The gradient of a low-rank delta is a factor of matrix products, one for each direction: its rows are contiguous
    # for each direction, and on a CPU they have 32 bits.
    product = compute_dtype(delta) if delta.device.type == 'cpu' and not suffix else delta.dtype
    grad_delta = (_like(delta, src, shape) if dt_weight is None
                  else delta.new_empty(K, batch, *shape[2:], dtype=product).transpose(0, 1))
    return _only(wanted, (_like(u, src, u.shape), grad_delta, A.new_empty(A.shape), B.new_empty(B.shape),
                          C.new_empty(C.shape), A.new_empty(channels), A.new_empty(channels)))


def _setup_scan(ctx, arguments, outputs):
    # The gradient of an unused output stays None: a tensor of zeros would cost as much as the output.
    ctx.set_materialize_grads(False)
    _, _, checkpoints = outputs
    ctx.mark_non_differentiable(checkpoints)
    _save(ctx, **arguments, checkpoints=checkpoints)


def _scan_backward(suffix):

    def backward(ctx, needs, grad_y, grad_last, _):
        if grad_y is None and grad_last is None:
            return {}
        values = _saved(ctx)
        if not values['save']:
            _, _, values['checkpoints'] = _call_by_name(f'directional_scan{suffix}', {**values, 'save': True})
        dt_weight = values['dt_weight']
        # delta = factor (B, K, L, R) times weight (K, D, R): the kernel computes the gradient of the product.
        grads = _call_backward(f'directional_scan_backward{suffix}',
                               {**needs, 'delta': needs['delta'] or needs['dt_weight']},
                               {**values, 'grad_y': grad_y, 'grad_last': grad_last})
        if dt_weight is not None:
            grad: Any = grads.pop('delta')
            factor = values['delta']
            if needs['delta']:
                grads['delta'] = _product(grad, dt_weight.mT).to(factor.dtype)
            if needs['dt_weight']:
                grads['dt_weight'] = _grad_weight(grad, factor.to(grad.dtype), 3).to(dt_weight.dtype)
        return grads

    return backward


# Convolution along scans

_CONV = '(Tensor x, Tensor weight, Tensor? bias, Tensor? src, Tensor? inv) -> Tensor'
_CONV_BACKWARD = ('(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? src, Tensor? inv, bool[3] wanted) '
                  '-> (Tensor x, Tensor weight, Tensor bias)')


def _fake_conv(x, weight, src, **_):
    steps = x.shape[1] if src is None else src.shape[1]
    return x.new_empty(weight.shape[0], x.shape[0], steps, x.shape[2]).transpose(0, 1)


def _fake_conv_backward(x, weight, wanted, **_):
    return _only(wanted, (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])))


def _conv_backward(suffix):

    def backward(ctx, needs, grad):
        return _call_backward(f'directional_conv_backward{suffix}', needs, {**_saved(ctx), 'grad': grad})

    return backward


def declare_scan_and_conv(suffix: str = '') -> None:
    """Declare both operators with ``suffix`` after their names, so that one device can have two implementations."""
    declare(f'directional_scan{suffix}', _SCAN, _fake_scan, _scan_backward(suffix), _setup_scan)
    declare(f'directional_scan_backward{suffix}', _SCAN_BACKWARD, partial(_fake_scan_backward, suffix))
    declare(f'directional_conv{suffix}', _CONV, _fake_conv, _conv_backward(suffix), _save_arguments)
    declare(f'directional_conv_backward{suffix}', _CONV_BACKWARD, _fake_conv_backward)


declare_scan_and_conv()


def run_scan(inputs: ScanInputs, suffix: str = '') -> tuple[Tensor, Tensor]:
    """Run a scan by the operator ``directional_scan``: y (B, K, L, D) and the last states (B, K, D, N)."""
    tokens = inputs.delta.shape[2] if inputs.inv is None else inputs.inv.shape[1]
    more = {'tokens': tokens, 'save': _will_be_differentiated(*inputs.tensors())}
    name = f'directional_scan{suffix}'
    y, last, _ = call(name, *[more[argument] if argument in more else getattr(inputs, argument)
                              for argument in _ARGUMENTS[name]])
    return y, last.transpose(2, 3)


# Linear


def _fake_linear(x, weight, **_):
    if weight.dim() == 3:
        return x.new_empty(weight.shape[0], x.shape[0], *x.shape[2:-1], weight.shape[1]).transpose(0, 1)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _grad_weight(grad, x, weight_dim=2):
    """Return the weight's gradient of a product x (..., I) times weight (O, I)^T, from the product's gradient (..., O).

    ``weight_dim`` 3: K products, x (B, K, T, I) and weight (K, O, I).
    """
    if grad.dim() == 4 and weight_dim == 3:
        return torch.stack([_grad_weight(grad[:, k], x[:, k]) for k in range(grad.shape[1])])
    # oneDNN is fast at every shape in this order. The result is a transposed view.
    return _product(x.flatten(0, -2).t(), grad.flatten(0, -2).t()).t()


def _setup_linear(ctx, arguments, output):
    _save(ctx, x=arguments['x'], weight=arguments['weight'])


def _linear_gradients(x, weight, needs, grad):
    return dict(x=_product(grad, weight.mT) if needs['x'] else None,
                weight=_grad_weight(grad, x, weight.dim()) if needs['weight'] else None,
                bias=grad.flatten(0, -2).sum(0) if needs['bias'] else None)


def _linear_backward(ctx, needs, grad):
    saved = _saved(ctx)
    return _linear_gradients(saved['x'], saved['weight'], needs, grad)


declare('linear', '(Tensor x, Tensor weight, Tensor? bias) -> Tensor', _fake_linear, _linear_backward, _setup_linear)

# Linear and GELU


def _fake_linear_gelu(x, weight, save, **_):
    product = _fake_linear(x, weight)
    return product, torch.empty_like(product) if save else x.new_empty(0)


def _setup_linear_gelu(ctx, arguments, outputs):
    _, product = outputs
    ctx.mark_non_differentiable(product)
    _save(ctx, **arguments, product=product)


def _linear_gelu_backward(ctx, needs, grad, _):
    values = _saved(ctx)
    if not values['save'] or torch.is_grad_enabled():  # a second derivative has to meet the product's inputs
        values['product'] = _call_by_name('linear', values)
    grad = call('linear_gelu_backward', grad, values['product'])
    return _linear_gradients(values['x'], values['weight'], needs, grad)


declare('linear_gelu', '(Tensor x, Tensor weight, Tensor? bias, bool save) -> (Tensor out, Tensor product)',
        _fake_linear_gelu, _linear_gelu_backward, _setup_linear_gelu)
declare('linear_gelu_backward', '(Tensor grad, Tensor product) -> Tensor',
        lambda product, **_: product.new_empty(product.shape))


def run_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the operator ``linear_gelu``, which keeps the product for the backward pass if there is one to come."""
    return call('linear_gelu', x, weight, bias, _will_be_differentiated(x, weight, bias))[0]


# Depthwise 3x3 convolution and SiLU


def _fake_conv2d_backward(x, weight, wanted, **_):
    return _only(wanted, (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])))


def _conv2d_backward(ctx, needs, grad):
    return _call_backward('conv2d_silu_backward', needs, {**_saved(ctx), 'grad': grad})


declare('conv2d_silu', '(Tensor x, Tensor weight, Tensor? bias, SymInt height, SymInt width) -> Tensor',
        lambda x, **_: x.new_empty(x.shape), _conv2d_backward, _save_arguments)
declare('conv2d_silu_backward',
        '(Tensor grad, Tensor x, Tensor weight, Tensor? bias, SymInt height, SymInt width, bool[3] wanted) '
        '-> (Tensor x, Tensor weight, Tensor bias)', _fake_conv2d_backward)

# Sum over directions, LayerNorm and gate


def _fake_norm_gate(y, **_):
    return y.new_empty(y.shape[0], *y.shape[2:])


def _fake_norm_gate_backward(grad, y, weight, wanted, **_):
    batch, _, tokens, width = y.shape
    return _only(wanted, (y.new_empty(batch, 1, tokens, width), grad.new_empty(grad.shape),
                          weight.new_empty(weight.shape), weight.new_empty(weight.shape)))


def _norm_gate_backward(ctx, needs, grad):
    values = _saved(ctx)
    grads = _call_backward('norm_gate_backward', needs, {**values, 'grad': grad})
    if (shared := grads['y']) is not None:  # the same for all directions
        grads['y'] = shared.expand_as(values['y'])
    return grads


declare('norm_gate', '(Tensor y, Tensor? z, Tensor weight, Tensor bias, float eps) -> Tensor', _fake_norm_gate,
        _norm_gate_backward, _save_arguments)
declare('norm_gate_backward',
        '(Tensor grad, Tensor y, Tensor? z, Tensor weight, Tensor bias, float eps, bool[4] wanted) '
        '-> (Tensor y, Tensor z, Tensor weight, Tensor bias)', _fake_norm_gate_backward)

# Sum over directions, gated by SCAttn


_STATISTICS = ('average', 'mean', 'inverse', 'reduced', 'gate')


def _fake_sum(y, norm_weight, reduce_weight, **_):
    batch, K, tokens, width = y.shape
    statistics = [(width, ), (tokens, ), (tokens, ), (reduce_weight.shape[0], ), (width, )]
    return y.new_empty(batch, tokens, width), *(norm_weight.new_empty(batch, K, *shape) for shape in statistics)


def _fake_sum_backward(grad, y, norm_weight, reduce_weight, select_weight, wanted, **_):
    new, width = norm_weight.new_empty, y.shape[-1]
    return _only(wanted, (y.new_empty(y.shape), grad.new_empty(grad.shape), new(width), new(width),
                          new(reduce_weight.shape), new(reduce_weight.shape[0]), new(select_weight.shape), new(width)))


def _setup_sum(ctx, arguments, outputs):
    _, *statistics = outputs
    ctx.mark_non_differentiable(*statistics)
    read = {name: x for name, x in arguments.items() if name in _ARGUMENTS['scattn_sum_backward']}
    _save(ctx, **read, **dict(zip(_STATISTICS, statistics, strict=True)))


def _sum_backward(ctx, needs, grad, *_):
    return _call_backward('scattn_sum_backward', needs, {**_saved(ctx), 'grad': grad})


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


def _fake_norm(x, residual, **_):
    return x.new_empty(x.shape), (x if residual is None else residual).new_empty(x.shape)


def _setup_norm(ctx, arguments, outputs):
    ctx.set_materialize_grads(False)
    _save(ctx, total=outputs[1], dtype=arguments['x'].dtype,
          **{name: arguments[name] for name in ('weight', 'eps', 'cos', 'sin')})


def _norm_backward(ctx, needs, grad, grad_sum):
    saved = _saved(ctx)
    weight, cos, sin, total = saved['weight'], saved['cos'], saved['sin'], saved['total']
    grads = {}
    stream = total.dtype
    if grad is not None:
        total, grad = total.to(weight.dtype), grad.to(weight.dtype)
        inverse = (total.square().mean(-1, keepdim=True) + saved['eps']).rsqrt()
        normal = total * inverse
        if needs['weight']:
            grads['weight'] = (grad * normal).sum((0, 1))
        if needs['x'] or needs['residual']:
            grad = grad * weight
            grad = (grad - normal * (grad * normal).mean(-1, keepdim=True)) * inverse
            grad_sum = grad if grad_sum is None else grad_sum + grad
    if grad_sum is not None and cos is not None:
        grad_sum = rotate_back(grad_sum, cos, sin)
    if grad_sum is not None and needs['x']:
        grads['x'] = grad_sum.to(saved['dtype'])
    if grad_sum is not None and needs['residual']:
        grads['residual'] = grad_sum.to(stream)
    return grads


declare('add_rms_norm',
        '(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor? cos, Tensor? sin) -> (Tensor out, Tensor sum)',
        _fake_norm, _norm_backward, _setup_norm, constants=('cos', 'sin'))
