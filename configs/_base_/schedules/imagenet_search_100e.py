"""The 300 epochs of ImageNet cut to 100 for the direction search, everything else the same."""
_base_ = './imagenet_300e.py'

max_epochs = 100
param_scheduler = _base_.param_scheduler
param_scheduler[1]['end'] = max_epochs
train_cfg = dict(max_epochs=max_epochs)
del max_epochs

custom_hooks = [*_base_.custom_hooks, dict(type='mmlocalmamba.ScanSearchHook', mode='joint', k=4)]
