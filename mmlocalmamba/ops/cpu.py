"""The native CPU kernel (csrc/): vectorised over channels, parallel over sequences and channels, with its own backward.

The extension is optional: without it :func:`unavailable` says why, and the PyTorch backends do the work. The
operators are declared here in any case, so that an exported graph that holds them can be read everywhere:

- ``mmlocalmamba::directional_scan``: outputs, last states, and (``save``) the states at the start of every chunk but
  the first, from which the backward pass recomputes all others;
- ``mmlocalmamba::directional_scan_backward``.

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
    'bool delta_softplus, bool in_scan_order, bool save) -> (Tensor y, Tensor last, Tensor checkpoints)')
torch.library.define(
    'mmlocalmamba::directional_scan_backward',
    '(Tensor? grad_y, Tensor? grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? src, '
    'SymInt tokens, Tensor? delta_bias, Tensor checkpoints, bool delta_softplus, bool in_scan_order) '
    '-> (Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias)')


@torch.library.register_fake('mmlocalmamba::directional_scan')
def _fake(u, delta, A, B, C, D, src, tokens, delta_bias, delta_softplus, in_scan_order, save):
    batch, K, rows, width = delta.shape
    steps = rows if src is None else src.shape[1]
    N = A.shape[-1]
    return (u.new_empty(batch, K, tokens, width), u.new_empty(batch, K, N, width),
            u.new_empty(batch, K, max(0, (steps - 1) // _CHUNK) if save else 0, N, width))


@torch.library.register_fake('mmlocalmamba::directional_scan_backward')
def _fake_backward(grad_y, grad_last, u, delta, A, B, C, D, src, tokens, delta_bias, checkpoints, delta_softplus,
                   in_scan_order):
    channels = A.shape[:2]
    return (u.new_empty(u.shape), u.new_empty(delta.shape), u.new_empty(A.shape), u.new_empty(B.shape),
            u.new_empty(C.shape), u.new_empty(channels), u.new_empty(channels))


def _setup_context(ctx, inputs, output):
    *tensors, tokens, delta_bias, ctx.softplus, ctx.in_scan_order, ctx.saved = inputs
    ctx.tokens = tokens
    # An output that nobody uses has no gradient; a tensor of zeros for it would cost as much as the output.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, delta_bias, output[2])


def _backward(ctx, grad_y, grad_last, _):
    *tensors, delta_bias, checkpoints = ctx.saved_tensors
    if not ctx.saved:
        checkpoints = torch.ops.mmlocalmamba.directional_scan(
            *tensors, ctx.tokens, delta_bias, ctx.softplus, ctx.in_scan_order, True)[2]
    *grads, grad_D, grad_bias = torch.ops.mmlocalmamba.directional_scan_backward(
        grad_y, grad_last, *tensors, ctx.tokens, delta_bias, checkpoints, ctx.softplus, ctx.in_scan_order)
    return (*grads, None if tensors[5] is None else grad_D, None, None,
            None if delta_bias is None else grad_bias, None, None, None)


def _twice(ctx, *grads):
    raise NotImplementedError("backend 'cpu' has no second derivatives: use backend='reference'")


torch.library.register_autograd('mmlocalmamba::directional_scan', _backward, setup_context=_setup_context)
torch.library.register_autograd('mmlocalmamba::directional_scan_backward', _twice)


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, src: Tensor | None,
         inv: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
         in_scan_order: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmlocalmamba.ops.directional_scan`; returns y (B, K, L, D) and the last states (B, K, D, N)."""
    tokens = delta.shape[2] if inv is None else inv.shape[1]
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, delta, A, B, C, D, delta_bias))
    y, last, _ = torch.ops.mmlocalmamba.directional_scan(
        u, delta, A, B, C, D, src, tokens, delta_bias, delta_softplus, in_scan_order, save)
    return y, last.transpose(2, 3)


def unavailable(u: Tensor) -> str | None:
    return 'it is for CPU tensors' if u.device.type != 'cpu' else _missing


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty without the extension."""
    return [] if _missing else _cpu.instruction_sets()
