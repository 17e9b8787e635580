"""The operators of the library ``mmlocalmamba``: schemas, shapes, derivatives. Backends implement them.

They are declared whatever can run here, so that an exported graph that holds them can be read everywhere:

- ``directional_scan``: outputs, last states, and (``save``) the states at the start of every chunk of :data:`CHUNK`
  steps but the first, from which the backward pass recomputes all others; ``directional_scan_backward``;
- ``directional_conv``, ``linear`` and ``scattn_sum``, what stands around the scan in a mixer, and ``add_rms_norm``,
  what stands between two mixers; their backwards.

Last states are (B, K, N, D) here. States are float32, or float64 if u is.
"""
import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import ScanInputs, compute_dtype, without_autocast
from mmlocalmamba.ops.plain import linear, rotate

# Also in csrc/interface.h.
CHUNK = 32


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("the fused operators have no second derivatives: use backend='reference'")


# Scan

SCAN = ('(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? src, SymInt tokens, '
        'Tensor? delta_bias, Tensor? dt_weight, bool delta_softplus, bool in_scan_order, bool save) '
        '-> (Tensor y, Tensor last, Tensor checkpoints)')
SCAN_BACKWARD = (
    '(Tensor? grad_y, Tensor? grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? src, '
    'SymInt tokens, Tensor? delta_bias, Tensor? dt_weight, Tensor checkpoints, bool delta_softplus, '
    'bool in_scan_order) '
    '-> (Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias)')


