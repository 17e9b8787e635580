"""UperNet with LocalVim-T on ADE20K. Total batch 16: 8 GPUs x 2 images.

As in the authors' file, there is no neck: the head takes four maps of stride 16. The paper's 181
GFLOPs belong to this model. With maps of stride 4 to 32 the head alone would cost several times as much.
"""
_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/ade20k_512.py',
    '_base_/schedules/160k.py',
]

# the authors' weights of ImageNet; another name, an address, a file or None (from scratch)
model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='tiny',
        img_size=512,  # the grid of learned positions; ImageNet's positions are resized to it on loading
        out_indices=(4, 9, 14, 19),
        out_type='featmap',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='mmlocalmamba://localvim_tiny')),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3))
