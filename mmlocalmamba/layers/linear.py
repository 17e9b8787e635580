"""The linear layers of a block."""
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.ops import linear


class TokenLinear(nn.Linear):
    """nn.Linear for tokens (..., in_features), computed by :func:`mmlocalmamba.ops.linear` and initialised as the authors
    do."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        channels: C of input and output.
        hidden: channels between the layers.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TokenLinear(channels, hidden, bias=True)
        self.fc2 = TokenLinear(hidden, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> same shape."""
        return self.fc2(F.gelu(self.fc1(x)))