def _like(x, src, shape):
    """Of the shape (B, K, L, D). The CPU kernel lays it out as x where x's steps lie side by side; see csrc/host.h."""
    in_columns = x.shape[-1] > 1 and x.stride(-1) != 1 and x.stride(-2) == 1
    if in_columns and src is None and x.device.type == 'cpu':
        return x.new_empty(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    return x.new_empty(shape)


def _fake_scan(u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus, in_scan_order, save):
    batch, K, rows = delta.shape[:3]
    steps = rows if src is None else src.shape[1]
    width, N = A.shape[1:]
    state = u.new_empty(0, dtype=compute_dtype(u))
    return (_like(u, src, (batch, K, tokens, width)), state.new_empty(batch, K, N, width),
            state.new_empty(batch, K, max(0, (steps - 1) // CHUNK) if save else 0, N, width))


def _fake_scan_backward(grad_y, grad_last, u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, checkpoints,
                        delta_softplus, in_scan_order):
    channels = A.shape[:2]
    batch, K, rows = delta.shape[:3]
    shape = (batch, K, rows, channels[1])
    # With a factor of delta, all rows of a direction lie together, for the products that follow.
    grad_delta = (_like(delta, src, shape) if dt_weight is None
                  else delta.new_empty(K, batch, *shape[2:]).transpose(0, 1))
    return (_like(u, src, u.shape), grad_delta, A.new_empty(A.shape), B.new_empty(B.shape), C.new_empty(C.shape),
            A.new_empty(channels), A.new_empty(channels))


def _product(x, weight):
    """x (..., I) times weight (O, I)^T, or (B, K, T, I) times (K, O, I)^T, in x's dtype even under autocast."""
    weight = weight.to(x.dtype)
    if x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64):
        return torch.ops.mmlocalmamba.linear(x, weight)
    with without_autocast(x):
        return linear(x, weight)


def _setup_scan(ctx, inputs, output):
    *tensors, tokens, delta_bias, dt_weight, ctx.softplus, ctx.in_scan_order, ctx.saved = inputs
    ctx.tokens = tokens
    # An output that nobody uses has no gradient; a tensor of zeros for it would cost as much as the output.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, delta_bias, dt_weight, output[2])


def _scan_backward(suffix):

    def backward(ctx, grad_y, grad_last, _):
        forward, backward = (getattr(torch.ops.mmlocalmamba, f'directional_{name}{suffix}')
                             for name in ('scan', 'scan_backward'))
        *tensors, delta_bias, dt_weight, checkpoints = ctx.saved_tensors
        if not ctx.saved:
            checkpoints = forward(*tensors, ctx.tokens, delta_bias, dt_weight, ctx.softplus, ctx.in_scan_order,
                                  True)[2]
        *grads, grad_D, grad_bias = backward(grad_y, grad_last, *tensors, ctx.tokens, delta_bias, dt_weight,
                                             checkpoints, ctx.softplus, ctx.in_scan_order)
        grad_weight = None
        if dt_weight is not None:  # delta = factor (B, K, L, R) times weight (K, D, R)
            grad, factor = grads[1], tensors[1]
            grads[1], grad_weight = _product(grad, dt_weight.mT), _grad_weight(grad, factor, 3).to(dt_weight.dtype)
        return (*grads, None if tensors[5] is None else grad_D, None, None,
                None if delta_bias is None else grad_bias, grad_weight, None, None, None)

    return backward


# Convolution along scans

CONV = '(Tensor x, Tensor weight, Tensor? bias, Tensor? src) -> Tensor'
CONV_BACKWARD = ('(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? src) '
                 '-> (Tensor x, Tensor weight, Tensor bias)')


def _fake_conv(x, weight, bias, src):
    steps = x.shape[1] if src is None else src.shape[1]
    return x.new_empty(weight.shape[0], x.shape[0], steps, x.shape[2]).transpose(0, 1)


def _fake_conv_backward(grad, x, weight, bias, src):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _conv_backward(suffix):

    def backward(ctx, grad):
        x, weight, bias, src = ctx.saved_tensors
        backward = getattr(torch.ops.mmlocalmamba, f'directional_conv_backward{suffix}')
        *grads, grad_bias = backward(grad, x, weight, bias, src)
        return *grads, None if bias is None else grad_bias, None

    return backward


def _declare(name, schema, fake, backward, setup_context=None):
    name = f'mmlocalmamba::{name}'
    torch.library.define(name, schema)
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward, setup_context=setup_context)


def declare_scan_and_conv(suffix: str = '') -> None:
    """Declare both operators, with ``suffix`` behind their names: one device can then have two implementations."""
    _declare(f'directional_scan{suffix}', SCAN, _fake_scan, _scan_backward(suffix), _setup_scan)
    _declare(f'directional_scan_backward{suffix}', SCAN_BACKWARD, _fake_scan_backward, _refuse_second_derivative)
    _declare(f'directional_conv{suffix}', CONV, _fake_conv, _conv_backward(suffix),
             lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    _declare(f'directional_conv_backward{suffix}', CONV_BACKWARD, _fake_conv_backward, _refuse_second_derivative)


declare_scan_and_conv()


def run_scan(operator, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """``operator``, a scan as it is declared here, with these arguments."""
    u, delta, A, B, C, D, src, inv, delta_bias, dt_weight, delta_softplus, in_scan_order = inputs
    tokens = delta.shape[2] if inv is None else inv.shape[1]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors())
    y, last, _ = operator(u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus, in_scan_order,
                          save)
    return y, last.transpose(2, 3)


# Linear

torch.library.define('mmlocalmamba::linear', '(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor')


@torch.library.register_fake('mmlocalmamba::linear')
def _fake_linear(x, weight, bias=None):
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
            grad.flatten(0, -2).sum(0) if len(needs) > 2 and needs[2] else None)


torch.library.register_autograd('mmlocalmamba::linear', _linear_backward,
                                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))


# Sum over directions, gated by SCAttn

torch.library.define(
    'mmlocalmamba::scattn_sum',
    '(Tensor y, Tensor? z, Tensor norm_weight, Tensor norm_bias, float eps, Tensor reduce_weight, Tensor reduce_bias, '
    'Tensor select_weight, Tensor select_bias) '
    '-> (Tensor out, Tensor average, Tensor mean, Tensor inverse, Tensor reduced, Tensor gate)')
torch.library.define(
    'mmlocalmamba::scattn_sum_backward',
    '(Tensor grad, Tensor y, Tensor? z, Tensor norm_weight, Tensor norm_bias, Tensor reduce_weight, '
    'Tensor select_weight, Tensor average, Tensor mean, Tensor inverse, Tensor reduced, Tensor gate) '
    '-> (Tensor y, Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor reduce_weight, Tensor reduce_bias, '
    'Tensor select_weight, Tensor select_bias)')


@torch.library.register_fake('mmlocalmamba::scattn_sum')
def _fake_sum(y, z, norm_weight, norm_bias, eps, reduce_weight, reduce_bias, select_weight, select_bias):
    batch, K, tokens, width = y.shape
    return (y.new_empty(batch, tokens, width), y.new_empty(batch, K, width), y.new_empty(batch, K, tokens),
            y.new_empty(batch, K, tokens), y.new_empty(batch, K, reduce_weight.shape[0]), y.new_empty(batch, K, width))


@torch.library.register_fake('mmlocalmamba::scattn_sum_backward')
def _fake_sum_backward(grad, y, z, norm_weight, norm_bias, reduce_weight, select_weight, average, mean, inverse,
                       reduced, gate):
    width = y.shape[-1]
    return (y.new_empty(y.shape), y.new_empty(0 if z is None else z.shape), y.new_empty(width), y.new_empty(width),
            y.new_empty(reduce_weight.shape), y.new_empty(reduce_weight.shape[0]), y.new_empty(select_weight.shape),
            y.new_empty(width))


def _setup_sum(ctx, inputs, output):
    y, z, norm_weight, norm_bias, _, reduce_weight, _, select_weight, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(y, z, norm_weight, norm_bias, reduce_weight, select_weight, *output[1:])


def _sum_backward(ctx, grad, *_):
    saved = ctx.saved_tensors  # to be asked for once only, for the sake of activation checkpoints
    y, z, *grads = torch.ops.mmlocalmamba.scattn_sum_backward(grad, *saved)
    return y, None if saved[1] is None else z, *grads[:2], None, *grads[2:]


torch.library.register_autograd('mmlocalmamba::scattn_sum', _sum_backward, setup_context=_setup_sum)
torch.library.register_autograd('mmlocalmamba::scattn_sum_backward', _refuse_second_derivative)


# Sum, rotation and norm between two mixers

torch.library.define(
    'mmlocalmamba::add_rms_norm',
    '(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor? cos, Tensor? sin) -> (Tensor out, Tensor sum)')


@torch.library.register_fake('mmlocalmamba::add_rms_norm')
def _fake_norm(x, residual, weight, eps, cos, sin):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_norm(ctx, inputs, output):
    _, residual, weight, ctx.eps, cos, sin = inputs
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, cos, sin, output[1])


def _norm_backward(ctx, grad, grad_sum):
    weight, cos, sin, total = ctx.saved_tensors
    grad_weight = None
    if grad is not None:
        inverse = (total.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normal = total * inverse
        grad_weight = (grad * normal).sum((0, 1))
        grad = grad * weight
        grad = (grad - normal * (grad * normal).mean(-1, keepdim=True)) * inverse
        grad_sum = grad if grad_sum is None else grad_sum + grad
    if grad_sum is not None and cos is not None:
        grad_sum = rotate(grad_sum, cos, -sin)
    return grad_sum, grad_sum if ctx.has_residual else None, grad_weight, None, None, None


torch.library.register_autograd('mmlocalmamba::add_rms_norm', _norm_backward, setup_context=_setup_norm)
