"""Vim-S+: see vim-t-midcls-plus_8xb128-30e_in1k.py. hustvl/Vim's README reports 81.6 % top-1."""
_base_ = './vim-t-midcls-plus_8xb128-30e_in1k.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=384)),
    head=dict(in_channels=384))
