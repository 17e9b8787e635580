"""digits_coco.py for boxes without masks: annotations need no polygons."""
_base_ = './digits_coco.py'

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
for step in train_pipeline + test_pipeline:
    if step['type'] == 'LoadAnnotations':
        step['with_mask'] = False
del step
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
