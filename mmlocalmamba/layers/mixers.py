"""The two SSM mixers: LocalVMamba's (a 2-D convolution, then K scans) and LocalVim's (K scans, a 1-D convolution each).

Tokens are channels-last (B, L, D) throughout; directions are tables (see :mod:`mmlocalmamba.scans`).
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.layers.scattn import SCAttn
from mmlocalmamba.ops import directional_conv, directional_scan, linear
from mmlocalmamba.scans import ScanTables, check_scan, scan_tables

WINDOW_PADS = ('zero', 'none')


class Selection(NamedTuple):
    """The part of a mixer that one step of the direction search scans.

    Attributes:
        weights: (k,) of the scanned directions' features in their sum; None: all are 1.
        directions: int64 (k,), indices of the scanned directions; None: all.
        channels: int64 (c,), sorted indices of the scanned inner channels; None: all.
    """
    weights: Tensor | None = None
    directions: Tensor | None = None
    channels: Tensor | None = None


_ALL = Selection()


def _pick(x: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(dim, index)


class DirectionalSSM(nn.Module):
    """Projections and state matrices of K selective scans (paper section 3.2), with Mamba's initialisation.

    The projections act on each token alone, so they commute with any permutation: one product over unpermuted tokens
    serves all directions.

    Args:
        channels: inner width D.
        directions: their number K.
        d_state: number of states N.
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

    def forward(self, x: Tensor, tables: ScanTables, in_scan_order: bool = False,
                selection: Selection = _ALL) -> Tensor:
        """x (B, L, D), or in scan order (B, K, T, D) -> (B, K, L, D) at original positions.

        With a ``selection``, x and the tables hold its directions and channels only.
        """
        _, directions, channels = selection
        x_proj_weight = _pick(_pick(self.x_proj_weight, 0, directions), 2, channels)
        dt_proj_weight, dt_proj_bias, A_log, D = (
            _pick(_pick(parameter, 0, directions), 1, channels)
            for parameter in (self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D))
        if channels is not None:  # a part of the sum over channels stands for all of it
            x_proj_weight = x_proj_weight * (self.x_proj_weight.shape[2] / x_proj_weight.shape[2])
        if in_scan_order:
            projected = linear(x, x_proj_weight)
        else:
            projected = linear(x, x_proj_weight.flatten(0, 1))
            projected = projected.unflatten(-1, x_proj_weight.shape[:2]).transpose(1, 2)
        dt, B, C = projected.split(self.splits, dim=-1)
        A = -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()
        return directional_scan(x, dt, A, B, C, D, tables, dt_proj_bias, delta_softplus=True,
                                in_scan_order=in_scan_order, dt_weight=dt_proj_weight)


class Linear(nn.Linear):
    """nn.Linear by :func:`mmlocalmamba.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
        self.in_proj = Linear(channels, 2 * inner, bias=False)
        self.ssm = DirectionalSSM(inner, len(self.directions), d_state,
                                  math.ceil(channels / 16) if dt_rank == 'auto' else dt_rank)
        self.scattn = SCAttn(inner, **(scattn if isinstance(scattn, dict) else {})) if scattn else None
        self.mixed_scan = mixed_scan
        self.out_proj = Linear(inner, channels, bias=False)
        nn.init.trunc_normal_(self.in_proj.weight, std=0.02)
        nn.init.trunc_normal_(self.out_proj.weight, std=0.02)
        if self.scattn is not None:
            for module in self.scattn.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)

    def select(self) -> Selection:
        """What this step scans: everything, but in a search."""
        return _ALL if self.mixed_scan is None else self.mixed_scan.select(self.out_proj.in_features)

    def merge(self, y: Tensor, x: Tensor, z: Tensor | None = None, selection: Selection = _ALL) -> Tensor:
        """Gate the directions' features y (B, K, L, D) by silu(z), weigh them and sum them: (B, L, D). Channels that
        were not scanned come from x (B, L, D), gated as well and normalised like a branch of the search."""
        if self.mixed_scan is None:
            if self.scattn is not None:
                return self.scattn.sum_directions(y, z)
            return y.sum(1) if z is None else y.sum(1) * F.silu(z)
        gate = None if z is None else F.silu(z)
        if gate is not None:
            y = y * _pick(gate, -1, selection.channels)[:, None]
        if self.scattn is not None:
            y = self.scattn(y, selection.channels)
        y = self.mixed_scan(y, selection.weights)
        if selection.channels is None:
            return y
        rest = x if gate is None else x * gate
        return F.layer_norm(rest, rest.shape[-1:]).to(y.dtype).index_copy(-1, selection.channels, y)

    def extra_repr(self) -> str:
        return f'directions={", ".join(self.directions)}'


class LocalVMambaMixer(_Mixer):
    """SS2D of VMamba with local scans: linear, depthwise 2-D convolution, K scans, SCAttn, sum, norm, gate, linear.

    Args:
        channels: C of input and output.
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
        selection = self.select()
        tables = scan_tables(self.directions, *size, pad=self.pad, device=x.device)
        tables = ScanTables(*(_pick(table, 0, selection.directions) for table in tables))
        y = self.ssm(_pick(x, -1, selection.channels), tables, selection=selection)
        return self.out_proj(self.out_norm(self.merge(y, x, selection=selection)) * F.silu(z))


class LocalVimMixer(_Mixer):
    """Mamba block of Vim with K scans: linear, and per direction a causal 1-D convolution along the scan, scan, gate,
    SCAttn; then sum and linear.

    Args:
        channels, directions, expand, d_state, dt_rank, scattn, mixed_scan: as in LocalVMambaMixer.
        d_conv: kernel size of the causal convolution.
        window_pad: as in LocalVMambaMixer. With 'zero', pads pass through the convolution, whose bias makes them feed
            the state.
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

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, L, C), size (H, W), L = H*W (+ 1 with a middle token) -> (B, L, C)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        tables = scan_tables(self.directions, *size, pad=self.pad, middle_token=self.middle_token, device=x.device)
        selection = self.select()
        tables = ScanTables(*(_pick(table, 0, selection.directions) for table in tables))
        weight, bias = (_pick(_pick(parameter, 0, selection.directions), 1, selection.channels)
                        for parameter in (self.conv_weight, self.conv_bias))
        scanned = directional_conv(_pick(x, -1, selection.channels), weight, bias, tables)
        y = self.ssm(scanned, tables, in_scan_order=True, selection=selection)
        unscanned = x if selection.channels is None else F.silu(x)
        return self.out_proj(self.merge(y, unscanned, z, selection))
