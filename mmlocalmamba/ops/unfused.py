"""The ops around the scan in plain PyTorch, for every device and dtype, with all derivatives.

The fused versions are tested against these.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.directions import ScanTables
from mmlocalmamba.ops.scan_order import to_scan_order


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`mmlocalmamba.ops.linear`."""
    return torch.einsum('bkti,koi->bkto', x, weight) if weight.dim() == 3 else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`mmlocalmamba.ops.linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias))


def conv2d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """See :func:`mmlocalmamba.ops.conv2d_silu`."""
    x = x.unflatten(1, size).permute(0, 3, 1, 2)
    x = F.silu(F.conv2d(x, weight, bias, padding=1, groups=weight.shape[0]))
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def norm_gate(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`mmlocalmamba.ops.norm_gate`."""
    y = y[:, 0] if y.shape[1] == 1 else y.sum(1)
    y = F.layer_norm(y, weight.shape, weight, bias, eps)
    return y if z is None else y * F.silu(z)


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tables: ScanTables) -> Tensor:
    """See :func:`mmlocalmamba.ops.directional_conv`."""
    K, width, taps = weight.shape
    x = to_scan_order(x, *tables)
    batch, _, T, _ = x.shape
    x = F.conv1d(x.transpose(2, 3).reshape(batch, K * width, T), weight.flatten(0, 1)[:, None],
                 None if bias is None else bias.flatten(), padding=taps - 1, groups=K * width)
    return F.silu(x[..., :T].unflatten(1, (K, width)).transpose(2, 3))


def scattn_sum(y: Tensor, z: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, reduce_weight: Tensor,
               reduce_bias: Tensor, select_weight: Tensor, select_bias: Tensor) -> Tensor:
    """See :func:`mmlocalmamba.ops.scattn_sum`."""
    y = y if z is None else y * F.silu(z)[:, None]
    average = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps).mean(-2, keepdim=True)
    gate = F.linear(F.gelu(F.linear(average, reduce_weight, reduce_bias)), select_weight, select_bias).sigmoid()
    return (y * gate).sum(1)


def _quarter_turn(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x (..., L, C) by the angles of cos, sin (L, C). Returns x's dtype."""
    return x * cos.to(x.dtype) + _quarter_turn(x) * sin.to(x.dtype)


def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of :func:`rotate`'s input from that of its output (..., L, C).

    It is also right for resized tables, which are not rotations: cos and sin differ within a pair.
    """
    return grad * cos.to(grad.dtype) - _quarter_turn(grad * sin.to(grad.dtype))


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cos: Tensor | None = None,
                 sin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`mmlocalmamba.ops.add_rms_norm`."""
    total = x if residual is None else residual + x
    if cos is not None:
        total = rotate(total, cos, sin)
    return F.rms_norm(total, weight.shape, weight, eps).to(x.dtype), total
