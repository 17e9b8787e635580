"""The norms of LocalVim: between two blocks of its residual stream, and at its end."""
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.ops import add_rms_norm


class ResidualRMSNorm(nn.RMSNorm):
    """Add a block's output to the residual stream, rotate the sum and normalise it; see
    :func:`mmlocalmamba.ops.add_rms_norm`.

    ``eps`` is a number, not None as by default in ``nn.RMSNorm``, so that it is the same on every backend and for every
    dtype.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor, residual: Tensor | None,
                rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """x, residual (B, L, C), rotary tables (L, C) or None -> normalised sum, sum."""
        return add_rms_norm(x, residual, self.weight, self.eps, *(rotary or ()))


class FinalRMSNorm(nn.LayerNorm):
    """nn.RMSNorm that tools of others recognise as a norm.

    mmcv's ``is_norm`` asks for nn.LayerNorm. mmpretrain's ``vis_cam`` finds the layer whose output it draws by it, and
    would draw SCAttn's norm instead, whose output is no image.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> same shape."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
