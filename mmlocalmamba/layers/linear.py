"""The linear layers of the mixers are plain nn.Linear, the class that quantizers and wrappers of others know."""
from torch import Tensor, nn

from mmlocalmamba.layers.plain import is_plain
from mmlocalmamba.ops import linear


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Compute ``module(x)`` for tokens x (..., C), by :func:`mmlocalmamba.ops.linear` if it is a plain nn.Linear."""
    if is_plain(module, nn.Linear):
        return linear(x, module.weight, module.bias)
    return module(x)
