"""The norms of ``mamba_ssm.ops.triton.layer_norm`` (2.3; ``layernorm`` in 1.x). Import them from
:mod:`mmlocalmamba.ops.stand_ins`."""
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.ops import add_rms_norm
from mmlocalmamba.ops.dispatch import check_dtypes, compute_dtype, expect_shape, without_autocast


def _drop(x: Tensor, p: float, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Drop values of x with probability p, or where the mask is False. Returns x and the mask that was used."""
    if p == 0:
        return x, None
    if mask is None:
        mask = torch.rand(x.shape, device=x.device) >= p
    return x.masked_fill(~mask, 0) / (1 - p), mask


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    if not rms:
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
    y = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return y if bias is None else y + bias.to(x.dtype)


def _add_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, x1: Tensor | None,
              weight1: Tensor | None, bias1: Tensor | None, eps: float, dropout_p: float, rowscale: Tensor | None,
              rms: bool, masks: tuple[Tensor | None, Tensor | None] = (None, None)) -> Any:
    """Return the norms of the sum (the second is None without ``weight1``), the sum in the dtype that it is computed
    in, and the masks of the dropout."""
    check_dtypes(x=x, weight=weight, bias=bias, residual=residual, x1=x1, weight1=weight1, bias1=bias1,
                 rowscale=rowscale)
    width = x.shape[-1:]
    for name, tensor in (('weight', weight), ('bias', bias), ('weight1', weight1), ('bias1', bias1)):
        expect_shape(name, tensor, tuple(width), '(C,)')
    for name, tensor in (('residual', residual), ('x1', x1)):
        expect_shape(name, tensor, tuple(x.shape), "x's shape")
    expect_shape('rowscale', rowscale, tuple(x.shape[:-1]), "x's shape without channels")
    if x1 is not None and rowscale is not None:
        raise ValueError('rowscale must be None with x1')
    if not 0 <= dropout_p < 1:
        raise ValueError(f'dropout_p must be at least 0 and below 1, got {dropout_p}')
    compute = compute_dtype(x)
    others = (bias, x1, weight1, rowscale)
    if rms and dropout_p == 0 and all(tensor is None for tensor in others) and (
            residual is None or residual.dtype == compute):
        rows = (1, -1, *width)
        y, total = add_rms_norm(x.reshape(rows), None if residual is None else residual.reshape(rows), weight, eps)
        return y.view(x.shape), None, total.view(x.shape), (None, None)
    with without_autocast(x):
        total = x.to(compute)
        if rowscale is not None:
            total = total * rowscale.to(compute)[..., None]
        total, mask = _drop(total, dropout_p, masks[0])
        mask1 = None
        if x1 is not None:
            second, mask1 = _drop(x1.to(compute), dropout_p, masks[1])
            total = total + second
        if residual is not None:
            total = total + residual.to(compute)
        y = _norm(total, weight, bias, eps, rms).to(x.dtype)
        y1 = None if weight1 is None else _norm(total, weight1, bias1, eps, rms).to(x.dtype)
    return y, y1, total, (mask, mask1)


def layer_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                  x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None,
                  eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
                  residual_in_fp32: bool = False, is_rms_norm: bool = False, return_dropout_mask: bool = False) -> Any:
    """Add to the residual stream and normalise the sum: norm(dropout(x * rowscale) + dropout(x1) + residual).

    Args:
        x: (..., C).
        weight, bias: (C,); the bias may be None.
        residual: The residual stream, of x's shape, or None.
        x1: A second summand of x's shape, or None.
        weight1, bias1: (C,) of a second norm of the sum, or None.
        eps: Added to the variance, or to the mean square.
        dropout_p: Probability to drop a value of x and x1. The random numbers are torch's, not those of mamba_ssm.
        rowscale: A factor for each row of x, of x's shape without channels, or None.
        prenorm: If True, also return the sum.
        residual_in_fp32: The sum has 32 bits at least, if ``residual`` is None.
        is_rms_norm: RMSNorm instead of LayerNorm.
        return_dropout_mask: If True, also return the masks of x and x1, True where a value is kept, or None.

    Returns:
        The norm in x's dtype, computed in float32 at least; with ``weight1`` the second norm; with ``prenorm`` the sum
        in the dtype of the residual; with ``return_dropout_mask`` two masks.

    Raises:
        ValueError: Shapes do not match, ``rowscale`` is given with ``x1``, or ``dropout_p`` is no probability below 1.
        TypeError: A tensor holds integers.
    """
    y, y1, total, masks = _add_norm(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale,
                                    is_rms_norm)
    stream = residual.dtype if residual is not None else compute_dtype(x) if residual_in_fp32 else x.dtype
    found = [y, *([] if weight1 is None else [y1]), *([total.to(stream)] if prenorm else []),
             *(masks if return_dropout_mask else ())]
    return found[0] if len(found) == 1 else tuple(found)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None,
                eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
                residual_in_fp32: bool = False, return_dropout_mask: bool = False) -> Any:
    """Call :func:`layer_norm_fn` with ``is_rms_norm=True``."""
    return layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
                         residual_in_fp32, True, return_dropout_mask)


def _reference(rms: bool, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, x1: Tensor | None,
               weight1: Tensor | None, bias1: Tensor | None, eps: float, dropout_p: float, rowscale: Tensor | None,
               prenorm: bool, masks: tuple[Tensor | None, Tensor | None], upcast: bool) -> Any:
    y, y1, total, _ = _add_norm(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, rms, masks)
    found = [y, *([] if weight1 is None else [y1]),
             *([total.to(compute_dtype(x) if upcast else x.dtype)] if prenorm else [])]
    return found[0] if len(found) == 1 else tuple(found)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                   x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None,
                   eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
                   dropout_mask: Tensor | None = None, dropout_mask1: Tensor | None = None,
                   upcast: bool = False) -> Any:
    """Compute :func:`layer_norm_fn` with given masks. The sum has x's dtype, with ``upcast`` 32 bits at least."""
    return _reference(False, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
                      (dropout_mask, dropout_mask1), upcast)


def rms_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
                 x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None,
                 eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
                 dropout_mask: Tensor | None = None, dropout_mask1: Tensor | None = None,
                 upcast: bool = False) -> Any:
    """Compute :func:`rms_norm_fn` with given masks. The sum has x's dtype, with ``upcast`` 32 bits at least."""
    return _reference(True, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
                      (dropout_mask, dropout_mask1), upcast)


class RMSNorm(nn.Module):
    """The RMSNorm of mamba_ssm: ``weight`` (C,), and ``bias``, which is None.

    Args:
        hidden_size: C.
        eps: Added to the mean square.
        dropout_p: Probability to drop a value of x in training.
        device, dtype: Of the weight.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None,
                 dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False,
                residual_in_fp32: bool = False) -> Any:
        """Call :func:`rms_norm_fn`."""
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(x, self.weight, self.bias, residual=residual, eps=self.eps, dropout_p=dropout_p,
                           prenorm=prenorm, residual_in_fp32=residual_in_fp32)
