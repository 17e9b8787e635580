"""Window-size study on handwritten digits: LocalVim-nano on 16x16 tokens with the scans h and w2 and their flips.
"""
_base_ = './localvim-nano_digits.py'

model = dict(
    backbone=dict(
        patch_size=2,
        directions=['h', 'h_flip', 'w2', 'w2_flip']))
train_cfg = dict(max_epochs=8)
