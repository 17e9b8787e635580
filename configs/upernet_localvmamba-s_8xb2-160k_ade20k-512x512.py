"""UperNet with LocalVMamba-S on ADE20K, in mixed precision. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

# the authors' weights of ImageNet; another name, an address, a file or None (from scratch)
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='mmlocalmamba://localvmamba_small'),
        arch='small', drop_path_rate=0.2))
optim_wrapper = dict(type=_base_.amp_optim_wrapper)
