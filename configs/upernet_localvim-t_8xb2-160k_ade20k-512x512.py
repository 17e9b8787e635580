"""UperNet with LocalVim-T on ADE20K. Total batch 16: 8 GPUs x 2 images.

As in the authors' file there is no neck: the head takes four maps of stride 16. That is what the
paper's 181 GFLOPs are; with maps of stride 4 to 32 the head alone would cost several times as much.
"""
_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/ade20k_512.py',
    '_base_/schedules/160k.py',
]

# the authors' weights of ImageNet; a file, another URL or None (from scratch)
pretrained = 'https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vim_tiny.ckpt'
model = dict(
    backbone=dict(
        type='mmlocalmamba.LocalVim',
        arch='tiny',
        img_size=512,  # grid of the learned positions; those of ImageNet are resized to it on loading
        out_indices=(4, 9, 14, 19),
        out_type='featmap',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=None)),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3))
