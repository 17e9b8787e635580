"""Mask R-CNN with VMamba-T, version 2 (s1l8), on COCO, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_1x_coco.py'

# the authors' weights of ImageNet; another name, an address, a file or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='mmlocalmamba://vmamba_tiny_v2'),
        arch='tiny_v2',
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False))
