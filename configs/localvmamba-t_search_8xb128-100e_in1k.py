"""Direction search for LocalVMamba-T on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images.

The supernet is a third as wide. Retrain with
localvmamba-t_8xb128_in1k.py --cfg-options model.backbone.directions=WORK_DIR/directions.json
"""
_base_ = [
    '_base_/datasets/imagenet_bs128.py',
    '_base_/schedules/imagenet_search_100e.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch=dict(embed_dims=[32, 64, 128, 256], depths=[2, 2, 9, 2]),
        directions='search',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=256))
optim_wrapper = dict(type=_base_.amp_optim_wrapper)
