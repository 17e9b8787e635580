"""Ablation: LocalVim-T without search and without SCAttn (paper Table 5, third row).

Total batch 1024: 8 GPUs x 128 images.
"""
_base_ = './localvim-t-nosearch_8xb128_in1k.py'

model = dict(backbone=dict(scattn=False))
