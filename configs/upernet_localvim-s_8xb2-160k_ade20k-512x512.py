"""UperNet with LocalVim-S on ADE20K. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvim-t_8xb2-160k_ade20k-512x512.py'

pretrained = None  # weights of LocalVim-S are not released
model = dict(
    backbone=dict(arch='small'),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384))
