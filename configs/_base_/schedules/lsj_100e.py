"""100 epochs for a total batch of 64, in mixed precision on a GPU, with learning rates that decay by depth.

An epoch is 118000 images here, as in ViTDet: 184375 * 64 = 100 * 118000. The rate drops at epochs
88.9 and 96.3.
"""
_base_ = '../default_runtime_det.py'

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
        milestones=[163889, 177546],
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
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=interval, save_last=True, save_best='coco/bbox_mAP'))
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=64)
del max_iters, interval
