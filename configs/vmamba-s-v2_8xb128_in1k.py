"""VMamba-S, version 2 (s2l15), on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './vmamba-t-v2_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='small_v2', drop_path_rate=0.3))
