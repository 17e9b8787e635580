"""LocalVMamba-nano on Fashion-MNIST, from scratch, on a CPU. Total batch 64."""
_base_ = [
    '_base_/models/localvmamba_nano_cls.py',
    '_base_/datasets/fashion_mnist.py',
    '_base_/schedules/digits_cls.py',
]

train_cfg = dict(max_epochs=8, val_interval=1)
