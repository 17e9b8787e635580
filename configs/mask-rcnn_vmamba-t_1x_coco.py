"""Mask R-CNN with VMamba-T, version 0, on COCO, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_1x_coco.py'

model = dict(
    backbone=dict(
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False))
