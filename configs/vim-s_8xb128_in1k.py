"""Vim-S on ImageNet-1K, with pooling and RoPE as LocalVim. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './vim-t_8xb128_in1k.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=384)),
    head=dict(in_channels=384))
