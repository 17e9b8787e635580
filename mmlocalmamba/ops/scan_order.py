"""The parts that PyTorch backends share: moving tokens through a table, and step sizes."""
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Gather x (B, L, F) or (B, K, L, F) by index (K, T): (B, K, T, F)."""
    # One index_select for each direction is the fastest gather.
    shared = x.dim() == 3
    return torch.stack([(x if shared else x[:, k]).index_select(1, row) for k, row in enumerate(index)], dim=1)


def read(x: Tensor, src: Tensor, inv: Tensor) -> Tensor:
    """Return tokens (B, L, F) or (B, K, L, F) in the order of ``src`` (K, T), pads as zeros: (B, K, T, F)."""
    y = _take(x, src.clamp(min=0))
    return y.masked_fill((src < 0)[..., None], 0) if src.shape[1] > inv.shape[1] else y


def write(x: Tensor, inv: Tensor) -> Tensor:
    """Return sequences (B, K, T, F) at their tokens' positions, (B, K, L, F). Outputs of pads are dropped."""
    return _take(x, inv)


class _Read(torch.autograd.Function):
    """:func:`read` with a gather as its gradient, since every direction reads each token once.

    The gradient by autograd would be a slower scatter-add.
    """

    @staticmethod
    def forward(ctx, x, src, inv):
        ctx.save_for_backward(src, inv)
        ctx.shared = x.dim() == 3
        return read(x, src, inv)

    @staticmethod
    def backward(ctx, grad):
        grad = _Write.apply(grad, *ctx.saved_tensors)
        return (grad.sum(1) if ctx.shared else grad), None, None


class _Write(torch.autograd.Function):
    """:func:`write` with a gather as its gradient."""

    @staticmethod
    def forward(ctx, x, src, inv):
        ctx.save_for_backward(src, inv)
        return write(x, inv)

    @staticmethod
    def backward(ctx, grad):
        return _Read.apply(grad, *ctx.saved_tensors), None, None


def _transformed() -> bool:
    """Return True inside forward-mode derivatives and ``torch.func``, which need differentiable operations."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active())


def to_scan_order(x: Tensor, src: Tensor, inv: Tensor) -> Tensor:
    """:func:`read` with a fast gradient."""
    return read(x, src, inv) if _transformed() else _Read.apply(x, src, inv)


def from_scan_order(x: Tensor, src: Tensor, inv: Tensor) -> Tensor:
    """:func:`write` with a fast gradient."""
    return write(x, inv) if _transformed() else _Write.apply(x, src, inv)


def real_output(y: Tensor) -> Tensor:
    """Return 2 Re(y) if y is complex: a real system has each complex state and its conjugate."""
    return 2 * y.real if y.is_complex() else y


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Return dt (B, K, T, D) from delta and its bias (K, D)."""
    if bias is not None:
        delta = delta + bias[:, None]
    return F.softplus(delta) if softplus else delta
