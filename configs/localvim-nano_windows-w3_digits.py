"""Window-size study: see localvim-nano_windows-w2_digits.py."""
_base_ = './localvim-nano_windows-w2_digits.py'

model = dict(
    backbone=dict(
        directions=['h', 'h_flip', 'w3', 'w3_flip']))
