"""VMamba-T, version 2 (s2l5), on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './vmamba-t-v2_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='tiny_v2_s2l5', drop_path_rate=0.2))
