"""LocalVMamba-nano classifies small images of ten classes."""
_base_ = './classifier.py'

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        patch_size=4,  # 8x8 tokens in the first stage of 32x32 pixels, 7x7 of 28x28
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(num_classes=10, in_channels=256, topk=(1, )))
