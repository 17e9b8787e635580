"""Demo: UperNet with LocalVMamba-nano segments cut-out animals, plants and things on photographs, from scratch,
on a CPU.

Total batch 8.
"""
_base_ = [
    '_base_/models/upernet_localvmamba_nano.py',
    '_base_/datasets/stamps_ade.py',
    '_base_/schedules/digits_seg.py',
]

model = dict(decode_head=dict(num_classes=9))
