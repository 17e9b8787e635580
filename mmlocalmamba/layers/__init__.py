from mmlocalmamba.layers.linear import TokenLinear
from mmlocalmamba.layers.mixers import LocalVimMixer, LocalVMambaMixer
from mmlocalmamba.layers.norm import ResidualRMSNorm
from mmlocalmamba.layers.patch_embed import PatchEmbed
from mmlocalmamba.layers.rope import resize_pos_embed, resized_rotary_tables, rotary_tables
from mmlocalmamba.layers.scattn import SCAttn

__all__ = ['LocalVimMixer', 'LocalVMambaMixer', 'PatchEmbed', 'ResidualRMSNorm', 'SCAttn', 'TokenLinear',
           'resize_pos_embed', 'resized_rotary_tables', 'rotary_tables']
