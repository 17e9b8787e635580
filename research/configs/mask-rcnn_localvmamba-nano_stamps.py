"""Mask R-CNN with LocalVMamba-nano finds cut-out animals, plants and things on photographs, from scratch, on a CPU.

Total batch 8. research/stamps.py writes the data.
"""
_base_ = [
    __import__('mmlocalmamba').config_path('_base_/models/mask_rcnn_localvmamba_nano'),
    __import__('mmlocalmamba').config_path('_base_/datasets/digits_coco'),
    __import__('mmlocalmamba').config_path('_base_/schedules/digits_det'),
]

model = dict(roi_head=dict(bbox_head=dict(num_classes=8), mask_head=dict(num_classes=8)))

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
