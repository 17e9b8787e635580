"""Cascade Mask R-CNN with LocalVim-T in the ViTDet style on COCO, 100 epochs.

Total batch 64: 8 GPUs x 8 images.

What the paper's text says; the authors have no such file. See
mask-rcnn_localvim-t-vitdet_lsj-100e_coco.py.
"""
_base_ = [
    '_base_/models/cascade_mask_rcnn_vitdet.py',
    '_base_/datasets/coco_lsj.py',
    '_base_/schedules/lsj_100e.py',
]

# the authors' weights of ImageNet; a file, another URL or None (from scratch)
pretrained = 'https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vim_tiny.ckpt'
