"""Demo: Mask R-CNN with LocalVMamba-nano finds digits on photographs, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/mask_rcnn_localvmamba_nano.py',
    '_base_/datasets/digits_coco.py',
    '_base_/schedules/digits_det.py',
]
