"""UperNet with LocalVMamba-T on ADE20K. Total batch 16: 8 GPUs x 2 images."""
_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/ade20k_512.py',
    '_base_/schedules/160k.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384, in_index=2))
