"""The two SSM mixers: LocalVMamba's (a 2-D convolution, then K scans) and LocalVim's (K scans, a 1-D convolution each).

Tokens are channels-last (B, L, D) throughout. Directions are tables, which the backbone makes once a forward pass (see
:mod:`mmlocalmamba.directions`).
"""
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.directions import ScanTables, check_scan
from mmlocalmamba.layers.linear import call_linear
from mmlocalmamba.layers.plain import is_plain
from mmlocalmamba.layers.scattn import SCAttn
from mmlocalmamba.layers.ssm import DirectionalSSM
from mmlocalmamba.ops import conv2d_silu, directional_conv, norm_gate


class _Mixer(nn.Module):
    """Base class of both mixers: input and output projection, scans, SCAttn, sum over the directions."""

    def __init__(self, channels: int, directions: Sequence[str], expand: float, d_state: int,
                 dt_rank: int | Literal['auto'], scattn: bool | dict, gate: bool = True) -> None:
        super().__init__()
        for name in directions:
            check_scan(name)
        self.directions = tuple(directions)
        self.gate = gate
        inner = int(expand * channels)
        self.in_proj = nn.Linear(channels, 2 * inner if gate else inner, bias=False)
        self.ssm = DirectionalSSM(inner, len(self.directions), d_state,
                                  math.ceil(channels / 16) if dt_rank == 'auto' else dt_rank)
        self.scattn = SCAttn(inner, **(scattn if isinstance(scattn, dict) else {})) if scattn else None
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def reset_parameters(self) -> None:
        """Initialise the projections as the authors do."""
        for projection in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(projection.weight, std=0.02)

    def scan(self, x: Tensor, tables: ScanTables) -> Tensor:
        """Scan x (B, L, D) along K directions: (B, K, L, D)."""
        raise NotImplementedError

    def scan_and_sum(self, x: Tensor, tables: ScanTables, z: Tensor | None = None) -> Tensor:
        """Scan x (B, L, D) along all directions, gate by silu(z (B, L, D)) and SCAttn, and sum: (B, L, D)."""
        y = self.scan(x, tables)
        if self.scattn is not None:
            return self.scattn.sum_directions(y, z)
        return y.sum(1) if z is None else y.sum(1) * F.silu(z)

    def extra_repr(self) -> str:
        return f'directions={", ".join(self.directions)}'


def _convolve(conv: nn.Conv2d, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute SiLU of ``conv`` for tokens x (B, H*W, D) on a grid of this size (H, W)."""
    if is_plain(conv, nn.Conv2d) and (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode,
                                      conv.groups) == ((3, 3), (1, 1), (1, 1), (1, 1), 'zeros', conv.out_channels):
        return conv2d_silu(x, conv.weight, conv.bias, size)
    return F.silu(conv(x.unflatten(1, size).permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)


class LocalVMambaMixer(_Mixer):
    """SS2D of VMamba with local scans: linear, depthwise 2-D convolution, K scans, SCAttn, sum, norm, gate, linear.

    Args:
        channels: C of input and output.
        directions: K scan names.
        expand: inner width D / C.
        d_state, dt_rank: of the state space; dt_rank 'auto' is ceil(C / 16).
        d_conv: kernel size of the depthwise convolution.
        scattn: False, True, or arguments of SCAttn.
        gate: multiply by silu(z), where z is a second half of the input projection. VMamba's version 2 has no gate.
        conv_bias: give the convolution a bias. VMamba's version 2 has none.
    """

    def __init__(self, channels: int, directions: Sequence[str], expand: float = 2., d_state: int = 16,
                 dt_rank: int | Literal['auto'] = 'auto', d_conv: int = 3, scattn: bool | dict = True,
                 gate: bool = True, conv_bias: bool = True) -> None:
        super().__init__(channels, directions, expand, d_state, dt_rank, scattn, gate)
        inner = self.out_proj.in_features
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=(d_conv - 1) // 2, groups=inner, bias=conv_bias)
        self.out_norm = nn.LayerNorm(inner)
        self.reset_parameters()

    def scan(self, x: Tensor, tables: ScanTables) -> Tensor:
        return self.ssm(x, tables)

    def summands(self, x: Tensor, tables: ScanTables) -> Tensor:
        """Return tensors (B, k, L, D), whose sum over k is :meth:`scan_and_sum`; the norm that follows adds them."""
        return self.scan(x, tables) if self.scattn is None else self.scan_and_sum(x, tables)[:, None]

    def forward(self, x: Tensor, size: tuple[int, int], tables: ScanTables) -> Tensor:
        """x (B, H*W, C), size (H, W), tables of this mixer's directions -> (B, H*W, C)."""
        x = call_linear(self.in_proj, x)
        z = None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        y = self.summands(_convolve(self.conv2d, x, size), tables)
        norm = self.out_norm
        if is_plain(norm, nn.LayerNorm):
            y = norm_gate(y, z, norm.weight, norm.bias, norm.eps)
        else:
            y = norm(y.sum(1))
            y = y if z is None else y * F.silu(z)
        return call_linear(self.out_proj, y)


class LocalVimMixer(_Mixer):
    """Mamba block of Vim with K scans: linear, and per direction a causal 1-D convolution along the scan, scan, gate,
    SCAttn; then sum and linear.

    Pads pass through the convolution, whose bias makes them feed the state.

    Args:
        channels, directions, expand, d_state, dt_rank, scattn: as in LocalVMambaMixer.
        d_conv: kernel size of the causal convolution.
    """

    def __init__(self, channels: int, directions: Sequence[str], expand: float = 2., d_state: int = 16,
                 dt_rank: int | Literal['auto'] = 'auto', d_conv: int = 4, scattn: bool | dict = True) -> None:
        super().__init__(channels, directions, expand, d_state, dt_rank, scattn)
        K, inner = len(self.directions), self.out_proj.in_features
        self.conv_weight = nn.Parameter(torch.empty(K, inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(K, inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections as the authors do, and the convolutions as nn.Conv1d does for one input channel a
        group."""
        super().reset_parameters()
        bound = self.conv_weight.shape[-1] ** -0.5
        for parameter in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(parameter, -bound, bound)

    def scan(self, x: Tensor, tables: ScanTables) -> Tensor:
        return self.ssm(directional_conv(x, self.conv_weight, self.conv_bias, tables), tables, True)

    def forward(self, x: Tensor, tables: ScanTables) -> Tensor:
        """x (B, L, C), tables of this mixer's directions over L tokens -> (B, L, C)."""
        x, z = call_linear(self.in_proj, x).chunk(2, dim=-1)
        return call_linear(self.out_proj, self.scan_and_sum(x, tables, z))
