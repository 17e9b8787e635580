"""Mask R-CNN with FPN on LocalVMamba."""
_base_ = './mask_rcnn_fpn.py'

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(in_channels=[96, 192, 384, 768]))
