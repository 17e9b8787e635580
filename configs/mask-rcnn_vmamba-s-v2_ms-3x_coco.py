"""Mask R-CNN with VMamba-S, version 2 (s2l15), on COCO, 36 epochs, multi-scale. Total batch 16: 8 GPUs x 2 images."""
_base_ = './mask-rcnn_localvmamba-t_ms-3x_coco.py'

# the authors' weights of ImageNet; another address, a name, a file or None (from scratch). An address takes the
# weights without their average, as the authors' training does; a name takes the average.
model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
            'vssm_small_0229_ckpt_epoch_222.pth'),
        arch='small_v2',
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False,
        drop_path_rate=0.3))
