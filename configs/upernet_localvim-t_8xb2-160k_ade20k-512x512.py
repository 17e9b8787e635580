"""UperNet with LocalVim-T on ADE20K. Total batch 16: 8 GPUs x 2 images.

As in the authors' file, there is no neck: the head takes four maps of stride 16. The paper's 181
GFLOPs belong to this model. With maps of stride 4 to 32 the head alone would cost several times as much.
"""
_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/ade20k_512.py',
    '_base_/schedules/160k.py',
]

# the authors' weights of ImageNet; a file, another URL or None (from scratch)
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
            checkpoint='https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vim_tiny.ckpt')),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3))
