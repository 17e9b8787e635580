"""Fashion-MNIST, 28x28, one folder per class; otherwise as digits_cls.py.

tools/dataset_converters/fashion_mnist.py writes the data.
"""
_base_ = './digits_cls.py'

data_root = 'data/fashion_mnist/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(28, 28)),
    dict(type='RandomCrop', crop_size=28, padding=2),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(28, 28)),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(data_root=data_root, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
