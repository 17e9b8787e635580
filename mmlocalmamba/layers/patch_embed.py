"""From an image to tokens."""
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import transformer
from torch import Tensor

from mmlocalmamba.ops.dispatch import autocasts


class PatchEmbed(transformer.PatchEmbed):
    """mmcv's: image (B, in_channels, H, W) -> tokens (B, h w, embed_dims) and (h, w).

    In 16 bits on a CPU as a matrix product of the patches: oneDNN's convolutions (3.10, with torch 2.11) leave pixels
    unwritten or give other numbers there on processors with AMX, for outputs one token wide and for patches of 8 or 16
    pixels of 4 and more channels (https://github.com/pytorch/pytorch/issues/169688 and 163347).
    """

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        dtype = torch.get_autocast_dtype('cpu') if autocasts(x) and x.dtype == torch.float32 else x.dtype
        if x.device.type != 'cpu' or dtype.itemsize > 2:
            return super().forward(x)
        conv = self.projection
        h, w = ((side - kernel) // stride + 1 for side, kernel, stride in
                zip(x.shape[-2:], conv.kernel_size, conv.stride))
        patches = F.unfold(x.to(dtype), conv.kernel_size, stride=conv.stride).transpose(1, 2)
        x = F.linear(patches, conv.weight.flatten(1), conv.bias)
        return x if self.norm is None else self.norm(x), (h, w)
