"""The two SSM mixers: LocalVMamba's (a 2-D convolution, then K scans) and LocalVim's (K scans, a 1-D convolution each).

Tokens are channels-last (B, L, D) throughout; directions are tables (see :mod:`mmlocalmamba.scans`).
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.layers.scattn import SCAttn
from mmlocalmamba.ops import directional_scan
from mmlocalmamba.ops.common import to_scan_order
from mmlocalmamba.scans import ScanTables, check_scan, scan_tables

WINDOW_PADS = ('zero', 'none')


class DirectionalSSM(nn.Module):
    """Projections and state matrices of K selective scans (paper section 3.2), with Mamba's initialisation.

    The projections act on each token alone, so they commute with any permutation: one product over unpermuted tokens
    serves all directions.

    Args:
        channels: D.
        directions: K.
        d_state: N.
        dt_rank: R, rank of the projection to the step sizes.
        dt_min, dt_max: range of the initial step sizes, softplus(dt_proj_bias).
    """

    def __init__(self, channels: int, directions: int, d_state: int, dt_rank: int, dt_min: float = 1e-3,
                 dt_max: float = 1e-1) -> None:
        super().__init__()
        self.splits = (dt_rank, d_state, d_state)
        self.x_proj_weight = nn.Parameter(torch.empty(directions, sum(self.splits), channels))
        self.dt_proj_weight = nn.Parameter(torch.empty(directions, channels, dt_rank))
        dt = torch.exp(torch.empty(directions, channels).uniform_(math.log(dt_min), math.log(dt_max)))
        self.dt_proj_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1., d_state + 1).log().repeat(directions, channels, 1))
        self.D = nn.Parameter(torch.ones(directions, channels))
        bound = channels ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        nn.init.uniform_(self.dt_proj_weight, -dt_rank ** -0.5, dt_rank ** -0.5)

    def forward(self, x: Tensor, tables: ScanTables, in_scan_order: bool = False) -> Tensor:
        """x (B, L, D), or in scan order (B, K, T, D) -> (B, K, L, D) at original positions."""
        if in_scan_order:
            projected = torch.einsum('bktd,kcd->bktc', x, self.x_proj_weight)
        else:
            projected = F.linear(x, self.x_proj_weight.flatten(0, 1))
            projected = projected.unflatten(-1, self.x_proj_weight.shape[:2]).transpose(1, 2)
        dt, B, C = projected.split(self.splits, dim=-1)
        delta = torch.einsum('bktr,kdr->bktd', dt, self.dt_proj_weight)
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        return directional_scan(x, delta, A, B, C, self.D, tables, self.dt_proj_bias,
                                delta_softplus=True, in_scan_order=in_scan_order)


class _Mixer(nn.Module):
    """What both mixers share: input and output projection, scans, SCAttn, merging of the directions."""

    def __init__(self, channels: int, directions: Sequence[str], expand: float, d_state: int,
                 dt_rank: int | str, scattn: bool | dict, mixed_scan: nn.Module | None,
                 window_pad: str) -> None:
        super().__init__()
        if window_pad not in WINDOW_PADS:
            raise ValueError(f'window_pad must be one of {WINDOW_PADS}, got {window_pad!r}')
        for name in directions:
            check_scan(name)
        self.directions = tuple(directions)
        self.pad = window_pad == 'zero'
        inner = int(expand * channels)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.ssm = DirectionalSSM(inner, len(self.directions), d_state,
                                  math.ceil(channels / 16) if dt_rank == 'auto' else dt_rank)
        self.scattn = SCAttn(inner, **(scattn if isinstance(scattn, dict) else {})) if scattn else None
        self.mixed_scan = mixed_scan
        self.out_proj = nn.Linear(inner, channels, bias=False)
        nn.init.trunc_normal_(self.in_proj.weight, std=0.02)
        nn.init.trunc_normal_(self.out_proj.weight, std=0.02)
        if self.scattn is not None:
            for module in self.scattn.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)

    def merge(self, y: Tensor) -> Tensor:
        """Weigh the directions' features (B, K, L, D) and sum them: (B, L, D)."""
        if self.scattn is not None:
            y = self.scattn(y)
        return y.sum(1) if self.mixed_scan is None else self.mixed_scan(y)

    def extra_repr(self) -> str:
        return f'directions={", ".join(self.directions)}'


