"""The relaxed choice of scan directions (paper eq. 5)."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The paper's search space, in the authors' order.
CANDIDATES = ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip')


class MixedScan(nn.Module):
    """Sum of all candidates' features, weighted by the softmax of learnable logits.

    Each branch passes a LayerNorm without affine first, as in the authors' code, so that no branch wins by its scale.

    Args:
        candidates: number of directions K.
    """

    def __init__(self, candidates: int) -> None:
        super().__init__()
        self.alphas = nn.Parameter(1e-3 * torch.randn(candidates))

    def forward(self, y: Tensor) -> Tensor:
        """y (B, K, L, D) -> (B, L, D)."""
        probabilities = self.alphas.softmax(0).to(y.dtype)
        return torch.einsum('bkld,k->bld', F.layer_norm(y, y.shape[-1:]), probabilities)
