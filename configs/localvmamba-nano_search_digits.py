"""Demo: direction search for LocalVMamba-nano on handwritten digits, on a CPU.

The weights are trained on one half of the training images, the logits on the other half.

Retrain with localvmamba-nano_digits.py --cfg-options model.backbone.directions=WORK_DIR/directions.json
"""
_base_ = './localvmamba-nano_digits.py'

model = dict(backbone=dict(directions='search'))

# Images are sorted by class, so every other image is a fair half.
train_dataloader = dict(dataset=dict(indices=range(0, 1438, 2)))
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='mmlocalmamba.ScanSearchHook',
        mode='bilevel',
        k=4,
        optimizer=dict(type='Adam', lr=2e-2, betas=(0.5, 0.999)),
        held_out=dict(
            batch_size=64,
            num_workers=1,
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=dict(
                type='CustomDataset',
                data_root=_base_.data_root,
                data_prefix='imagenet/train',
                indices=range(1, 1438, 2),
                pipeline=_base_.train_pipeline))),
]
# With half of the images an epoch has half as many steps.
train_cfg = dict(max_epochs=40, val_interval=4)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
