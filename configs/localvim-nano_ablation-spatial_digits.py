"""Ablation on handwritten digits: global and local scans, SCAttn with the spatial branch of the paper's Fig. 3b."""
_base_ = './localvim-nano_digits.py'

model = dict(
    backbone=dict(scattn=dict(spatial=True)))
