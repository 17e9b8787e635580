"""LocalVMamba-T with the block of VMamba's version 2 (s1l8), on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images.

A model of this project: nobody has trained it on ImageNet. The recipe is VMamba's, which is Swin's with an average of
the weights.
"""
_base_ = [
    '_base_/datasets/imagenet_bs128.py',
    '_base_/schedules/imagenet_300e.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='tiny_v2',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=768))
data_preprocessor = dict(
    batch_augments=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
optim_wrapper = dict(
    type=_base_.amp_optim_wrapper,
    optimizer=dict(weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
# warm-up from 1e-6, cosine to 1e-5
param_scheduler = [
    dict(_base_.param_scheduler[0], start_factor=1e-3),
    dict(_base_.param_scheduler[1], eta_min=1e-5),
]
