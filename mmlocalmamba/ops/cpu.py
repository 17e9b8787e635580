"""The native CPU kernels (csrc/): vectorised over channels, parallel over sequences and channels, with own backwards.

The extension is optional: without it :func:`unavailable` says why, and the PyTorch backends do the work. The
operators are declared here in any case, so that an exported graph that holds them can be read everywhere:

- ``mmlocalmamba::directional_scan``: outputs, last states, and (``save``) the states at the start of every chunk but
  the first, from which the backward pass recomputes all others;
- ``mmlocalmamba::directional_scan_backward``;
- ``mmlocalmamba::linear``, ``directional_conv`` and ``scattn_sum``, what stands around the scan in a mixer.

Last states are (B, K, N, D) here. The environment variable ``MMLOCALMAMBA_CPU_ISA`` (avx512, avx2 or portable)
overrules the choice of the instruction set.
"""
from importlib import import_module

import torch
from torch import Tensor

# Why the extension cannot be used, or None.
_missing: str | None = None
try:
    _cpu = import_module('mmlocalmamba.ops._cpu')
    if _cpu.TORCH_VERSION != torch.__version__.split('+')[0]:
        _missing = (f'the extension was built for torch {_cpu.TORCH_VERSION}, this is {torch.__version__}: '
                    'install the package again')
except ModuleNotFoundError:
    _missing = 'the extension is not built: install the package again, with torch and a C++ compiler at hand'
except ImportError as error:
    _missing = f'the extension cannot be loaded, install the package again ({error})'

# Also in csrc/scan.h.
_CHUNK = 32

torch.library.define(
    'mmlocalmamba::directional_scan',
    '(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? src, SymInt tokens, Tensor? delta_bias, '
    'Tensor? dt_weight, bool delta_softplus, bool in_scan_order, bool save) '
    '-> (Tensor y, Tensor last, Tensor checkpoints)')
torch.library.define(
    'mmlocalmamba::directional_scan_backward',
    '(Tensor? grad_y, Tensor? grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? src, '
    'SymInt tokens, Tensor? delta_bias, Tensor? dt_weight, Tensor checkpoints, bool delta_softplus, '
    'bool in_scan_order) '
    '-> (Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias)')


@torch.library.register_fake('mmlocalmamba::directional_scan')
def _fake(u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus, in_scan_order, save):
    batch, K, rows = delta.shape[:3]
    steps = rows if src is None else src.shape[1]
    width, N = A.shape[1:]
    return (u.new_empty(batch, K, tokens, width), u.new_empty(batch, K, N, width),
            u.new_empty(batch, K, max(0, (steps - 1) // _CHUNK) if save else 0, N, width))


@torch.library.register_fake('mmlocalmamba::directional_scan_backward')
def _fake_backward(grad_y, grad_last, u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, checkpoints,
                   delta_softplus, in_scan_order):
    channels = A.shape[:2]
    batch, K, rows = delta.shape[:3]
    shape = (batch, K, rows, channels[1])
    grad_delta = u.new_empty(shape) if dt_weight is None else u.new_empty(K, batch, *shape[2:]).transpose(0, 1)
    return (u.new_empty(u.shape), grad_delta, u.new_empty(A.shape), u.new_empty(B.shape),
            u.new_empty(C.shape), u.new_empty(channels), u.new_empty(channels))


def _setup_context(ctx, inputs, output):
    *tensors, tokens, delta_bias, dt_weight, ctx.softplus, ctx.in_scan_order, ctx.saved = inputs
    ctx.tokens = tokens
    # An output that nobody uses has no gradient; a tensor of zeros for it would cost as much as the output.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, delta_bias, dt_weight, output[2])


def _backward(ctx, grad_y, grad_last, _):
    *tensors, delta_bias, dt_weight, checkpoints = ctx.saved_tensors
    if not ctx.saved:
        checkpoints = torch.ops.mmlocalmamba.directional_scan(
            *tensors, ctx.tokens, delta_bias, dt_weight, ctx.softplus, ctx.in_scan_order, True)[2]
    *grads, grad_D, grad_bias = torch.ops.mmlocalmamba.directional_scan_backward(
        grad_y, grad_last, *tensors, ctx.tokens, delta_bias, dt_weight, checkpoints, ctx.softplus, ctx.in_scan_order)
    grad_weight = None
    if dt_weight is not None:
        grads[1], grad_weight = _backward_of_factor(grads[1], tensors[1], dt_weight)
    return (*grads, None if tensors[5] is None else grad_D, None, None,
            None if delta_bias is None else grad_bias, grad_weight, None, None, None)


def _backward_of_factor(grad, factor, weight):
    """Gradients of delta = factor (B, K, L, R) times weight (K, D, R), from that of delta (B, K, L, D)."""
    return _product(grad, weight.mT), _grad_weight(grad, factor, 3)


def _twice(ctx, *grads):
    raise NotImplementedError("backend 'cpu' has no second derivatives: use backend='reference'")


torch.library.register_autograd('mmlocalmamba::directional_scan', _backward, setup_context=_setup_context)
torch.library.register_autograd('mmlocalmamba::directional_scan_backward', _twice)


# Linear

torch.library.define('mmlocalmamba::linear', '(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor')
_product = torch.ops.mmlocalmamba.linear


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias)


# Convolution along scans

torch.library.define('mmlocalmamba::directional_conv', '(Tensor x, Tensor weight, Tensor? bias, Tensor? src) -> Tensor')
torch.library.define('mmlocalmamba::directional_conv_backward',
                     '(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? src) '
                     '-> (Tensor x, Tensor weight, Tensor bias)')


@torch.library.register_fake('mmlocalmamba::directional_conv')
def _fake_conv(x, weight, bias, src):
    steps = x.shape[1] if src is None else src.shape[1]
    return x.new_empty(weight.shape[0], x.shape[0], steps, x.shape[2]).transpose(0, 1)


@torch.library.register_fake('mmlocalmamba::directional_conv_backward')
def _fake_conv_backward(grad, x, weight, bias, src):
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty(weight.shape[:2])


def _conv_backward(ctx, grad):
    x, weight, bias, src = ctx.saved_tensors
    *grads, grad_bias = torch.ops.mmlocalmamba.directional_conv_backward(grad, x, weight, bias, src)
    return *grads, None if bias is None else grad_bias, None


torch.library.register_autograd('mmlocalmamba::directional_conv', _conv_backward,
                                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
torch.library.register_autograd('mmlocalmamba::directional_conv_backward', _twice)


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor | None, src: Tensor | None) -> Tensor:
    return torch.ops.mmlocalmamba.directional_conv(x, weight, bias, src)


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
torch.library.register_autograd('mmlocalmamba::scattn_sum_backward', _twice)


def scattn_sum(y: Tensor, z: Tensor | None, *weights) -> Tensor:
    return torch.ops.mmlocalmamba.scattn_sum(y, z, *weights)[0]


# Scan

def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, src: Tensor | None,
         inv: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
         in_scan_order: bool, dt_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`mmlocalmamba.ops.directional_scan`; returns y (B, K, L, D) and the last states (B, K, D, N)."""
    tokens = delta.shape[2] if inv is None else inv.shape[1]
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, delta, A, B, C, D, delta_bias, dt_weight))
    y, last, _ = torch.ops.mmlocalmamba.directional_scan(
        u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus, in_scan_order, save)
    return y, last.transpose(2, 3)


def unavailable(u: Tensor) -> str | None:
    return 'it is for CPU tensors' if u.device.type != 'cpu' else _missing


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty without the extension."""
    return [] if _missing else _cpu.instruction_sets()
