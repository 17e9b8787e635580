"""20 epochs for a total batch of 64, from pre-trained weights: a tenth of the rate from scratch, no EMA.

This is a starting point. It was not tuned.
"""
_base_ = '../runtime.py'

default_scope = 'mmpretrain'
visualizer = dict(type='UniversalVisualizer', vis_backends=_base_.vis_backends)

optim_wrapper = dict(
    type=_base_.amp_optim_wrapper,
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=1, convert_to_iter_based=True),
]
train_cfg = dict(type='mmlocalmamba.EpochBasedTrainLoop', max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=1, save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook', enable=False))
auto_scale_lr = dict(base_batch_size=64)
