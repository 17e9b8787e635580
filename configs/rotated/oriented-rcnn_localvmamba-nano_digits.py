"""Demo: Oriented R-CNN with LocalVMamba-nano finds rotated digits on photographs, from scratch, on a CPU.

It needs the OneDL stack with onedl-mmrotate, and data written by digits.py --rotated. Total batch 8.
"""
_base_ = [
    '../_base_/models/oriented_rcnn_localvmamba_nano.py',
    '../_base_/datasets/digits_dota.py',
    '../_base_/schedules/digits_det.py',
]

default_scope = 'mmrotate'
model = dict(
    neck=dict(out_channels=64, num_outs=4, norm_cfg=dict(type='BN')),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(
            scales=None, octave_base_scale=4, scales_per_octave=2, strides=[4, 8, 16, 32])),
    roi_head=dict(
        # objects up to 32 pixels are read from stride 4, up to 64 from stride 8
        bbox_roi_extractor=dict(out_channels=64, finest_scale=16),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100), rcnn=dict(max_per_img=20)))
default_hooks = dict(
    checkpoint=dict(save_best='dota/mAP'),
    visualization=dict(type='mmdet.DetVisualizationHook'))
visualizer = dict(type='RotLocalVisualizer')
