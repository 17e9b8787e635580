"""Faster R-CNN with FPN on LocalVMamba: mask_rcnn_localvmamba.py without its masks."""
_base_ = './mask_rcnn_localvmamba.py'

model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(mask_roi_extractor=None, mask_head=None))
