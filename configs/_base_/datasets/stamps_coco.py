"""Natural objects on photographs with boxes and masks, 128x128, in COCO's format.

Written by tools/dataset_converters/stamps.py.
"""
_base_ = './digits_coco.py'

data_root = 'data/stamps/coco/'
metainfo = dict(classes=('bird', 'fish', 'mammal', 'fruit', 'vegetable', 'flower', 'tool', 'vehicle'))
train_pipeline = [
    *_base_.train_pipeline[:-1],
    dict(type='RandomFlip', prob=0.5),
    _base_.train_pipeline[-1],
]
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
