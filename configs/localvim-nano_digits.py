"""Demo: LocalVim-nano classifies handwritten digits, from scratch, on a CPU. Total batch 64."""
_base_ = [
    '_base_/datasets/digits_cls.py',
    '_base_/schedules/digits_cls.py',
]

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='nano',
        img_size=32,
        patch_size=4,  # 8x8 tokens
        window_pad='none',  # with pads, searched windows of 7x7 would make 196 steps of 64 tokens
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    head=dict(in_channels=64))
train_cfg = dict(max_epochs=24)
