"""UperNet with VMamba-T, version 2 (s2l5), on ADE20K. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

# the authors' weights of ImageNet; another address, a name, a file or None (from scratch). An address takes the
# weights without their average, as the authors' training does; a name takes the average.
model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/'
            'vssm_tiny_0230_ckpt_epoch_262.pth'),
        arch='tiny_v2_s2l5',
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False,
        drop_path_rate=0.2))
