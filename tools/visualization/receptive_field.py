"""Draw the effective receptive fields of a backbone (Luo et al., arXiv 1701.04128): where the image matters to the
feature in the middle of the map, for each stage, or for four blocks of a plain backbone.

    python tools/visualization/receptive_field.py configs/localvmamba-s_8xb128_in1k.py local_vssm_small.ckpt \\
        --images data/imagenet/val --count 50 --out receptive_field.png
"""
import argparse

from backbone import add_arguments, load, save

from mmlocalmamba.backbones import LocalVim
from mmlocalmamba.backbones.archs import LOCAL_VIM
from mmlocalmamba.backbones.base import resolve_arch
from mmlocalmamba.visualization import draw_receptive_fields, receptive_fields


def give_maps(cfg):
    """Maps of all stages; of LocalVim, the residual stream after each quarter of its blocks."""
    if not cfg.type.endswith('LocalVim'):
        cfg.out_indices = (0, 1, 2, 3)
        return
    depth = resolve_arch(cfg.get('arch', 'tiny'), LOCAL_VIM, ('embed_dims', 'num_layers'))['num_layers']
    cfg.update(out_type='featmap', out_feature='residual', out_indices=[depth * i // 4 - 1 for i in (1, 2, 3, 4)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    backbone, images, title = load(parser, args, give_maps)
    plain = isinstance(backbone, LocalVim)
    fields = receptive_fields(backbone, images)
    strides = [backbone.stride if plain else backbone.patch_size * 2 ** stage for stage in backbone.out_indices]
    titles = [f'block {index}' if plain else f'stage {index + 1}, stride {stride}'
              for index, stride in zip(backbone.out_indices, strides)]
    save(draw_receptive_fields(fields, titles, strides), args, title)


if __name__ == '__main__':
    main()
