"""UperNet with LocalVMamba-T with the block of VMamba's version 2, on ADE20K.

Total batch 16: 8 GPUs x 2 images. A backbone of this project, without weights of ImageNet.
"""
_base_ = './upernet_localvmamba-t_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(arch='tiny_v2', drop_path_rate=0.2))
