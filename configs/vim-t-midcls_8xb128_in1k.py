"""Vim-T with a class token in the middle, instead of pooling and RoPE: the model whose weights hustvl/Vim has released.

Total batch 1024: 8 GPUs x 128 images. Vim halves the sum of its two directions; here that factor is part of the
output projection.
"""
_base_ = './vim-t_8xb128_in1k.py'

model = dict(
    backbone=dict(
        cls_token='vim',
        rope=False,
        out_type='cls_token'))
