"""VMamba-T, version 2 (s1l8), on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './localvmamba-t-v2_8xb128_in1k.py'

model = dict(
    backbone=dict(
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False))
