"""UperNet with LocalVMamba-nano for digits on images of 128x128."""
_base_ = './upernet.py'

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=64,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        dropout_ratio=0,
        # most pixels are background, and cross entropy alone predicts nothing else for a long time
        loss_decode=[
            dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            dict(type='DiceLoss', loss_name='loss_dice', loss_weight=3.0)
        ]),
    auxiliary_head=None)