class LocalVMambaMixer(_Mixer):
    """SS2D of VMamba with local scans: linear, depthwise 2-D convolution, K scans, SCAttn, sum, norm, gate, linear.

    Args:
        channels: C.
        directions: K scan names.
        expand: inner width D / C.
        d_state, dt_rank: of the state space; dt_rank 'auto' is ceil(C / 16).
        d_conv: kernel size of the depthwise convolution.
        scattn: False, True, or arguments of SCAttn.
        mixed_scan: the relaxation of the direction search instead of the plain sum.
        window_pad: 'zero' scans the pads of incomplete windows (the authors' behaviour), 'none' real tokens only.
    """

    def __init__(self, channels: int, directions: Sequence[str], expand: float = 2., d_state: int = 16,
                 dt_rank: int | str = 'auto', d_conv: int = 3, scattn: bool | dict = True,
                 mixed_scan: nn.Module | None = None, window_pad: str = 'zero') -> None:
        super().__init__(channels, directions, expand, d_state, dt_rank, scattn, mixed_scan, window_pad)
        inner = self.out_proj.in_features
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=(d_conv - 1) // 2, groups=inner)
        self.out_norm = nn.LayerNorm(inner)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, H*W, C), size (H, W) -> (B, H*W, C)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = x.unflatten(1, size).permute(0, 3, 1, 2)
        x = F.silu(self.conv2d(x)).permute(0, 2, 3, 1).flatten(1, 2)
        y = self.ssm(x, scan_tables(self.directions, *size, pad=self.pad, device=x.device))
        return self.out_proj(self.out_norm(self.merge(y)) * F.silu(z))


class LocalVimMixer(_Mixer):
    """Mamba block of Vim with K scans: linear, and per direction a causal 1-D convolution along the scan, scan, gate,
    SCAttn; then sum and linear.

    Args:
        channels, directions, expand, d_state, dt_rank, scattn, mixed_scan, window_pad: as in LocalVMambaMixer. With
            'zero', pads pass through the convolution, whose bias makes them feed the state.
        d_conv: kernel size of the causal convolution.
        middle_token: the tokens contain a class token at position H*W // 2.
    """

    def __init__(self, channels: int, directions: Sequence[str], expand: float = 2., d_state: int = 16,
                 dt_rank: int | str = 'auto', d_conv: int = 4, scattn: bool | dict = True,
                 mixed_scan: nn.Module | None = None, window_pad: str = 'zero', middle_token: bool = False) -> None:
        super().__init__(channels, directions, expand, d_state, dt_rank, scattn, mixed_scan, window_pad)
        self.middle_token = middle_token
        K, inner = len(self.directions), self.out_proj.in_features
        self.conv_weight = nn.Parameter(torch.empty(K, inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(K, inner))
        for parameter in (self.conv_weight, self.conv_bias):  # as nn.Conv1d with one input channel a group
            nn.init.uniform_(parameter, -d_conv ** -0.5, d_conv ** -0.5)

    def _conv(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution along the scans x (B, K, T, D)."""
        batch, K, T, inner = x.shape
        kernel = self.conv_weight.shape[-1]
        x = F.conv1d(x.transpose(2, 3).reshape(batch, K * inner, T), self.conv_weight.flatten(0, 1)[:, None],
                     self.conv_bias.flatten(), padding=kernel - 1, groups=K * inner)
        return x[..., :T].unflatten(1, (K, inner)).transpose(2, 3)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, L, C), size (H, W), L = H*W (+ 1 with a middle token) -> (B, L, C)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        tables = scan_tables(self.directions, *size, pad=self.pad, middle_token=self.middle_token, device=x.device)
        x = F.silu(self._conv(to_scan_order(x, *tables)))
        y = self.ssm(x, tables, in_scan_order=True)
        return self.out_proj(self.merge(y * F.silu(z)[:, None]))
