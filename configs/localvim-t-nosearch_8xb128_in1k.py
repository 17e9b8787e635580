"""LocalVim-T without the search (LocalVim-T* in the paper).

Total batch 1024: 8 GPUs x 128 images.
"""
_base_ = './localvim-t_8xb128_in1k.py'

model = dict(
    backbone=dict(
        directions=['h', 'h_flip', 'w2', 'w2_flip']))  # in every block
