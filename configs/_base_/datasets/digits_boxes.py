"""digits_coco.py for boxes without masks: annotations need no polygons."""
_base_ = './digits_coco.py'

(train_pipeline, test_pipeline, train_dataloader, val_dataloader,
 val_evaluator) = __import__('mmlocalmamba').without_masks(_base_)
test_dataloader, test_evaluator = val_dataloader, val_evaluator
