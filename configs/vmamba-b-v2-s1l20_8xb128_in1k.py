"""VMamba-B, version 2 (s1l20), on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './vmamba-t-v2_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='base_v2_s1l20', drop_path_rate=0.5),
    head=dict(in_channels=1024))
