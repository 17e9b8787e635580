"""The MLP of a block."""
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.layers.linear import call_linear
from mmlocalmamba.layers.plain import is_plain
from mmlocalmamba.ops import linear_gelu


class MLP(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        channels: C of input and output.
        hidden: channels between the layers.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the layers as the authors do."""
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> same shape."""
        fc1 = self.fc1
        x = linear_gelu(x, fc1.weight, fc1.bias) if is_plain(fc1, nn.Linear) else F.gelu(fc1(x))
        return call_linear(self.fc2, x)
