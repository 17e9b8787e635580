"""Demo: UperNet with LocalVMamba-nano segments cut-out animals, plants and things on photographs, from scratch,
on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/upernet_digits.py',
    '_base_/datasets/stamps_ade.py',
    '_base_/schedules/digits_seg.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    decode_head=dict(in_channels=[32, 64, 128, 256], num_classes=9))
