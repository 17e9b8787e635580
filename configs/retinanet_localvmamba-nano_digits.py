"""Demo: RetinaNet with LocalVMamba-nano finds digits on photographs, boxes only, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/retinanet_localvmamba.py',
    '_base_/datasets/digits_coco.py',
    '_base_/schedules/digits_det.py',
]

model = dict(
    backbone=dict(arch='nano', drop_path_rate=0.0, out_indices=(0, 1, 2, 3)),
    neck=dict(
        in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4, norm_cfg=dict(type='BN')),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        stacked_convs=2,
        feat_channels=64,
        anchor_generator=dict(strides=[4, 8, 16, 32])),  # objects of 20 to 56 pixels
    test_cfg=dict(nms_pre=500, max_per_img=20))

# The annotations need no polygons.
globals().update(__import__('mmlocalmamba').without_masks(_base_))
