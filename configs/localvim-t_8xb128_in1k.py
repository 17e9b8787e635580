"""LocalVim-T on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images.

This differs from the authors' recipe in the EMA (on, with the decay that the paper states; off in their
file) and in RandAugment (without their own Distort, Zoom, Blur and Skew).
"""
_base_ = [
    '_base_/datasets/imagenet_bs128.py',
    '_base_/schedules/imagenet_300e.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    head=dict(in_channels=192))
