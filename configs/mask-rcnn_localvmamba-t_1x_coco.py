"""Mask R-CNN with LocalVMamba-T on COCO, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = [
    '_base_/models/mask_rcnn_localvmamba.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/1x.py',
]
