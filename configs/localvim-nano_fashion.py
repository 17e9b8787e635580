"""LocalVim-nano on Fashion-MNIST, from scratch, on a CPU: 14x14 tokens, as on ImageNet. Total batch 64."""
_base_ = [
    '_base_/datasets/fashion_mnist.py',
    '_base_/schedules/digits_cls.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='nano',
        img_size=28,
        patch_size=2,
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    head=dict(in_channels=64))
train_cfg = dict(max_epochs=8, val_interval=1)
