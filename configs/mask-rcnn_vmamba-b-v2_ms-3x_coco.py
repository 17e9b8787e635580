"""Mask R-CNN with VMamba-B, version 2 (s2l15), on COCO, 36 epochs, multi-scale. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_ms-3x_coco.py'

# the authors' weights of ImageNet; another name, an address, a file or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='mmlocalmamba://vmamba_base_v2'),
        arch='base_v2',
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False,
        drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]))
