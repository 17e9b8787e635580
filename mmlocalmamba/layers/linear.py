"""The linear layer of the mixers."""
from torch import Tensor, nn

from mmlocalmamba.ops import linear


class TokenLinear(nn.Linear):
    """nn.Linear without bias for tokens (..., in_features), computed by :func:`mmlocalmamba.ops.linear` and initialised
    as the authors do."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
