"""Write Fashion-MNIST, 70,000 grey images of clothes with 28x28 pixels, as one folder per class.

    python tools/dataset_converters/fashion_mnist.py /usr/share/datasets/fashion-mnist data/fashion_mnist

SRC holds the four files of the data set, compressed (.gz) or not. Debian's package dataset-fashion-mnist installs them
in /usr/share/datasets/fashion-mnist. Files from other sources work too, because the script compares their contents with
known checksums. It writes

    train/{tshirt-top,trouser,...}/*.png    60,000 images, or --per-class of each class
    val/{tshirt-top,trouser,...}/*.png      10,000 images

into OUT. The name of a file is its row in the source. --per-class takes the first rows of each class, so a smaller
selection is part of a larger one. Classes are in alphabetical order, as mmpretrain's CustomDataset sorts them.

Licence: MIT, Zalando SE. H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms", arXiv 1708.07747.
"""
import argparse
import gzip
import hashlib
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from digits import MARKER, SPLITS, stop_as_ctrl_c, write_whole_folder

# The classes in the order of the labels.
CLASSES = ('tshirt-top', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle-boot')
# Checksums of the uncompressed contents, because compressors write different .gz files.
SHA256 = {
    'train-images-idx3-ubyte': 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    'train-labels-idx1-ubyte': 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
    't10k-images-idx3-ubyte': '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    't10k-labels-idx1-ubyte': '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
}
REMEDY = "Debian's package dataset-fashion-mnist has it (/usr/share/datasets/fashion-mnist)"


def read_idx(folder, name):
    """Read an array of unsigned bytes from an idx file: two zeros, type (8), number and sizes of dimensions, data."""
    path = next((path for path in (folder / name, folder / f'{name}.gz') if path.is_file()), None)
    if path is None:
        raise SystemExit(f'{folder} has neither {name} nor {name}.gz. {REMEDY}')
    try:
        data = path.read_bytes()
        if path.suffix == '.gz':
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f'{path} cannot be read ({error}): it is damaged. {REMEDY}') from error
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise SystemExit(f'{path} is not that file of Fashion-MNIST (its checksum differs): it is damaged, or from '
                         f'another data set, such as MNIST, whose files have the same names. {REMEDY}')
    dimensions = data[3]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(
        struct.unpack_from(f'>{dimensions}I', data, 4))


def write_split(out, split, images, labels, per_class):
    """Write images (N, 28, 28) as PNG files and return a line with their number."""
    total = 0
    for label, name in enumerate(CLASSES):
        folder = out / split / name
        folder.mkdir(parents=True)
        rows = np.flatnonzero(labels == label)[:per_class]
        for row in rows:
            Image.fromarray(images[row]).save(folder / f'{row:05d}.png', compress_level=1)
        total += len(rows)
    return f'{split}: {total} images'


def write_all(folder, out, per_class):
    # Read all files first, so that a damaged one is reported before minutes of writing.
    arrays = {name: read_idx(folder, name) for name in SHA256}
    summary = []
    for split, source, number in zip(SPLITS, ('train', 't10k'), (per_class, None), strict=True):
        summary.append(write_split(out, split, arrays[f'{source}-images-idx3-ubyte'],
                                   arrays[f'{source}-labels-idx1-ubyte'], number))
    (out / MARKER).write_text('# Sources\n\nFashion-MNIST, Zalando SE, MIT licence, arXiv 1708.07747.\n')
    return summary


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder of the four idx files')
    parser.add_argument('out', help='folder to write; must not exist')
    parser.add_argument('--per-class', type=int, help='training images of each class (default: all 6000)')
    parser.add_argument('--overwrite', action='store_true', help='replace a folder that this script wrote')
    args = parser.parse_args(args)
    if args.per_class is not None and not 1 <= args.per_class <= 6000:
        parser.error(f'--per-class {args.per_class}: there are 6000 training images of each class; take 1 to 6000')
    if not args.source.is_dir():
        raise SystemExit(f'{args.source} is not a folder. {REMEDY}')
    stop_as_ctrl_c()
    summary = write_whole_folder(args.out, args.overwrite, lambda out: write_all(args.source, out, args.per_class))
    print('\n'.join(summary))
    print(f'written to {args.out}')


if __name__ == '__main__':
    main()
