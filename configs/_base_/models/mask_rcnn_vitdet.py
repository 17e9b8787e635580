"""Mask R-CNN as in ViTDet on LocalVim: a simple pyramid from the last map, and normalised heads."""
_base_ = './mask_rcnn_fpn.py'

norm_cfg = dict(type='mmpretrain.LN2d')  # mmdet ships no LayerNorm for maps
model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='tiny',
        img_size=1024,  # grid of the learned positions; those of ImageNet are resized to it on loading
        out_type='featmap',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(
        _delete_=True,
        type='mmlocalmamba.SimpleFPN',
        backbone_channel=192,
        out_channels=256,
        num_outs=5,
        norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg)))
del norm_cfg
