from mmlocalmamba.layers.drop_path import DropPath
from mmlocalmamba.layers.linear import TokenLinear
from mmlocalmamba.layers.mixers import LocalVimMixer, LocalVMambaMixer
from mmlocalmamba.layers.norm import ResidualRMSNorm
from mmlocalmamba.layers.patches import PatchEmbed, PatchMerging
from mmlocalmamba.layers.rope import resize_pos_embed, resized_rotary_tables, rotary_tables
from mmlocalmamba.layers.scattn import SCAttn

__all__ = ['DropPath', 'LocalVimMixer', 'LocalVMambaMixer', 'PatchEmbed', 'PatchMerging', 'ResidualRMSNorm', 'SCAttn',
           'TokenLinear', 'resize_pos_embed', 'resized_rotary_tables', 'rotary_tables']
