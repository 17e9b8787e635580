"""Vim-S+: see vim-t-midcls-plus_8xb128-30e_in1k.py. 81.6 % top-1 is the number of hustvl/Vim's README."""
_base_ = './vim-t-midcls-plus_8xb128-30e_in1k.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=384)),
    head=dict(in_channels=384))
