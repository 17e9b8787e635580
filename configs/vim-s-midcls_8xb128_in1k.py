"""Vim-S with a class token in the middle: see vim-t-midcls_8xb128_in1k.py."""
_base_ = './vim-t-midcls_8xb128_in1k.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=384)),
    head=dict(in_channels=384))
