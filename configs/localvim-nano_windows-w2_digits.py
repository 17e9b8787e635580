"""Window-size study on handwritten digits: LocalVim-nano on 16x16 tokens with the scans h and w2 and their flips.
"""
_base_ = [
    '_base_/models/classifier.py',
    '_base_/datasets/digits_cls.py',
    '_base_/schedules/digits_cls.py',
]

pretrained = None  # path or URL of weights to start from

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='nano',
        img_size=32,
        patch_size=2,
        directions=['h', 'h_flip', 'w2', 'w2_flip'],
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    head=dict(num_classes=10, in_channels=64, topk=(1, )))
train_cfg = dict(max_epochs=8)
