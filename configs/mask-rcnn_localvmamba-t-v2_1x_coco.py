"""Mask R-CNN with LocalVMamba-T with the block of VMamba's version 2, on COCO, 12 epochs.

Total batch 16: 8 GPUs x 2 images. A backbone of this project, without weights of ImageNet.
"""
_base_ = './mask-rcnn_localvmamba-t_1x_coco.py'

model = dict(backbone=dict(arch='tiny_v2'))
