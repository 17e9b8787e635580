"""Direction search for LocalVMamba-S on ImageNet-1K: see localvmamba-t_search_8xb128-100e_in1k.py.
Retrain with localvmamba-s_8xb128_in1k.py."""
_base_ = './localvmamba-t_search_8xb128-100e_in1k.py'

model = dict(backbone=dict(arch=dict(depths=[2, 2, 27, 2])))
