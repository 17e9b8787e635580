"""Vim-T with a class token in the middle, instead of pooling and RoPE: hustvl/Vim released weights of this model.

Total batch 1024: 8 GPUs x 128 images. Vim halves the sum of its two directions; here that factor is part of the
output projection.
"""
_base_ = [
    '_base_/datasets/imagenet_bs128.py',
    '_base_/schedules/imagenet_300e.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch=dict(embed_dims=192, num_layers=24),
        directions=['h', 'h_flip'],
        scattn=False,
        cls_token='vim',
        rope=False,
        out_type='cls_token',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    head=dict(in_channels=192))
