"""Demo: LocalVMamba-nano classifies handwritten digits, from scratch, on a CPU. Total batch 64."""
_base_ = [
    '_base_/models/localvmamba_nano_cls.py',
    '_base_/datasets/digits_cls.py',
    '_base_/schedules/digits_cls.py',
]
