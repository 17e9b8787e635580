"""The step between two blocks of LocalVim's residual stream."""
from torch import Tensor, nn

from mmlocalmamba.ops import add_rms_norm


class ResidualRMSNorm(nn.RMSNorm):
    """Adds a block's output to the residual stream, rotates the sum and normalises it; see
    :func:`mmlocalmamba.ops.add_rms_norm`. `eps` is a number on every backend and of every dtype: not None, which
    `nn.RMSNorm` has as its default."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor, residual: Tensor | None,
                rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """x, residual (B, L, C), rotary tables (L, C) or None -> normalised sum, sum."""
        return add_rms_norm(x, residual, self.weight, self.eps, *(rotary or ()))
