"""LocalVim-T with a class token in the middle, instead of pooling and RoPE.

Total batch 1024: 8 GPUs x 128 images.
"""
_base_ = './localvim-t_8xb128_in1k.py'

model = dict(
    backbone=dict(
        cls_token='middle',
        rope=False,
        out_type='cls_token'))
