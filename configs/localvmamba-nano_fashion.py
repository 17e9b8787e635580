"""LocalVMamba-nano on Fashion-MNIST, from scratch, on a CPU. Total batch 64."""
_base_ = [
    '_base_/models/classifier.py',
    '_base_/datasets/fashion_mnist.py',
    '_base_/schedules/digits_cls.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        patch_size=4,  # 7x7 tokens in the first stage
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(num_classes=10, in_channels=256, topk=(1, )))
train_cfg = dict(max_epochs=8, val_interval=1)
