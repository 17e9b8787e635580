"""LocalVMamba-S with the block of VMamba's version 2 (s2l15), on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images.

A model of this project: nobody has trained it on ImageNet.
"""
_base_ = './localvmamba-t-v2_8xb128_in1k.py'

model = dict(
    backbone=dict(arch='small_v2', drop_path_rate=0.3))
