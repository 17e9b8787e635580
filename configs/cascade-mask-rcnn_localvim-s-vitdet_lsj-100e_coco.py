"""Cascade Mask R-CNN with LocalVim-S in the ViTDet style on COCO, 100 epochs.

Total batch 64: 8 GPUs x 8 images.
"""
_base_ = './cascade-mask-rcnn_localvim-t-vitdet_lsj-100e_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint=None),  # weights of LocalVim-S are not released
        arch='small'),
    neck=dict(backbone_channel=384))
