"""Ablation on handwritten digits: global and local scans, no SCAttn; localvim-nano_digits.py has its channel branch."""
_base_ = './localvim-nano_digits.py'

pretrained = None  # path or URL of weights to start from

model = dict(backbone=dict(scattn=False, init_cfg=dict(checkpoint=pretrained)))
