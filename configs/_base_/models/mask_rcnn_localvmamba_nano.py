"""Mask R-CNN with LocalVMamba-nano, for images of 128x128 with objects of 20 to 56 pixels."""
_base_ = './mask_rcnn_localvmamba.py'

model = dict(
    backbone=dict(
        arch='nano',
        drop_path_rate=0.0),
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=64,
        num_outs=4,
        norm_cfg=dict(type='BN')),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(
            scales=None,
            octave_base_scale=4,
            scales_per_octave=2,
            strides=[4, 8, 16, 32])),  # anchors of 16, 23, 32, 45, ... pixels
    roi_head=dict(
        # objects up to 32 pixels are read from stride 4, up to 64 from stride 8
        bbox_roi_extractor=dict(out_channels=64, finest_scale=16),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64, finest_scale=16),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=100), rcnn=dict(max_per_img=20)))
