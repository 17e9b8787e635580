"""Demo: direction search for LocalVim-nano on handwritten digits, on a CPU. Logits and weights are trained together.

Retrain with localvim-nano_digits.py --cfg-options model.backbone.directions=WORK_DIR/directions.json
"""
_base_ = './localvim-nano_digits.py'

model = dict(backbone=dict(directions='search'))
custom_hooks = [*_base_.custom_hooks, dict(type='mmlocalmamba.ScanSearchHook', mode='joint', k=4)]
# The training is short, so the logits must move faster than the weights.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(alphas=dict(decay_mult=0.0, lr_mult=10.0))))
train_cfg = dict(max_epochs=15, val_interval=3)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
