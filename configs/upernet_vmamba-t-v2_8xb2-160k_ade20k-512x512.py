"""UperNet with VMamba-T, version 2 (s1l8), on ADE20K. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

# the authors' weights of ImageNet; another name, an address, a file or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='mmlocalmamba://vmamba_tiny_v2'),
        arch='tiny_v2',
        directions=['h', 'v', 'h_flip', 'v_flip'],
        scattn=False,
        drop_path_rate=0.2))
