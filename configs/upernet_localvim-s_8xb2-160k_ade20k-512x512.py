"""UperNet with LocalVim-S on ADE20K. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvim-t_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint=None),  # weights of LocalVim-S are not released
        arch='small'),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384))
