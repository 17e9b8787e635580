"""From an image to tokens, and from tokens to fewer and wider ones."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.layers.plain import is_plain
from mmlocalmamba.ops import linear
from mmlocalmamba.ops.dispatch import autocasts


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each patch to a token.

    In 16 bits on a CPU the patches are unfolded and multiplied: oneDNN's convolutions (3.10, with torch 2.11) leave
    pixels unwritten or give other numbers there on processors with AMX, for outputs one token wide and for patches of 8
    or 16 pixels of 4 and more channels (https://github.com/pytorch/pytorch/issues/169688 and 163347). A convolution
    that somebody has hooked or replaced is called all the same.

    Args:
        in_channels: channels of the image.
        embed_dims: channels of a token.
        patch_size: side of a patch in pixels.
        stride: pixels from one patch to the next; None for ``patch_size``.
        norm: normalise tokens by a LayerNorm.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, stride: int | None = None,
                 norm: bool = False) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, stride=stride or patch_size)
        self.norm = nn.LayerNorm(embed_dims) if norm else None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, in_channels, H, W) -> tokens (B, h * w, embed_dims), (h, w)."""
        conv = self.projection
        dtype = torch.get_autocast_dtype('cpu') if autocasts(x) and x.dtype == torch.float32 else x.dtype
        size: tuple[int, int]
        if x.device.type != 'cpu' or dtype.itemsize > 2 or not is_plain(conv, nn.Conv2d):
            x = conv(x)
            size = (x.shape[2], x.shape[3])
            x = x.flatten(2).transpose(1, 2)
        else:
            h, w = ((side - kernel) // stride + 1 for side, kernel, stride in
                    zip(x.shape[-2:], conv.kernel_size, conv.stride))
            size = (h, w)
            patches = F.unfold(x.to(dtype), conv.kernel_size, stride=conv.stride).transpose(1, 2)
            x = F.linear(patches, conv.weight.flatten(1), conv.bias)
        return x if self.norm is None else self.norm(x), size


class PatchMerging(nn.Module):
    """Merge 2 x 2 tokens into one, normalise it and project it: half the resolution, as in Swin (arXiv 2103.14030).

    Grids of odd sides are padded with zeros at the bottom and right. The inputs of ``norm`` and ``reduction`` are
    ordered as ``F.unfold`` orders them: channel by channel, then row, then column.

    Args:
        in_channels: C of the tokens.
        out_channels: channels of a merged token.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_channels)
        self.reduction = nn.Linear(4 * in_channels, out_channels, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, H * W, C), (H, W) -> (B, ceil(H / 2) * ceil(W / 2), out_channels), (ceil(H / 2), ceil(W / 2))."""
        H, W = size
        x = x.unflatten(1, size)
        bottom, right = H % 2, W % 2
        # A comparison of symbolic sizes would tie a graph to its outcome; a pad of 0 changes nothing.
        if not (isinstance(bottom, int) and isinstance(right, int)) or bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        h, w = (H + 1) // 2, (W + 1) // 2
        x = x.unflatten(2, (w, 2)).unflatten(1, (h, 2)).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
        return self.reduction(self.norm(x)), (h, w)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve x (B, C, H, W): (B, h, w, O).

    In 16 bits on a CPU by unfolding and a product, for the reason that :class:`PatchEmbed` has; and where outputs have
    few positions, since a product reads a large weight as it is, and a convolution reorders it in every call. A
    convolution that somebody has hooked or replaced is called all the same.
    """
    if x.device.type != 'cpu' or not is_plain(conv, nn.Conv2d):
        return conv(x).permute(0, 2, 3, 1)
    dtype = torch.get_autocast_dtype('cpu') if autocasts(x) and x.dtype == torch.float32 else x.dtype
    h, w = ((side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in
            zip(x.shape[-2:], conv.padding, conv.kernel_size, conv.stride))
    few = not torch.compiler.is_compiling() and 4 * x.shape[0] * h * w < conv.out_channels
    if not (few or dtype.itemsize <= 2):
        return conv(x).permute(0, 2, 3, 1)
    columns = F.unfold(x.to(dtype), conv.kernel_size, padding=conv.padding, stride=conv.stride).transpose(1, 2)
    return linear(columns, conv.weight.flatten(1), conv.bias).unflatten(1, (h, w))


class ConvPatchEmbed(nn.Module):
    """Turn an image into tokens by two 3x3 convolutions with LayerNorms and a GELU between them, as VMamba's version 2.

    Patches overlap, and borders are padded by zeros, so that H and W need not be multiples of the patch size.

    Args:
        in_channels: channels of the image.
        embed_dims: channels of a token, an even number.
        patch_size: stride of the tokens in pixels: 1, 2 or 4.

    Raises:
        ValueError: the patch size is another one.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int = 4) -> None:
        super().__init__()
        if patch_size not in (1, 2, 4):
            raise ValueError(f"patch_embed='conv' takes patch_size 1, 2 or 4, got {patch_size}")
        self.embed_dims = embed_dims
        first = min(patch_size, 2)
        self.projection = nn.Conv2d(in_channels, embed_dims // 2, 3, stride=first, padding=1)
        self.norm = nn.LayerNorm(embed_dims // 2)
        self.projection2 = nn.Conv2d(embed_dims // 2, embed_dims, 3, stride=patch_size // first, padding=1)
        self.norm2 = nn.LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, in_channels, H, W) -> tokens (B, h * w, embed_dims), (h, w) with h = ceil(H / patch_size)."""
        # Channels last, so that all that follows is: in another order the first convolution takes five times as long.
        x = F.gelu(self.norm(_convolve(self.projection, x.contiguous(memory_format=torch.channels_last))))
        x = self.norm2(_convolve(self.projection2, x.permute(0, 3, 1, 2)))
        return x.flatten(1, 2), (x.shape[1], x.shape[2])


class ConvDownsample(nn.Module):
    """Halve the resolution of tokens by a 3x3 convolution of stride 2 and a LayerNorm, as VMamba's version 2.

    Args:
        in_channels: C of the tokens.
        out_channels: channels of the new tokens.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.out_norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, H * W, C), (H, W) -> (B, ceil(H / 2) * ceil(W / 2), out_channels), (ceil(H / 2), ceil(W / 2))."""
        x = self.out_norm(_convolve(self.conv, x.unflatten(1, size).permute(0, 3, 1, 2)))
        return x.flatten(1, 2), (x.shape[1], x.shape[2])
