"""UperNet with LocalVMamba-S on ADE20K, in mixed precision. Total batch 16: 8 GPUs x 2 images."""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

pretrained = None  # path or URL of ImageNet weights, ours or the authors'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.2, init_cfg=dict(checkpoint=pretrained)))
optim_wrapper = dict(type='AmpOptimWrapper')
