"""Demo: Faster R-CNN with LocalVMamba-nano finds digits on photographs, boxes only, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/faster_rcnn_localvmamba_nano.py',
    '_base_/datasets/digits_boxes.py',
    '_base_/schedules/digits_det.py',
]
