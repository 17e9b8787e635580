"""Mask R-CNN with LocalVMamba-S on COCO, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_1x_coco.py'

# the authors' weights of ImageNet; a file, another URL or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vssm_small.ckpt'),
        arch='small'))
