"""Mask R-CNN with VMamba-T, version 2 (s2l5), on COCO, 36 epochs, multi-scale. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_ms-3x_coco.py'

# the authors' weights of ImageNet; another name, an address, a file or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='mmlocalmamba://vmamba_tiny_v2_s2l5'),
        arch='tiny_v2_s2l5',
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False))
