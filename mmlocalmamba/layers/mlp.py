"""The MLP of a block."""
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.layers.scattn import _is_plain
from mmlocalmamba.ops import linear


def _call(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias) if _is_plain(layer, nn.Linear) else layer(x)


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
        return _call(self.fc2, F.gelu(_call(self.fc1, x)))
