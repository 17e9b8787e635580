"""UperNet with VMamba-T, version 0, on ADE20K. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False))
