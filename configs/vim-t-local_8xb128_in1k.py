"""Ablation: Vim-T with local scans instead of horizontal ones (paper Table 5, second row).

Total batch 1024: 8 GPUs x 128 images.
"""
_base_ = './vim-t_8xb128_in1k.py'

model = dict(
    backbone=dict(directions=['w2', 'w2_flip']))
