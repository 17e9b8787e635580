"""A direction search of a few minutes on two CPU cores."""
_base_ = './digits_cls.py'

custom_hooks = [*_base_.custom_hooks, dict(type='mmlocalmamba.ScanSearchHook', mode='joint', k=4)]
# The training is short: the logits have to move faster than the weights.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(alphas=dict(decay_mult=0.0, lr_mult=10.0))))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
