"""Mask R-CNN with LocalVMamba-S on COCO, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_1x_coco.py'

pretrained = None  # path or URL of ImageNet weights, ours or the authors'

model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=pretrained)))
