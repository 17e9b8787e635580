"""What the pictures of a backbone share: the backbone of a configuration, and images as it is trained on."""
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')


def add_arguments(parser):
    parser.add_argument('config', help='configuration file of any task')
    parser.add_argument('checkpoint', nargs='?',
                        help="weights, ours or the authors' (default: the configuration's `pretrained`, or random)")
    parser.add_argument('--images', nargs='+', required=True, metavar='PATH', help='image files, or folders of them')
    parser.add_argument('--count', type=int, default=8, metavar='N',
                        help='take at most N of the images, evenly spaced (default: 8)')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), default=(224, 224),
                        help='size that images are resized to (default: 224 224)')
    parser.add_argument('--out', required=True, help='file to write; the ending chooses the format')


def find_images(parser, paths, count):
    """At most ``count`` files, evenly spaced."""
    files = []
    for path in map(Path, paths):
        found = sorted(path.rglob('*')) if path.is_dir() else [path]
        files += [file for file in found if file.suffix.lower() in ENDINGS and file.is_file()]
    if not files:
        parser.error(f'--images: no image ({", ".join(ENDINGS)}) in {", ".join(map(str, paths))}')
    if count < 1:
        parser.error(f'--count must be at least 1, got {count}')
    return [files[index * len(files) // min(count, len(files))] for index in range(min(count, len(files)))]


def load(parser, args, adapt=None):
    """(backbone, images (B, 3, H, W), what to write above the picture)

    Args:
        parser: reports what is wrong with the arguments.
        args: those of :func:`add_arguments`.
        adapt: changes the backbone's configuration in place.
    """
    cfg = Config.fromfile(args.config)
    files = find_images(parser, args.images, args.count)
    weights = args.checkpoint or (cfg.model.backbone.pop('init_cfg', None) or {}).get('checkpoint')
    if adapt is not None:
        adapt(cfg.model.backbone)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(cfg.model.backbone)
    if weights:
        backbone.load_pretrained(weights)
    backbone.requires_grad_(False)

    normalise = cfg.model.get('data_preprocessor') or cfg.data_preprocessor
    mean, std = (torch.tensor(normalise[key]).view(3, 1, 1) for key in ('mean', 'std'))
    height, width = args.size
    images = [np.asarray(Image.open(file).convert('RGB').resize((width, height))).copy() for file in files]
    images = torch.stack([(torch.from_numpy(image).permute(2, 0, 1) - mean) / std for image in images])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    title = (f'{Path(args.config).stem}, {Path(weights).name if weights else "random weights"}, '
             f'{len(files)} image{"s" * (len(files) > 1)} of {height}x{width}')
    return backbone.to(device), images.to(device), title


def save(figure, args, title):
    figure.suptitle(title, fontsize=9)
    figure.savefig(args.out, dpi=110)
    print(f'{title}: {args.out}')
