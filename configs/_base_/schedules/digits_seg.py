"""A few minutes on two CPU cores."""
_base_ = '../runtime.py'

default_scope = 'mmseg'
visualizer = dict(type='SegLocalVisualizer', vis_backends=_base_.vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
tta_model = dict(type='SegTTAModel')

max_iters, interval = 1200, 400
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=1e-5, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=max_iters, val_interval=interval)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=interval, max_keep_ckpts=1, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook'))
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False, base_batch_size=8)
del max_iters, interval
