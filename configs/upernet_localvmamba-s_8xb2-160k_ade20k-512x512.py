"""UperNet with LocalVMamba-S on ADE20K, in mixed precision. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

# the authors' weights of ImageNet; a file, another URL or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vssm_small.ckpt'),
        arch='small', drop_path_rate=0.2))
optim_wrapper = dict(type=_base_.amp_optim_wrapper)
