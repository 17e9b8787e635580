"""Ablation on handwritten digits: local scans instead of global ones, see localvim-nano_ablation-global_digits.py."""
_base_ = './localvim-nano_ablation-global_digits.py'

model = dict(
    backbone=dict(directions=['w2', 'w2_flip']))
