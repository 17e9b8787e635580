"""Faster R-CNN with LocalVMamba-T on COCO, boxes only, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = [
    '_base_/models/mask_rcnn_localvmamba.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/1x.py',
]

# Faster R-CNN is Mask R-CNN without the mask head.
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(mask_roi_extractor=None, mask_head=None))

# The annotations need no polygons.
globals().update(__import__('mmlocalmamba').without_masks(_base_))
