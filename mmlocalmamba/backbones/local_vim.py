"""LocalVim: Vim's plain hierarchy with local scans and SCAttn (paper section 4.3, Fig. 3a)."""
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmlocalmamba.backbones.archs import LOCAL_VIM
from mmlocalmamba.backbones.base import (
    Directions,
    LocalMambaBackbone,
    check_frozen_stages,
    check_window_pad,
    drop_path_rates,
    resolve_arch,
    resolve_directions,
    resolve_out_indices,
    resolve_search,
)
from mmlocalmamba.directions import ScanTables, scan_tables_of
from mmlocalmamba.layers import (
    DropPath,
    FinalRMSNorm,
    LocalVimMixer,
    PatchEmbed,
    ResidualRMSNorm,
    resize_pos_embed,
    resized_rotary_tables,
    rotary_tables,
)

_LOGGER = logging.getLogger(__name__)
_EPS = 1e-5
# Positions are scaled to the token grid of ImageNet pre-training, whatever the image size, as in Vim.
_ROPE_SIZE = 14
# cls_token -> middle_token of the scan tables.
CLS_TOKENS: dict[str, bool | str] = {'none': False, 'middle': True, 'vim': 'flipped'}
OUT_TYPES = ('avg_featmap', 'cls_token', 'featmap')
OUT_FEATURES = ('mixer', 'residual')
ROPES = (True, False, 'resized')


