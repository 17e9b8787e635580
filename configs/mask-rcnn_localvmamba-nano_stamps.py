"""Mask R-CNN with LocalVMamba-nano finds cut-out animals, plants and things on photographs, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/mask_rcnn_localvmamba_nano.py',
    '_base_/datasets/stamps_coco.py',
    '_base_/schedules/digits_det.py',
]

model = dict(roi_head=dict(bbox_head=dict(num_classes=8), mask_head=dict(num_classes=8)))
