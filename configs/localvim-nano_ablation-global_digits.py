"""Ablation on handwritten digits (paper Table 5): two global scans, no SCAttn, which is Vim.

One block more than with four scans, as the paper has 24 for 20.
"""
_base_ = './localvim-nano_digits.py'

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=64, num_layers=7, d_state=4),
        directions=['h', 'h_flip'],
        scattn=False))
