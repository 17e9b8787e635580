"""Mask R-CNN with LocalVim-T in the ViTDet style on COCO, 100 epochs with large-scale jitter.

Total batch 64: 8 GPUs x 8 images.

The authors' file called "cascade" builds this Mask R-CNN. It has the paper's 31M parameters if
positions are learned for 64x64 tokens. It has 29.9M here, where the 14x14 positions of pre-training
are resized to the image. Other differences: the schedule fits the total batch (theirs is made for 64
and runs with 2 images per GPU), mixed precision stays on, and the layer decay applies (theirs
matches none of their layers).
"""
_base_ = [
    '_base_/models/mask_rcnn_localvmamba.py',
    '_base_/datasets/coco_instance.py',
    '_base_/runtime.py',
]

# ---- model: a simple pyramid from the last map, and normalised heads ----

norm_cfg = dict(type='mmpretrain.LN2d')  # mmdet has no LayerNorm for maps
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmlocalmamba.LocalVim',
        arch='tiny',
        img_size=1024,  # the grid of learned positions; ImageNet's positions are resized to it on loading
        out_type='featmap',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='mmlocalmamba://localvim_tiny')),
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

# ---- data: 1024x1024 crops of images scaled by 0.1 to 2, 8 per GPU ----

image_size = (1024, 1024)
pad = dict(type='Pad', size=image_size, pad_val=dict(img=(114, 114, 114)))
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=_base_.backend_args),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop',
        crop_type='absolute_range',
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    pad,
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=_base_.backend_args),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    pad,
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    _base_.pack_test,
]
del pad
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(type='InfiniteSampler', shuffle=True),  # the schedule counts iterations
    batch_sampler=None,  # all images have one shape
    dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# ---- schedule: an epoch is 118000 images, as in ViTDet: 184375 * 64 = 100 * 118000 ----

default_scope = 'mmdet'
visualizer = dict(type='DetLocalVisualizer', vis_backends=_base_.vis_backends, name='visualizer')
max_iters, interval = 184375, 5000
optim_wrapper = dict(
    type=_base_.amp_optim_wrapper,
    constructor='mmlocalmamba.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.7),
    clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR',
        by_epoch=False,
        begin=0,
        end=max_iters,
        milestones=[163889, 177546],  # epochs 88.9 and 96.3
        gamma=0.1),
]
train_cfg = dict(
    type='mmlocalmamba.IterBasedTrainLoop',
    max_iters=max_iters,
    val_interval=interval,
    # the last evaluation is at the last iteration, which `interval` does not divide
    dynamic_intervals=[(max_iters // interval * interval + 1, max_iters)])
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=interval, save_last=True, save_best='coco/bbox_mAP'),
    visualization=dict(type='DetVisualizationHook'))
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=64)
del max_iters, interval
