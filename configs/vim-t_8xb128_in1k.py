"""Vim-T on ImageNet-1K, with pooling and RoPE as LocalVim. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './localvim-t_8xb128_in1k.py'

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=192, num_layers=24),
        directions=['h', 'h_flip'],
        scattn=False))
