"""Convert colour masks, 0/255 masks and other label pictures into PNGs of one channel with the labels 0 to N - 1.

    python tools/dataset_converters/label_images.py data/masks data/labels --colors data/labelmap.txt
    python tools/dataset_converters/label_images.py data/masks data/labels --values 0,255

--colors names a file with a class on each line: `name:R,G,B`, as CVAT's labelmap.txt, or `R G B name`. The label is the
number of the line, from 0. --values lists the values of pictures of one channel, such as 0,255 or 1-150, in the order
of the labels. A colour or value that is not listed is an error, or ignored (255) with --others ignore. Palette PNGs
whose indices are 0 to N - 1 need no conversion.

OUT has the folders of SOURCE and a SOURCES.md, and is written whole or not at all.
"""
import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from annotation_formats.files import is_picture, read_text, walk
from digits import MARKER, stop_as_ctrl_c, write_whole_folder

IGNORED = 255


def read_colors(path):
    """Return (names, values R * 65536 + G * 256 + B) of a file."""
    names, values = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith('#'):
            continue
        match = re.match(r'(?P<name>[^:]+):(?P<r>\d+),(?P<g>\d+),(?P<b>\d+)(:|$)', line.strip()) or re.match(
            r'(?P<r>\d+)[ ,\t]+(?P<g>\d+)[ ,\t]+(?P<b>\d+)[ ,\t]+(?P<name>.+)$', line.strip())
        red, green, blue = (int(match[part]) for part in 'rgb') if match else (-1, -1, -1)
        if not 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
            raise SystemExit(f'{path}:{number}: {line!r} is neither name:R,G,B nor R G B name')
        names.append(match['name'].strip())
        values.append(red << 16 | green << 8 | blue)
    return names, values


def parse_values(text):
    """Return the numbers of a list such as 0,255 or 1-150."""
    values = []
    for part in text.split(','):
        match = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', part)
        if not match:
            raise SystemExit(f'--values {text}: {part!r} is neither a number nor a range such as 1-150')
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    return values


def pixels(path, colors):
    """Return the values of a label picture (H, W), of colours as R * 65536 + G * 256 + B.

    Raises:
        SystemExit: it cannot be read, or has channels that are not equal where values are asked for.
    """
    try:
        with Image.open(path) as image:
            if colors:
                red, green, blue = np.moveaxis(np.asarray(image.convert('RGB'), np.int64), 2, 0)
                return red << 16 | green << 8 | blue
            array = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise SystemExit(f'{path} cannot be read ({error})') from error
    if array.ndim == 3:  # grey in several channels; the last of two or four is opacity
        array = array[..., :3] if array.shape[2] > 2 else array[..., :1]
        if (array != array[..., :1]).any():
            raise SystemExit(f'{path} has colours: name their classes by --colors')
        array = array[..., 0]
    return array.astype(np.int64)


def convert(source, out, values, colors, ignore):
    """Write the labels of all pictures and return lines about them."""
    order = np.argsort(values)
    known = np.array(values)[order]
    counts, others, files = Counter(), Counter(), walk(source)
    for path in filter(is_picture, files):
        array = pixels(path, colors)
        place = np.searchsorted(known, array).clip(max=len(known) - 1)
        found = known[place] == array
        if not found.all():
            unknown, number = np.unique(array[~found], return_counts=True)
            named = ', '.join(f'{named_value(value, colors)}: {count}' for value, count in zip(unknown[:5], number))
            if not ignore:
                more = ', ...' * (len(unknown) > 5)
                raise SystemExit(f'{path} has pixels of values that are not listed ({named}{more}): list them, or '
                                 '--others ignore gives them 255, which is ignored')
            others.update({int(value): int(count) for value, count in zip(unknown, number)})
        labels = np.where(found, order[place], IGNORED).astype(np.uint8)
        counts.update(dict(enumerate(np.bincount(labels[found], minlength=len(values)).tolist())))
        target = (out / path.relative_to(source)).with_suffix('.png')
        if target.exists():
            raise SystemExit(f'{path}: another picture of this folder has the same name without its ending')
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(target)
    total = sum(map(is_picture, files))
    if not total:
        raise SystemExit(f'{source} has no pictures')
    (out / MARKER).write_text(f'label_images.py made these labels from {source}.\n', encoding='utf-8')
    lines = [f'{total} pictures; {len(files) - total} other files were left out']
    if others:
        named = (f'{named_value(value, colors)}: {number} pixels' for value, number in others.most_common(8))
        lines.append(f'ignored (255): {", ".join(named)}{", ..." * (len(others) > 8)}')
    return lines, counts


def named_value(value, colors):
    value = int(value)
    return str((value >> 16, value >> 8 & 255, value & 255)) if colors else str(value)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder of label pictures')
    parser.add_argument('out', type=Path, help='folder to write')
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument('--colors', type=Path, metavar='FILE', help='classes with their colours')
    kind.add_argument('--values', help='values of one channel, in the order of the labels: 0,255 or 1-150')
    parser.add_argument('--others', choices=['stop', 'ignore'], default='stop',
                        help='what to do with values that are not listed (default: stop)')
    parser.add_argument('--overwrite', action='store_true', help='replace a folder that this script wrote')
    args = parser.parse_args(args)
    if not args.source.is_dir():
        raise SystemExit(f'{args.source} is not a folder')
    if args.colors:
        names, values = read_colors(args.colors)
    else:
        values = parse_values(args.values)
        names = list(map(str, values))
    if not 1 <= len(values) <= IGNORED or len(set(values)) < len(values):
        raise SystemExit(f'there are {len(values)} values, {len(set(values))} of them different: a PNG of labels has 1 '
                         'to 255, each once')
    stop_as_ctrl_c()
    lines, counts = write_whole_folder(args.out, args.overwrite, lambda folder: convert(
        args.source, folder, values, bool(args.colors), args.others == 'ignore'))
    print('\n'.join(lines))
    for label, name in enumerate(names):
        print(f'{label:3} {name}: {counts[label]} pixels')
    print(f'written to {args.out}')


if __name__ == '__main__':
    main()
