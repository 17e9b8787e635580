"""Demo: UperNet with LocalVMamba-nano segments digits on photographs, from scratch, on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/upernet_localvmamba_nano.py',
    '_base_/datasets/digits_ade.py',
    '_base_/schedules/digits_seg.py',
]
