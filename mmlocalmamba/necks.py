"""Necks for plain backbones."""
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
