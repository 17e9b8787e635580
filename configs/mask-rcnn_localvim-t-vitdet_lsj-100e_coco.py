"""Mask R-CNN with LocalVim-T in the ViTDet style on COCO, 100 epochs.

Total batch 64: 8 GPUs x 8 images.

The authors' file called "cascade" builds this Mask R-CNN; it has the paper's 31M parameters if
positions are learned for 64x64 tokens, and 29.9M here, where the 14x14 of pre-training are resized
to the image. Other departures: the schedule fits the total batch (theirs, made for 64, runs with 2
images per GPU), mixed precision stays on, and the layer decay, which finds none of their layers,
applies.
"""
_base_ = [
    '_base_/models/mask_rcnn_vitdet.py',
    '_base_/datasets/coco_lsj.py',
    '_base_/schedules/lsj_100e.py',
]

# the authors' weights of ImageNet; a file, another URL or None (from scratch)
pretrained = 'https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vim_tiny.ckpt'
