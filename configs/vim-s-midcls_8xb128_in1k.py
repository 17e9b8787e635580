"""Vim-S with a class token in the middle: see vim-t-midcls_8xb128_in1k.py."""
_base_ = './vim-t-midcls_8xb128_in1k.py'

pretrained = None  # path or URL of weights to start from, ours or Vim's

model = dict(
    backbone=dict(arch=dict(embed_dims=384), init_cfg=dict(checkpoint=pretrained)),
    head=dict(in_channels=384))
