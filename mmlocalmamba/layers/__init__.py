from mmlocalmamba.layers.drop_path import DropPath
from mmlocalmamba.layers.mixers import LocalVimMixer, LocalVMambaMixer
from mmlocalmamba.layers.mlp import MLP
from mmlocalmamba.layers.norm import FinalRMSNorm, ResidualRMSNorm
from mmlocalmamba.layers.patches import ConvDownsample, ConvPatchEmbed, PatchEmbed, PatchMerging
from mmlocalmamba.layers.rope import resize_pos_embed, resized_rotary_tables, rotary_tables
from mmlocalmamba.layers.scattn import SCAttn

__all__ = ['ConvDownsample', 'ConvPatchEmbed', 'DropPath', 'FinalRMSNorm', 'LocalVimMixer', 'LocalVMambaMixer', 'MLP',
           'PatchEmbed', 'PatchMerging', 'ResidualRMSNorm', 'SCAttn', 'resize_pos_embed', 'resized_rotary_tables',
           'rotary_tables']
