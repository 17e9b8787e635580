"""UperNet with VMamba-B, version 2 (s2l15), on ADE20K. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

# the authors' weights of ImageNet; another address, a name, a file or None (from scratch). An address takes the
# weights without their average, as the authors' training does; a name takes the average.
model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
            'vssm_base_0229_ckpt_epoch_237.pth'),
        arch='base_v2',
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False,
        drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
