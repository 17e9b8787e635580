"""Demo: Faster R-CNN with LocalVMamba-nano finds digits on photographs, boxes only, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/mask_rcnn_localvmamba_nano.py',
    '_base_/datasets/digits_coco.py',
    '_base_/schedules/digits_det.py',
]

# Faster R-CNN is Mask R-CNN without the mask head.
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(mask_roi_extractor=None, mask_head=None))

# The annotations need no polygons.
globals().update(__import__('mmlocalmamba').without_masks(_base_))
