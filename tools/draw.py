"""Draw scan orders, the directions of a model, its receptive fields, its SCAttn gates or what its scans read.

    python tools/draw.py scans --out scan_orders.png
    python tools/draw.py scans --directions h v w3 w3_flip --size 9 12 --image photo.jpg --out fig1.png
    python tools/draw.py scans --distances --directions h v w2 w7 --out scan_distances.png
    python tools/draw.py directions configs/localvim-t_8xb128_in1k.py --out directions.png
    python tools/draw.py receptive-field configs/localvmamba-s_8xb128_in1k.py local_vssm_small.ckpt \\
        --images data/imagenet/val --count 50 --out receptive_field.png
    python tools/draw.py gates configs/localvim-t_8xb128_in1k.py local_vim_tiny.ckpt \\
        --images data/imagenet/val --count 50 --out gates.png
    python tools/draw.py attention configs/localvim-t_8xb128_in1k.py local_vim_tiny.ckpt \\
        --images photo.jpg --point 100 150 --out attention.png

scans            the order in which scan directions read the tokens of an image
directions       the scan directions of each block of a backbone (the paper's Figs. 4 and 5)
receptive-field  the effective receptive fields of a backbone (Luo et al., arXiv 1701.04128): how much each pixel
                 contributes to the feature in the middle of the map, for each stage, or for four blocks of LocalVim
gates            the factors by which SCAttn multiplies each direction of each block, averaged over images
attention        which tokens the token at one point has read, in each direction of some blocks: the products of the
                 decays between the two tokens, with B and C, as VMamba draws them
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from mmlocalmamba.backbones import LocalVim
from mmlocalmamba.backbones.archs import LOCAL_VIM
from mmlocalmamba.backbones.base import resolve_arch
from mmlocalmamba.deployment.graphs import image_channels
from mmlocalmamba.directions import check_scan
from mmlocalmamba.predict import find_pictures, read_picture
from mmlocalmamba.search import CANDIDATES
from mmlocalmamba.visualization import (
    draw_directions,
    draw_gates,
    draw_readings,
    draw_receptive_fields,
    draw_scan_distances,
    draw_scan_orders,
    receptive_fields,
    scan_readings,
    scattn_gates,
)


def find_images(parser, paths, count):
    """Return at most ``count`` image files, evenly spaced."""
    try:
        files = [picture.path for picture in find_pictures(paths)[0]]
    except FileNotFoundError as error:
        parser.error(f'--images: {error}')
    if not files:
        parser.error(f'--images: no picture in {", ".join(map(str, paths))}')
    if count < 1:
        parser.error(f'--count must be at least 1, got {count}')
    return [files[index * len(files) // min(count, len(files))] for index in range(min(count, len(files)))]


def build_backbone(cfg):
    """Build the backbone of a configuration of any task."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model.backbone)


