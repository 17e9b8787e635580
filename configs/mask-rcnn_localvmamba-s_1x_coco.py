"""Mask R-CNN with LocalVMamba-S on COCO, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_1x_coco.py'

# the authors' weights of ImageNet; another name, an address, a file or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='mmlocalmamba://localvmamba_small'),
        arch='small'))
