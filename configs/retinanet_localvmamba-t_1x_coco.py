"""RetinaNet with LocalVMamba-T on COCO, boxes only, 12 epochs. Total batch 16: 8 GPUs x 2 images."""
_base_ = [
    '_base_/models/retinanet_localvmamba.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/1x.py',
]

# The annotations need no polygons.
globals().update(__import__('mmlocalmamba').without_masks(_base_))
