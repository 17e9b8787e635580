"""Vim-T+: Vim-T at finer granularity, patches of 16 at a stride of 8.

30 epochs at a constant rate make it from Vim-T (`pretrained`), as hustvl/Vim's ft-vim-t.sh does.
hustvl/Vim released its weights; its README reports 78.3 % top-1. Total batch 1024: 8 GPUs x 128 images.
"""
_base_ = './vim-t-midcls_8xb128_in1k.py'

model = dict(
    backbone=dict(
        stride=8,
        drop_path_rate=0.0,
        init_cfg=dict(allow=['stride'])))
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=30)
