"""VMamba-B, version 0, on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './vmamba-t_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='base'),
    head=dict(in_channels=1024))
