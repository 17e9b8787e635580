"""Demo: UperNet with LocalVMamba-nano segments digits on photographs, from scratch, on a CPU.

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
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], channels=64, num_classes=11, norm_cfg=dict(type='BN'),
        dropout_ratio=0,
        # most pixels are background; cross entropy alone predicts nothing else for long
        loss_decode=[
            dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            dict(type='DiceLoss', loss_name='loss_dice', loss_weight=3.0)
        ]),
    auxiliary_head=None)
