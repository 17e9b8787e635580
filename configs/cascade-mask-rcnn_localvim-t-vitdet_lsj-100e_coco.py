"""Cascade Mask R-CNN with LocalVim-T in the ViTDet style on COCO, 100 epochs.

Total batch 64: 8 GPUs x 8 images.

The paper's text names this model; the authors have no such file. It is the Mask R-CNN of
mask-rcnn_localvim-t-vitdet_lsj-100e_coco.py with three box heads in cascade.
"""
_base_ = './mask-rcnn_localvim-t-vitdet_lsj-100e_coco.py'

stages = [  # IoU from which a proposal is positive, scale of the box targets
    (0.5, [0.1, 0.1, 0.2, 0.2]),
    (0.6, [0.05, 0.05, 0.1, 0.1]),
    (0.7, [0.033, 0.033, 0.067, 0.067]),
]
model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                _base_.model.roi_head.bbox_head,
                reg_class_agnostic=True,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=stds)) for _, stds in stages
        ]),
    train_cfg=dict(
        rcnn=[
            dict(
                _base_.model.train_cfg.rcnn,
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=iou,
                    neg_iou_thr=iou,
                    min_pos_iou=iou,
                    match_low_quality=False,
                    ignore_iof_thr=-1)) for iou, _ in stages
        ]))
del stages
