"""LocalVMamba-nano on Fashion-MNIST, from scratch, on a CPU. Total batch 64."""
_base_ = __import__('mmlocalmamba').config_path('localvim-nano_fashion')

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        patch_size=4,  # 7x7 tokens in the first stage
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=256))
