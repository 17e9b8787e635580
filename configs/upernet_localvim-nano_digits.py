"""Demo: UperNet with LocalVim-nano segments digits on photographs, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/digits_ade.py',
    '_base_/schedules/digits_seg.py',
]

pretrained = None  # path or URL of weights to start from

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='nano',
        img_size=128,
        patch_size=8,  # 16x16 tokens
        out_indices=(1, 2, 4, 5),
        out_type='featmap',
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    # a pyramid of strides 2 to 16, for the strokes
    neck=dict(type='Feature2Pyramid', embed_dim=64, norm_cfg=dict(type='BN')),
    decode_head=dict(
        in_channels=[64, 64, 64, 64], channels=64, num_classes=11, norm_cfg=dict(type='BN'),
        dropout_ratio=0,
        # most pixels are background; cross entropy alone predicts nothing else for long
        loss_decode=[
            dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            dict(type='DiceLoss', loss_name='loss_dice', loss_weight=3.0)
        ]),
    auxiliary_head=None)
