"""Natural objects on photographs with label images, 128x128, in ADE20K's format.

Written by tools/dataset_converters/stamps.py.
"""
_base_ = './digits_ade.py'

data_root = 'data/stamps/ade/'
metainfo = dict(
    classes=('background', 'bird', 'fish', 'mammal', 'fruit', 'vegetable', 'flower', 'tool', 'vehicle'),
    palette=_base_.metainfo.palette[:9])
train_pipeline = [
    *_base_.train_pipeline[:-1],
    dict(type='RandomFlip', prob=0.5),
    _base_.train_pipeline[-1],
]
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
