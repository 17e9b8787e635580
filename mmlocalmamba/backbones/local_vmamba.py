"""LocalVMamba: VMamba's hierarchy with local scans and SCAttn (paper section 4.3)."""
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmlocalmamba.backbones.archs import LOCAL_VMAMBA
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
    MLP,
    ConvDownsample,
    ConvPatchEmbed,
    DropPath,
    LocalVMambaMixer,
    PatchEmbed,
    PatchMerging,
)

PATCH_EMBEDS: dict[str, Callable[..., nn.Module]] = {'patch': partial(PatchEmbed, norm=True), 'conv': ConvPatchEmbed}
DOWNSAMPLES: dict[str, Callable[..., nn.Module]] = {'merge': PatchMerging, 'conv': ConvDownsample}


def _choice(option: str, name: str, choices: dict[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    if name not in choices:
        raise ValueError(f'{option} must be one of {", ".join(choices)}, got {name!r}')
    return choices[name]


class LocalVMambaBlock(nn.Module):
    """x + drop_path(mixer(norm(x))) on tokens (B, H*W, C); then, with an MLP, x + drop_path(mlp(norm2(x)))."""

    def __init__(self, mixer: nn.Module, channels: int, drop_path: float, with_cp: bool, mlp_ratio: float = 0.) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm = nn.LayerNorm(channels)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels) if mlp_ratio else None
        self.mlp = MLP(channels, int(mlp_ratio * channels)) if mlp_ratio else None

    def _forward(self, x: Tensor, size: tuple[int, int], tables: ScanTables) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x), size, tables))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def forward(self, x: Tensor, size: tuple[int, int], tables: ScanTables) -> Tensor:
        """x (B, H*W, C), size (H, W), tables of the mixer's directions -> (B, H*W, C)."""
        if self.with_cp and x.requires_grad:
            return checkpoint(self._forward, x, size, tables, use_reentrant=False)
        return self._forward(x, size, tables)


