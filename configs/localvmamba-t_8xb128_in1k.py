"""LocalVMamba-T on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images.

The authors train LocalVMamba in mixed precision, and LocalVim without. For the rest see
localvim-t_8xb128_in1k.py.
"""
_base_ = [
    '_base_/datasets/imagenet_bs128.py',
    '_base_/schedules/imagenet_300e.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=768))
optim_wrapper = dict(type=_base_.amp_optim_wrapper)
