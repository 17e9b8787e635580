from mmlocalmamba.layers.drop_path import DropPath
from mmlocalmamba.layers.linear import TokenLinear
from mmlocalmamba.layers.mixers import LocalVimMixer, LocalVMambaMixer
from mmlocalmamba.layers.mlp import MLP
from mmlocalmamba.layers.norm import ResidualRMSNorm
from mmlocalmamba.layers.patches import ConvDownsample, ConvPatchEmbed, PatchEmbed, PatchMerging
from mmlocalmamba.layers.rope import resize_pos_embed, resized_rotary_tables, rotary_tables
from mmlocalmamba.layers.scattn import SCAttn

__all__ = ['ConvDownsample', 'ConvPatchEmbed', 'DropPath', 'LocalVimMixer', 'LocalVMambaMixer', 'MLP', 'PatchEmbed',
           'PatchMerging', 'ResidualRMSNorm', 'SCAttn', 'TokenLinear', 'resize_pos_embed', 'resized_rotary_tables',
           'rotary_tables']