class LocalVMambaStage(nn.Module):
    """Blocks at one resolution, then ``downsample``, which is None in the last stage."""

    def __init__(self, blocks: Sequence[LocalVMambaBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if isinstance(self.downsample, PatchMerging):
            nn.init.trunc_normal_(self.downsample.reduction.weight, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int], pad: bool) -> Tensor:
        """x (B, H*W, C), size (H, W) -> the same shape, before ``downsample``."""
        tables = scan_tables_of([block.mixer.directions for block in self.blocks], *size, pad=pad, device=x.device)
        for block in self.blocks:
            x = block(x, size, tables[block.mixer.directions])
        return x


class LocalVMamba(LocalMambaBackbone):
    """LocalVMamba backbone for classification, detection and segmentation.

    With ``directions=['h', 'v', 'h_flip', 'v_flip'], scattn=False`` it is VMamba. The order matters to its weights.

    Args:
        arch: 'nano', 'tiny', 'small', 'base'; 'nano_v2', 'tiny_v2', 'small_v2', 'base_v2' with the block of VMamba's
            version 2, and further sizes of that version, 'tiny_v2_s2l5', 'small_v2_s1l20', 'base_v2_s1l20'; or a dict
            with ``embed_dims`` and ``depths`` (one entry a stage) and optionally ``d_state`` (16), ``expand`` (2),
            ``dt_rank`` ('auto'), ``d_conv`` (3), ``conv_bias`` (True), ``gate`` (True), ``mlp_ratio`` (0: no MLP),
            ``patch_embed`` ('patch', or 'conv': two 3x3 convolutions), ``downsample`` ('merge', or 'conv': a 3x3
            convolution), ``directions``.
        in_channels: channels of the image.
        patch_size: side of a patch and stride of the first stage in pixels; each further stage halves the resolution.
            1, 2 or 4 with ``patch_embed='conv'``.
        directions: None for the variant's searched directions, one list of scan names for all blocks, a list per
            block, a path to a JSON file that holds one of these, 'search' for the supernet of the direction search, or
            dict(candidates=[...], sampling=...) for a supernet with the options of MixedScan.
        scattn: True, False, or a dict of SCAttn's arguments, e.g. ``dict(spatial=True)``.
        window_pad: 'zero' scans the pads of windows that do not fill the grid (the authors' behaviour), 'none' scans
            real tokens only.
        out_indices: stages that give outputs; negative ones count from the end.
        frozen_stages: -1 none, 0 the patch embedding, i the first i stages with their output norms, too, as in mmdet's
            Swin. (mmpretrain's Swin counts from 0: its 0 is 1 here.)
        with_cp: recompute blocks in the backward pass to save memory.
        drop_path_rate: stochastic depth, growing linearly from 0 over the blocks.
        init_cfg: see LocalMambaBackbone.

    Raises:
        ValueError: an arch or scan is unknown, directions do not fit the depth, or an index is out of range.

    Example:
        >>> backbone = LocalVMamba(arch='tiny', out_indices=(0, 1, 2, 3))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 224, 224))]
        [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 in_channels: int = 3,
                 patch_size: int = 4,
                 directions: Directions = None,
                 scattn: bool | dict = True,
                 window_pad: str = 'zero',
                 out_indices: int | Sequence[int] = (-1, ),
                 frozen_stages: int = -1,
                 with_cp: bool = False,
                 drop_path_rate: float = 0.1,
                 init_cfg: dict | None = None) -> None:
        super().__init__(frozen_stages, init_cfg)
        arch = resolve_arch(arch, LOCAL_VMAMBA, ('embed_dims', 'depths'))
        self.embed_dims, self.depths = list(arch.pop('embed_dims')), list(arch.pop('depths'))
        if len(self.embed_dims) != len(self.depths):
            raise ValueError(f'arch has {len(self.embed_dims)} embed_dims for {len(self.depths)} depths')
        depth = sum(self.depths)
        directions, mixer, options = resolve_search(directions, LocalVMambaMixer)
        self.window_pad = check_window_pad(window_pad)
        self.directions = resolve_directions(directions, arch.pop('directions', None), depth)
        self.out_indices = resolve_out_indices(out_indices, len(self.depths))
        check_frozen_stages(frozen_stages, len(self.depths))

        self.patch_size = patch_size
        self.patch_embed = _choice('patch_embed', arch.pop('patch_embed', 'patch'), PATCH_EMBEDS)(
            in_channels, self.embed_dims[0], patch_size)
        downsample = _choice('downsample', arch.pop('downsample', 'merge'), DOWNSAMPLES)
        mlp_ratio = arch.pop('mlp_ratio', 0.)
        drop_paths = drop_path_rates(drop_path_rate, depth)
        self.stages = nn.ModuleList()
        for index, (channels, stage_depth) in enumerate(zip(self.embed_dims, self.depths)):
            first = sum(self.depths[:index])
            self.stages.append(LocalVMambaStage([
                LocalVMambaBlock(mixer(channels, self.directions[block], scattn=scattn, **arch, **options), channels,
                                 drop_paths[block], with_cp, mlp_ratio)
                for block in range(first, first + stage_depth)
            ], None if index + 1 == len(self.depths) else downsample(channels, self.embed_dims[index + 1])))
        for index in self.out_indices:
            self.add_module(f'norm{index}', nn.LayerNorm(self.embed_dims[index]))
        self.out_channels = [self.embed_dims[index] for index in self.out_indices]
        self.out_strides = [patch_size * 2 ** index for index in self.out_indices]
        self._freeze()

    def stage_tokens(self, x: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Image (B, in_channels, H, W) -> tokens (B, H_i*W_i, C_i) and (H_i, W_i) of each stage, before its norm."""
        if min(x.shape[-2:]) < self.patch_size:
            raise ValueError(f'LocalVMamba: image of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than a patch of '
                             f'{self.patch_size}')
        x, size = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x, size, self.window_pad == 'zero')
            yield x, size
            if stage.downsample is not None:
                x, size = stage.downsample(x, size)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, in_channels, H, W), H and W >= patch_size -> one (B, C_i, H_i, W_i) per out_index."""
        outs = []
        for index, (tokens, size) in enumerate(self.stage_tokens(x)):
            if index in self.out_indices:
                out = getattr(self, f'norm{index}')(tokens)
                outs.append(out.unflatten(1, size).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return (depth of a parameter, number of depths) for layer-wise learning rates.

        Depth 0 is the patch embedding; each block adds one; output norms come last.
        """
        count = sum(self.depths) + 2
        name = param_name[len(prefix):] if param_name.startswith(prefix) else param_name
        parts = name.split('.')
        if parts[0] == 'patch_embed':
            return 0, count
        if parts[0] != 'stages':
            return count - 1, count
        stage = int(parts[1])
        before = sum(self.depths[:stage])
        if parts[2] == 'blocks':
            return before + int(parts[3]) + 1, count
        return before + self.depths[stage], count

    def is_new_for_task(self, name: str) -> bool:
        return name.startswith('norm')

    def stages_to_freeze(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.patch_embed], *([stage, getattr(self, f'norm{index}')] if index in self.out_indices else [stage]
                                      for index, stage in enumerate(self.stages))]
