"""Spatial and channel attention over the outputs of a scan (paper section 4.1, Fig. 3b)."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.layers.plain import is_plain
from mmlocalmamba.ops import scattn_sum


class SCAttn(nn.Module):
    """Weights tokens and channels of one direction's features before the directions are summed.

    Channel branch: LayerNorm -> mean over tokens -> Linear(C, C/r) -> GELU -> Linear(C/r, C) -> sigmoid.
    Spatial branch: each token, reduced to C/r, beside the reduced global mean -> Linear(2C/r, 1) -> sigmoid.

    The authors' code has the spatial branch commented out, and their checkpoints and published parameter counts are
    those of the channel branch alone, hence the default.

    Args:
        channels: C of the features.
        reduction: r, by which the gates' hidden layer is narrower.
        spatial: add the spatial branch, as in the paper's figure.

    Raises:
        ValueError: the reduction leaves no channel.
    """

    def __init__(self, channels: int, reduction: int = 8, spatial: bool = False) -> None:
        super().__init__()
        reduced = channels // reduction
        if reduced < 1:
            raise ValueError(f'SCAttn: reduction={reduction} leaves no channel of {channels}; use at most {channels}')
        self.norm = nn.LayerNorm(channels)
        self.global_reduce = nn.Linear(channels, reduced)
        self.channel_select = nn.Linear(reduced, channels)
        self.local_reduce = nn.Linear(channels, reduced) if spatial else None
        self.spatial_select = nn.Linear(2 * reduced, 1) if spatial else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the linear layers as the authors do."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def gate(self, x: Tensor) -> Tensor:
        """Weights in (0, 1) for x (..., L, C): (..., 1, C), with the spatial branch (..., L, C)."""
        x = self.norm(x)
        x_global = F.gelu(self.global_reduce(x.mean(-2, keepdim=True)))
        gate = self.channel_select(x_global).sigmoid()
        if self.local_reduce is not None and self.spatial_select is not None:
            x_local = F.gelu(self.local_reduce(x))
            x_both = torch.cat([x_local, x_global.expand_as(x_local)], dim=-1)
            gate = gate * self.spatial_select(x_both).sigmoid()
        return gate

    def forward(self, x: Tensor) -> Tensor:
        """x (..., L, C) -> same shape."""
        return x * self.gate(x)

    def sum_directions(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """Sum over K of ``forward(y * silu(z))``: y (B, K, L, C), z (B, L, C) or None -> (B, L, C)."""
        if (self.spatial_select is None and is_plain(self, SCAttn) and is_plain(self.norm, nn.LayerNorm)
                and is_plain(self.global_reduce, nn.Linear) and is_plain(self.channel_select, nn.Linear)):
            return scattn_sum(y, z, self.norm.weight, self.norm.bias, self.norm.eps, self.global_reduce.weight,
                              self.global_reduce.bias, self.channel_select.weight, self.channel_select.bias)
        return self(y if z is None else y * F.silu(z)[:, None]).sum(1)
