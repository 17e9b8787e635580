"""Mask R-CNN with LocalVMamba-T on COCO, 36 epochs, multi-scale.

Total batch 16: 8 GPUs x 2 images.
"""
_base_ = [
    '_base_/models/mask_rcnn_localvmamba.py',
    '_base_/datasets/coco_ms3x.py',
    '_base_/schedules/3x.py',
]
