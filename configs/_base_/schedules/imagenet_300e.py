"""300 epochs for a total batch of 1024: warm-up from 1e-7, cosine to 1e-6, EMA of the weights."""
_base_ = '../runtime.py'

default_scope = 'mmpretrain'
visualizer = dict(type='UniversalVisualizer', vis_backends=_base_.vis_backends)

max_epochs, warmup_epochs, lr = 300, 20, 1e-3
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.04))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-7 / lr,
        by_epoch=True,
        end=warmup_epochs,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        by_epoch=True,
        begin=warmup_epochs,
        end=max_epochs,
        convert_to_iter_based=True),
]
train_cfg = dict(type='mmlocalmamba.EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
del max_epochs, warmup_epochs, lr

# a momentum of 1e-4 is a decay of 0.9999
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),
]
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook', enable=False))
auto_scale_lr = dict(base_batch_size=1024)
