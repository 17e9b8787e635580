"""Necks for backbones whose maps have one stride."""
from collections.abc import Sequence
from math import log2

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.registry import MODELS


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """Compute a pyramid from the last map of a backbone with one stride (ViTDet, arXiv 2203.16527, section 3).

    The levels have 1/4, 1/2, 1 and 2 times the backbone's stride. Max-pooling of the last level gives further levels.

    Args:
        backbone_channel: number of channels C of the backbone's map.
        out_channels: number of channels of every level.
        num_outs: number of levels, at least 4.
        conv_cfg, norm_cfg, act_cfg: settings of the lateral and output convolutions. ``norm_cfg`` also applies between
            the transposed convolutions.
        init_cfg: settings of the initialisation, as in BaseModule.

    Raises:
        ValueError: ``num_outs`` is below 4.
    """

    def __init__(self, backbone_channel: int, out_channels: int, num_outs: int,
                 conv_cfg: dict | None = None, norm_cfg: dict | None = None, act_cfg: dict | None = None,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        C = backbone_channel
        widths = (C // 4, C // 2, C, C)  # after resampling
        if num_outs < len(widths):
            raise ValueError(f'num_outs must be at least {len(widths)}, got {num_outs}')
        self.num_outs = num_outs
        norm = [build_norm_layer(norm_cfg, C // 2)[1]] if norm_cfg else []
        self.resample = nn.ModuleList([
            nn.Sequential(nn.ConvTranspose2d(C, C // 2, 2, 2), *norm, nn.GELU(),
                          nn.ConvTranspose2d(C // 2, C // 4, 2, 2)),
            nn.ConvTranspose2d(C, C // 2, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2, 2),
        ])
        common = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=act_cfg, inplace=False)
        self.lateral_convs = nn.ModuleList([ConvModule(width, out_channels, 1, **common) for width in widths])
        self.fpn_convs = nn.ModuleList([ConvModule(out_channels, out_channels, 3, padding=1, **common)
                                        for _ in widths])

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return ``num_outs`` maps (B, out_channels, H_i, W_i).

        Args:
            inputs: maps of the backbone. The last one, (B, C, H, W), is used.

        Raises:
            ValueError: H or W is below 2, so the level of twice the stride would be empty.
        """
        H, W = inputs[-1].shape[-2:]
        if H < 2 or W < 2:
            raise ValueError(f'SimpleFPN halves the map of the backbone, but got {H}x{W} tokens: use images of at '
                             'least two patches in height and width')
        outs = [out(lateral(resample(inputs[-1])))
                for resample, lateral, out in zip(self.resample, self.lateral_convs, self.fpn_convs)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


@MODELS.register_module()
class Pyramid(BaseModule):
    """Resize maps of one stride to several strides, for necks and heads that read a pyramid.

    Transposed convolutions of stride 2, with a norm and GELU between two of them, enlarge a map, as in ViTDet and BEiT.
    Max-pooling reduces it. mmsegmentation's Feature2Pyramid has two fixed lists of scales, and mmdet has no such neck.

    Args:
        channels: number of channels of every map.
        scales: factor for each map, a power of two: 4 turns stride 16 into stride 4.
        norm_cfg: norm between two transposed convolutions. None is GroupNorm with one group.
        init_cfg: settings of the initialisation, as in BaseModule.

    Raises:
        ValueError: a scale is no power of two.
    """

    def __init__(self, channels: int, scales: Sequence[float], norm_cfg: dict | None = None,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if not scales or any(scale <= 0 or log2(scale) % 1 for scale in scales):
            raise ValueError(f'scales must be powers of two, got {scales}')
        norm_cfg = norm_cfg or dict(type='GN', num_groups=1)
        self.resample = nn.ModuleList()
        for steps in (int(log2(scale)) for scale in scales):
            layers: list[nn.Module] = [nn.MaxPool2d(2 ** -steps, ceil_mode=True)] if steps < 0 else []
            for step in range(steps):
                if step:
                    layers += [build_norm_layer(norm_cfg, channels)[1], nn.GELU()]
                layers.append(nn.ConvTranspose2d(channels, channels, 2, 2))
            self.resample.append(nn.Sequential(*layers))

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return maps (B, channels, scale * H, scale * W), sizes rounded up.

        Args:
            inputs: maps (B, channels, H, W), one for each scale.

        Raises:
            ValueError: the numbers of maps and scales differ.
        """
        if len(inputs) != len(self.resample):
            raise ValueError(f'Pyramid has {len(self.resample)} scales, but got {len(inputs)} maps')
        return tuple(resample(x) for resample, x in zip(self.resample, inputs))
