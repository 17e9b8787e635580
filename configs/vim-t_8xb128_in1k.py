"""Vim-T on ImageNet-1K, with pooling and RoPE as LocalVim. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './localvim-t_8xb128_in1k.py'

pretrained = None  # path or URL of weights to start from

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=192, num_layers=24),
        directions=['h', 'h_flip'],
        scattn=False,
        init_cfg=dict(checkpoint=pretrained)))
