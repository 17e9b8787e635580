"""UperNet with LocalVMamba-nano segments cut-out animals, plants and things on photographs, from scratch, on a CPU.

Total batch 8. research/stamps.py writes the data.
"""
_base_ = [
    __import__('mmlocalmamba').config_path('_base_/models/upernet_localvmamba_nano'),
    __import__('mmlocalmamba').config_path('_base_/datasets/digits_ade'),
    __import__('mmlocalmamba').config_path('_base_/schedules/digits_seg'),
]

model = dict(decode_head=dict(num_classes=9))

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
