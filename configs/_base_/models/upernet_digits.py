"""UperNet cut to digits on images of 128x128; the configuration adds the backbone and the head's inputs."""
_base_ = './upernet.py'

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    decode_head=dict(
        channels=64,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        dropout_ratio=0,
        # most pixels are background; cross entropy alone predicts nothing else for long
        loss_decode=[
            dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            dict(type='DiceLoss', loss_name='loss_dice', loss_weight=3.0)
        ]),
    auxiliary_head=None)
