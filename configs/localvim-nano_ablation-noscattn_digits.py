"""Ablation on handwritten digits: global and local scans, no SCAttn; localvim-nano_digits.py has its channel branch."""
_base_ = './localvim-nano_digits.py'

model = dict(backbone=dict(scattn=False))
