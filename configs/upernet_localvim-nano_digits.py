"""Demo: UperNet with LocalVim-nano segments digits on photographs, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/upernet_localvmamba_nano.py',
    '_base_/datasets/digits_ade.py',
    '_base_/schedules/digits_seg.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmlocalmamba.LocalVim',
        arch='nano',
        img_size=128,
        patch_size=8,  # 16x16 tokens
        out_indices=(1, 2, 4, 5),
        out_type='featmap',
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    # a pyramid of strides 4 to 32, for the strokes
    neck=dict(type='Feature2Pyramid', embed_dim=64, rescales=[2, 1, 0.5, 0.25], norm_cfg=dict(type='BN')),
    decode_head=dict(in_channels=[64, 64, 64, 64]))