def load(parser, args, adapt=None):
    """Return the backbone, images (B, 3, H, W) and a title for the picture.

    Args:
        parser: reports invalid arguments.
        args: the arguments of :func:`add_model_arguments`.
        adapt: a function that changes the backbone's configuration in place.
    """
    cfg = Config.fromfile(args.config)
    files = find_images(parser, args.images, args.count)
    weights = args.checkpoint or (cfg.model.backbone.pop('init_cfg', None) or {}).get('checkpoint')
    if adapt is not None:
        adapt(cfg.model.backbone)
    torch.manual_seed(0)
    backbone = build_backbone(cfg)
    if weights:
        backbone.load_pretrained(weights)
    backbone.requires_grad_(False)

    normalise = cfg.model.get('data_preprocessor') or cfg.data_preprocessor
    mean, std = (torch.tensor(normalise[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    height, width = args.size
    try:
        images = [read_picture(file, image_channels(backbone)).resize((width, height)) for file in files]
    except ValueError as error:
        parser.error(f'--images: {error}')
    images = [torch.from_numpy(np.array(image).reshape(height, width, -1)).permute(2, 0, 1) for image in images]
    images = torch.stack([(image - mean) / std for image in images])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    title = (f'{Path(args.config).stem}, {Path(weights).name if weights else "random weights"}, '
             f'{len(files)} image{"s" * (len(files) > 1)} of {height}x{width}')
    return backbone.to(device), images.to(device), title


def save(figure, args, title):
    figure.suptitle(title, fontsize=9)
    figure.savefig(args.out, dpi=110)
    print(f'{title}: {args.out}')


# ---- commands ----

def scans(parser, args):
    for name in args.directions:
        try:
            check_scan(name)
        except ValueError as error:
            parser.error(str(error))
    if min(args.size) < 1:
        parser.error(f'--size needs two numbers >= 1, got {args.size}')
    image = np.asarray(Image.open(args.image).convert('RGB')) if args.image else None
    figure = (draw_scan_distances(args.directions, *args.size) if args.distances else
              draw_scan_orders(args.directions, *args.size, image=image))
    figure.savefig(args.out, dpi=120)
    print(f'scan {"distances" if args.distances else "orders"} of {", ".join(args.directions)} on '
          f'{args.size[0]}x{args.size[1]} tokens: {args.out}')


def directions(parser, args):
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    backbone = build_backbone(cfg)
    figure = draw_directions(backbone.directions, stages=getattr(backbone, 'depths', None))
    figure.suptitle(Path(args.config).stem, fontsize=9)
    figure.savefig(args.out, dpi=110)
    print(f'scan directions of {args.config}: {args.out}')


def return_maps(cfg):
    """Let a backbone return the maps of all stages; LocalVim, the residual stream after each quarter of its blocks."""
    if not cfg.type.endswith('LocalVim'):
        cfg.out_indices = (0, 1, 2, 3)
        return
    depth = resolve_arch(cfg.get('arch', 'tiny'), LOCAL_VIM, ('embed_dims', 'num_layers'))['num_layers']
    cfg.update(out_type='featmap', out_feature='residual', out_indices=[depth * i // 4 - 1 for i in (1, 2, 3, 4)])


def receptive_field(parser, args):
    backbone, images, title = load(parser, args, return_maps)
    plain = isinstance(backbone, LocalVim)
    fields = receptive_fields(backbone, images)
    strides = [backbone.stride if plain else backbone.patch_size * 2 ** stage for stage in backbone.out_indices]
    titles = [f'block {index}' if plain else f'stage {index + 1}, stride {stride}'
              for index, stride in zip(backbone.out_indices, strides)]
    save(draw_receptive_fields(fields, titles, strides), args, title)


def gates(parser, args):
    backbone, images, title = load(parser, args)
    save(draw_gates(scattn_gates(backbone, images)), args, title)


def attention(parser, args):
    args.count = 1
    backbone, images, title = load(parser, args)
    file, = find_images(parser, args.images, 1)
    height, width = args.size
    point = tuple(args.point or (height // 2, width // 2))
    try:
        readings = scan_readings(backbone, images, point, args.blocks)
    except ValueError as error:
        parser.error(str(error))
    shown = np.asarray(Image.open(file).convert('RGB').resize((width, height)))
    save(draw_readings(readings, shown, point), args, title)


# ---- arguments ----

def add_model_arguments(parser):
    parser.add_argument('config', help='configuration file of any task')
    parser.add_argument('checkpoint', nargs='?',
                        help="weights, ours or the authors' (default: the configuration's init_cfg, or random)")
    parser.add_argument('--images', nargs='+', required=True, metavar='PATH', help='image files, or folders of them')
    parser.add_argument('--count', type=int, default=8, metavar='N',
                        help='take at most N of the images, evenly spaced (default: 8)')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), default=(224, 224),
                        help='size that images are resized to (default: 224 224)')


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def command(name, function, text):
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument('--out', required=True, help='file to write; the ending chooses the format')
        added.set_defaults(run=function, parser=added)
        return added

    added = command('scans', scans, 'Draw the order in which scan directions read the tokens of an image.')
    added.add_argument('--directions', nargs='+', metavar='NAME', default=CANDIDATES,
                       help="scan names (default: the paper's 8 candidates)")
    added.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), default=(14, 14),
                       help='token grid (default: 14 14)')
    added.add_argument('--image', help='picture to draw on (default: none)')
    added.add_argument('--distances', action='store_true',
                       help='draw the distance of each token from one of them in steps, instead of the path')
    added = command('directions', directions, "Draw the scan directions of each block of a configuration's backbone.")
    added.add_argument('config', help='configuration file of any task')
    added.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE',
                       help='override settings, for example model.backbone.directions=directions.json')
    add_model_arguments(
        command('receptive-field', receptive_field, 'Draw the effective receptive fields of a backbone.'))
    add_model_arguments(command('gates', gates, 'Draw the factors by which SCAttn multiplies each direction.'))
    added = command('attention', attention, 'Draw which tokens one token has read in the scans, for the first image.')
    add_model_arguments(added)
    added.add_argument('--point', nargs=2, type=int, metavar=('ROW', 'COLUMN'),
                       help='pixel of the resized image whose token reads (default: the middle)')
    added.add_argument('--blocks', nargs='+', type=int, metavar='N',
                       help='numbers of blocks, from 0 (default: four at equal distances)')
    args = parser.parse_args(arguments)
    args.run(args.parser, args)


if __name__ == '__main__':
    main()
