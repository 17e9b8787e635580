"""UperNet with LocalVMamba-nano, for images of 128x128."""
_base_ = './upernet_digits.py'

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    decode_head=dict(in_channels=[32, 64, 128, 256]))
