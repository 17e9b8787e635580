"""Necks for plain backbones."""
from collections.abc import Sequence
from math import log2

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.registry import MODELS


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """Pyramid from the last map of a plain backbone (ViTDet, arXiv 2203.16527, section 3).

    Strides are 1/4, 1/2, 1 and 2 times the backbone's; further levels are max-pooled from the last.

    Args:
        backbone_channel: channels C of the backbone's map.
        out_channels: channels of every level.
        num_outs: number of levels, >= 4.
        conv_cfg, norm_cfg, act_cfg: of the lateral and output convolutions; norm_cfg also between the deconvolutions.
        init_cfg: as in BaseModule.
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
        """Maps of a plain backbone, the last (B, C, H, W) is used -> num_outs maps (B, out_channels, H_i, W_i)."""
        outs = [out(lateral(resample(inputs[-1])))
                for resample, lateral, out in zip(self.resample, self.lateral_convs, self.fpn_convs)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


@MODELS.register_module()
class Pyramid(BaseModule):
    """Brings maps of one stride to several, for necks and heads that read a pyramid.

    A map is enlarged by transposed convolutions of stride 2, with a norm and GELU between two of them, as in ViTDet and
    BEiT, and reduced by max-pooling. (mmsegmentation's Feature2Pyramid has two fixed lists of scales, and is not there
    for a detector.)

    Args:
        channels: of every map.
        scales: of every map, powers of two: 4 makes stride 4 of stride 16.
        norm_cfg: between two transposed convolutions; None for GroupNorm of one group.
        init_cfg: as in BaseModule.

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
        """As many maps (B, channels, H, W) as scales -> maps (B, channels, scale * H, scale * W), rounded up."""
        if len(inputs) != len(self.resample):
            raise ValueError(f'{len(self.resample)} scales for {len(inputs)} maps')
        return tuple(resample(x) for resample, x in zip(self.resample, inputs))
