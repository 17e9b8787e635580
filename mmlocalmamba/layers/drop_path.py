"""Stochastic depth."""
import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch for whole samples in training, and scale up what is kept (arXiv 1603.09382).

    Args:
        drop_prob: probability that a sample's branch becomes zero.
    """

    def __init__(self, drop_prob: float = 0.1) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> same shape and dtype."""
        if self.drop_prob == 0. or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = (keep + torch.rand((x.shape[0], *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)).floor()
        return x.div(keep) * kept

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob}'
