"""LocalVMamba-S on ImageNet-1K. Total batch 1024: 8 GPUs x 128 images."""
_base_ = './localvmamba-t_8xb128_in1k.py'

model = dict(backbone=dict(arch='small'))
