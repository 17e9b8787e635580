"""Demo: LocalVMamba-nano classifies handwritten digits, from scratch, on a CPU. Total batch 64."""
_base_ = [
    '_base_/datasets/digits_cls.py',
    '_base_/schedules/digits_cls.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVMamba',
        arch='nano',
        patch_size=4,  # 8x8 tokens in the first stage
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=256))
