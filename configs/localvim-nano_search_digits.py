"""Demo: direction search for LocalVim-nano on handwritten digits, on a CPU: logits and weights together.

Retrain with localvim-nano_digits.py --cfg-options model.backbone.directions=WORK_DIR/directions.json
model.backbone.window_pad=none
"""
_base_ = [
    '_base_/models/classifier.py',
    '_base_/datasets/digits_cls.py',
    '_base_/schedules/digits_search.py',
]

pretrained = None  # path or URL of weights to start from

model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='nano',
        img_size=32,
        patch_size=4,  # 8x8 tokens
        directions='search',
        window_pad='none',  # windows of 7x7 would make 196 steps of 64 tokens
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    head=dict(num_classes=10, in_channels=64, topk=(1, )))
# Workers that persist would make a resumed search see other augmentations.
train_dataloader = dict(persistent_workers=False)
train_cfg = dict(max_epochs=15, val_interval=3)
