"""LocalVim-S on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './localvim-t_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='small'),
    head=dict(in_channels=384))
