"""Direction search for LocalVim-T and -S on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images.

One supernet of dimension 128 serves both models, because their blocks differ only in width. Retrain with
localvim-{t,s}_8xb128_in1k.py --cfg-options model.backbone.directions=WORK_DIR/directions.json
"""
_base_ = [
    '_base_/datasets/imagenet_bs128.py',
    '_base_/schedules/imagenet_search_100e.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch=dict(embed_dims=128, num_layers=20),
        directions='search',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    head=dict(in_channels=128))
