"""Draw what SCAttn multiplies each direction of each block with, averaged over images.

    python tools/visualization/scattn_gates.py configs/localvim-t_8xb128_in1k.py local_vim_tiny.ckpt \\
        --images data/imagenet/val --count 50 --out gates.png
"""
import argparse

from backbone import add_arguments, load, save

from mmlocalmamba.visualization import draw_gates, scattn_gates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    backbone, images, title = load(parser, args)
    save(draw_gates(scattn_gates(backbone, images)), args, title)


if __name__ == '__main__':
    main()
