"""Ablation: LocalVim-T without search, SCAttn with the spatial branch of the paper's Fig. 3b.

Total batch 1024: 8 GPUs x 128 images.
"""
_base_ = './localvim-t-nosearch_8xb128_in1k.py'

model = dict(
    backbone=dict(scattn=dict(spatial=True)))