class LocalVimBlock(nn.Module):
    """Add -> rotate -> RMSNorm -> mixer. Returns the mixer's output and the residual stream, which stays float32 under
    autocast."""

    def __init__(self, mixer: nn.Module, channels: int, drop_path: float, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm = ResidualRMSNorm(channels, eps=_EPS)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def _forward(self, x: Tensor, residual: Tensor | None, tables: ScanTables,
                 rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(x if residual is None else self.drop_path(x), residual, rotary)
        return self.mixer(x, tables), residual

    def forward(self, x: Tensor, residual: Tensor | None, tables: ScanTables,
                rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """x, residual (B, L, C), tables of the mixer's directions, rotary tables -> mixer's output, residual."""
        if self.with_cp and x.requires_grad:
            return checkpoint(self._forward, x, residual, tables, rotary, use_reentrant=False)
        return self._forward(x, residual, tables, rotary)


class LocalVim(LocalMambaBackbone):
    """LocalVim backbone for classification, detection and segmentation.

    With ``directions=['h', 'h_flip'], scattn=False`` it is Vim.

    Args:
        arch: 'nano', 'tiny', 'small', or a dict with ``embed_dims`` and ``num_layers`` and optionally ``d_state``
            (16), ``expand`` (2), ``dt_rank`` ('auto'), ``d_conv`` (4), ``directions``.
        img_size: image size in pixels, which sets the grid of the learned positions. They are resized to the actual
            grid in forward, and from the grid of a checkpoint when it is loaded.
        in_channels: channels of the image.
        patch_size: side of a patch in pixels.
        stride: pixels from patch to patch, and so the stride of all features; None for ``patch_size``. With a smaller
            stride patches overlap, as in Vim+ (16 and 8). Images are padded at the right and bottom until the patches
            cover them.
        directions: None for the variant's searched directions, one list of scan names for all blocks, a list per
            block, a path to a JSON file that holds one of these, 'search' for the supernet of the direction search, or
            dict(candidates=[...], sampling=...) for a supernet with the options of MixedScan.
        scattn: True, False, or a dict of SCAttn's arguments.
        window_pad: 'zero' scans the pads of incomplete windows (the authors' behaviour), 'none' real tokens only.
        cls_token: 'none', 'middle' for a class token in the middle of every scan, or 'vim' for one in the middle of the
            tokens, which flipped scans meet where the reversed tokens have it, as in Vim. On even grids both are equal.
        rope: rotate features by their 2-D positions before every block (not with a class token). 'resized' rotates as
            the authors' code does at other grids than 14x14, see :func:`mmlocalmamba.layers.resized_rotary_tables`.
        out_indices: blocks that give outputs with ``out_type='featmap'``; negative ones count from the end.
        out_type: 'avg_featmap' (mean over tokens) or 'cls_token': one (B, C) tensor of the last block, after the
            residual sum and the final norm; 'featmap': a (B, C, H, W) map per out_index, each after its own LayerNorm.
        out_feature: output of 'featmap': 'mixer', a block's output alone (as in the authors' detection and
            segmentation results), or 'residual', its sum with the residual stream.
        frozen_stages: -1 none, 0 patch embedding, positions and class token, i the first i blocks with their output
            norms, too.
        with_cp: recompute blocks in the backward pass to save memory.
        drop_path_rate: stochastic depth. Rates are 0, then linspace(0, rate, depth) shifted by one block, then the
            rate itself before the final norm, as in the authors' schedule.
        init_cfg: see LocalMambaBackbone.

    Raises:
        ValueError: an arch, scan or option is unknown, directions do not fit the depth, or an index is out of range.

    Example:
        >>> backbone = LocalVim(arch='tiny', out_type='featmap', out_indices=(4, 9, 14, 19))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 224, 320))]
        [(1, 192, 14, 20), (1, 192, 14, 20), (1, 192, 14, 20), (1, 192, 14, 20)]
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 img_size: int | tuple[int, int] = 224,
                 in_channels: int = 3,
                 patch_size: int = 16,
                 stride: int | None = None,
                 directions: Directions = None,
                 scattn: bool | dict = True,
                 window_pad: str = 'zero',
                 cls_token: str = 'none',
                 rope: bool | str = True,
                 out_indices: int | Sequence[int] = (-1, ),
                 out_type: str = 'avg_featmap',
                 out_feature: str = 'mixer',
                 frozen_stages: int = -1,
                 with_cp: bool = False,
                 drop_path_rate: float = 0.1,
                 init_cfg: dict | None = None) -> None:
        super().__init__(frozen_stages, init_cfg)
        arch = resolve_arch(arch, LOCAL_VIM, ('embed_dims', 'num_layers'))
        self.embed_dims, depth = arch.pop('embed_dims'), arch.pop('num_layers')
        directions, mixer, options = resolve_search(directions, LocalVimMixer)
        self.window_pad = check_window_pad(window_pad)
        self.directions = resolve_directions(directions, arch.pop('directions', None), depth)
        self.out_indices = resolve_out_indices(out_indices, depth)
        check_frozen_stages(frozen_stages, depth)
        for name, value, known in (('cls_token', cls_token, CLS_TOKENS), ('out_type', out_type, OUT_TYPES),
                                   ('out_feature', out_feature, OUT_FEATURES), ('rope', rope, ROPES)):
            if value not in known:
                raise ValueError(f'{name} must be one of {known}, got {value!r}')
        if cls_token != 'none' and rope:
            raise ValueError(f'rope={rope!r} does not go with cls_token={cls_token!r}: this class token has '
                             'no position to rotate. The authors train such a model with rope=False')
        if out_type == 'cls_token' and cls_token == 'none':
            raise ValueError("out_type='cls_token' needs cls_token='middle' or 'vim'")
        if out_type != 'featmap' and self.out_indices != (depth - 1, ):
            raise ValueError(f"out_type={out_type!r} pools the last block only; out_indices {out_indices} needs "
                             "out_type='featmap'")
        if rope and self.embed_dims % 4:
            raise ValueError(f'rope needs embed_dims divisible by 4, got {self.embed_dims}')

        self.out_type, self.out_feature, self.rope = out_type, out_feature, rope
        self.middle_token = CLS_TOKENS[cls_token]
        self.num_cls_tokens = int(bool(self.middle_token))
        self.patch_size, self.stride = patch_size, patch_size if stride is None else stride
        if not 0 < self.stride <= patch_size:
            raise ValueError(f'stride must be from 1 to patch_size {patch_size}, got {stride}')
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch_size, self.stride)
        self.out_channels = [self.embed_dims] * len(self.out_indices)
        self.out_strides = [self.stride] * len(self.out_indices)
        self.grid = self.token_grid(height, width)
        tokens = self.grid[0] * self.grid[1] + self.num_cls_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, self.embed_dims))
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.embed_dims)) if self.num_cls_tokens else None

        drop_paths = [0., *drop_path_rates(drop_path_rate, depth)]
        self.layers = nn.ModuleList([
            LocalVimBlock(mixer(self.embed_dims, self.directions[index], scattn=scattn, **arch, **options),
                          self.embed_dims, drop_paths[index], with_cp)
            for index in range(depth)
        ])
        if out_type == 'featmap':
            self.out_norms = nn.ModuleList([nn.LayerNorm(self.embed_dims) for _ in self.out_indices])
        else:
            self.drop_path = DropPath(drop_path_rate)
            self.norm = FinalRMSNorm(self.embed_dims, eps=_EPS)
        self.reset_parameters()
        self._freeze()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        for layer in self.layers:  # GPT-2's rescaling of the residual branches, as in Mamba
            nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=5 ** 0.5)
            with torch.no_grad():
                layer.mixer.out_proj.weight /= len(self.layers) ** 0.5

    def block_tokens(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
        """Image (B, in_channels, H, W) -> output of each block and the residual stream before it (B, L, C), and (h, w).

        A class token is at position h*w // 2.
        """
        if min(x.shape[-2:]) < self.patch_size:
            raise ValueError(f'LocalVim: image of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than a patch of '
                             f'{self.patch_size}')
        grid = self.token_grid(*x.shape[-2:])
        bottom, right = ((count - 1) * self.stride + self.patch_size - side for count, side in zip(grid, x.shape[-2:]))
        size: tuple[int, int]
        x, size = self.patch_embed(F.pad(x, (0, right, 0, bottom)))
        if self.cls_token is not None:
            middle = x.shape[1] // 2
            x = torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1).to(x.dtype), x[:, middle:]], dim=1)
        x = x + resize_pos_embed(self.pos_embed, self.grid, size, self.num_cls_tokens)
        rotary = None
        if self.rope == 'resized':
            rotary = resized_rotary_tables(*size, self.embed_dims, _ROPE_SIZE, self.grid, x.device)
        elif self.rope:
            rotary = rotary_tables(*size, self.embed_dims, _ROPE_SIZE, x.device)
        tables = scan_tables_of([layer.mixer.directions for layer in self.layers], *size,
                                pad=self.window_pad == 'zero', middle_token=self.middle_token, device=x.device)

        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, tables[layer.mixer.directions], rotary)
            yield x, residual, size

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, in_channels, H, W), H and W >= patch_size -> see ``out_type``."""
        outs: list[Tensor] = []
        for index, (tokens, residual, size) in enumerate(self.block_tokens(x)):
            middle = size[0] * size[1] // 2
            if self.out_type == 'featmap' and index in self.out_indices:
                out = tokens if self.out_feature == 'mixer' else residual + tokens
                if self.num_cls_tokens:
                    out = torch.cat([out[:, :middle], out[:, middle + 1:]], dim=1)
                out = self.out_norms[len(outs)](out)
                outs.append(out.unflatten(1, size).permute(0, 3, 1, 2).contiguous())
        if self.out_type == 'featmap':
            return tuple(outs)
        out = self.norm(residual + self.drop_path(tokens))
        return (out[:, middle] if self.out_type == 'cls_token' else out.mean(1), )

    def token_grid(self, H: int, W: int) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of an image of H x W pixels."""
        # Graphs of symbolic sizes cannot take remainders of negative numbers.
        rows, columns = ((side - self.patch_size + self.stride - 1) // self.stride + 1 for side in (H, W))
        return rows, columns

    def requirements(self) -> dict[str, Any]:
        needed = dict(super().requirements(), stride=self.stride, grid=list(self.grid))
        if self.rope == 'resized':
            needed['rope'] = self.rope
        if self.middle_token == 'flipped':
            needed['cls_token'] = 'vim'
        return needed

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return (depth of a parameter, number of depths) for layer-wise learning rates.

        Depth 0 is the patch embedding and the positions; each block adds one; final and output norms come last.
        """
        count = len(self.layers) + 2
        name = param_name[len(prefix):] if param_name.startswith(prefix) else param_name
        if name.startswith(('patch_embed', 'pos_embed', 'cls_token')):
            return 0, count
        if name.startswith('layers.'):
            return int(name.split('.')[1]) + 1, count
        return count - 1, count

    def adapt_state_dict(self, weights: dict[str, Tensor], grid: Sequence[int] | None = None) -> dict[str, Tensor]:
        loaded = weights.get('pos_embed')
        if loaded is None or loaded.shape[-1] != self.embed_dims:
            return weights
        known, tokens = grid is not None, loaded.shape[1] - self.num_cls_tokens
        if grid is None:
            side = round(tokens ** 0.5)
            if tokens == self.grid[0] * self.grid[1]:
                grid = self.grid
            elif side * side == tokens:
                grid = (side, side)
            else:
                return weights
        rows, columns = grid
        if rows * columns != tokens:
            return weights
        if not known:
            _LOGGER.info('%s: the checkpoint does not say the grid of its %d positions: %dx%d is assumed (init_cfg '
                         'takes grid=(ROWS, COLUMNS))', type(self).__name__, tokens, rows, columns)
        if (rows, columns) != self.grid:
            _LOGGER.info('%s: positions of %dx%d tokens are resized to %dx%d', type(self).__name__, rows, columns,
                         *self.grid)
            loaded = resize_pos_embed(loaded, (rows, columns), self.grid, self.num_cls_tokens)
            weights = {**weights, 'pos_embed': loaded}
        return weights

    def is_new_for_task(self, name: str) -> bool:
        return name.startswith(('out_norms.', 'norm.'))

    def stages_to_freeze(self) -> list[list[nn.Module | nn.Parameter]]:
        embedding = [self.patch_embed, self.pos_embed] + ([] if self.cls_token is None else [self.cls_token])
        stages = [embedding, *([layer] for layer in self.layers)]
        if self.out_type == 'featmap':
            for index, norm in zip(self.out_indices, self.out_norms):
                stages[index + 1].append(norm)
        else:
            stages[-1].append(self.norm)
        return stages
