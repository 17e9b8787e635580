"""Write detection and segmentation data of natural objects: photographed cut-outs pasted on photographs.

    python research/stamps.py /usr/share/tuxpaint/stamps data/stamps

SRC is the folder of stamps that Debian's package tuxpaint-stamps-default installs: some 200 photographs of birds, fish,
mammals, fruit, vegetables, flowers, tools and vehicles, cut out by hand. Their alpha channel gives exact masks. The
backgrounds are the photographs in scikit-image. The script writes

    coco/{train,val}/*.png                    128x128, several objects each
    coco/annotations/instances_{train,val}.json
    ade/images/{training,validation}/*.png    128x128
    ade/annotations/{training,validation}/*.png
    SOURCES.md                                credits, and the objects of each split

into OUT, in the formats of digits.py. COCO categories have the ids 1 to 8, masks are compressed RLE. Label images have
0 for ignored pixels (soft borders), 1 for the background and 2 to 9 for the classes. Train and validation share no
object and no photograph. The same seed gives the same bytes as long as the package and the libraries stay the same.

Licences: the stamps are GPL-2 (Tux Paint), digits.py names those of the photographs. The written data are GPL-2 too.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools' / 'dataset_converters'))
import digits

# Class: folders of the source.
CLASSES = dict(
    bird=['animals/birds'],
    fish=['animals/fish'],
    mammal=['animals/mammals', 'animals/marsupials'],
    fruit=['food/fruit'],
    vegetable=['food/vegetables'],
    flower=['plants/flowers'],
    tool=['household/tools', 'household/arttools'],
    vehicle=['vehicles'],
)
# Drawings, silhouettes, and objects that belong to another class or to none.
LEFT_OUT = {
    'animals/fish/lobster.png', 'animals/fish/shrimp.png', 'animals/mammals/aquatic/whale.png',
    'animals/mammals/echidna.png', 'animals/mammals/hedgehog.png', 'household/arttools/highlighter.png',
    'vehicles/7spoke256.png', 'vehicles/wheel_tractor.png', 'vehicles/emergency/sedan_police.png',
}
NO_PHOTOGRAPHS = {'cartoon', 'toys'}  # names of folders
VAL_OBJECTS = 0.25  # of each class
# The height is the longer side of an object.
STYLE = dict(count=(1, 4), height=(32, 72), photo_gain=1.)
SCALES = {
    'default': dict(coco=(800, 120), ade=(800, 120)),
    'tiny': dict(coco=(8, 4), ade=(8, 4)),
}
REMEDY = "Debian's package tuxpaint-stamps-default has them (/usr/share/tuxpaint/stamps)"


def find_stamps(source):
    """Return [(class, path relative to `source`)], sorted."""
    found = []
    for name, folders in CLASSES.items():
        paths = sorted(path.relative_to(source) for folder in folders for path in (source / folder).rglob('*.png'))
        paths = [path for path in paths if path.as_posix() not in LEFT_OUT and not NO_PHOTOGRAPHS & set(path.parts)
                 and not path.stem.endswith(('_mirror', '_flip'))]
        if len(paths) < 4:
            raise SystemExit(f'{source} has {len(paths)} stamps of the class {name} (in {", ".join(folders)}): it is '
                             f'not the folder of stamps, or it is incomplete. {REMEDY}')
        found += [(name, path) for path in paths]
    return found


def read_stamp(path):
    """Return an image as floats (H, W, 4) without its transparent border."""
    try:
        pixels = np.asarray(Image.open(path).convert('RGBA'), dtype=np.float64)
    except (OSError, SyntaxError) as error:
        raise SystemExit(f'{path} cannot be read ({error}): it is damaged. {REMEDY}') from error
    opaque = pixels[..., 3] > 0
    if not opaque.any():
        raise SystemExit(f'{path} is transparent everywhere: it is damaged. {REMEDY}')
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    return pixels[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def resized(stamp, longer):
    """Resize a stamp's longer side to `longer` pixels. Return opacity (h, w) from 0 to 1, and colours (h, w, 3)."""
    height, width = stamp.shape[:2]
    factor = longer / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    alpha = stamp[..., 3] / 255

    def scaled(channel):
        return np.asarray(Image.fromarray(channel.astype(np.float32)).resize(size, Image.LANCZOS), dtype=np.float64)

    # Weight colours by opacity, because the colours of transparent pixels must not bleed into the border.
    opacity = scaled(alpha)
    colours = np.stack([scaled(stamp[..., i] * alpha) for i in range(3)], -1) / np.maximum(opacity, 1e-3)[..., None]
    return opacity.clip(0, 1), colours.clip(0, 255)


def stamp_drawer(stamps):
    """Return a function that draws a stamp for `digits.compose`, mirrored at random."""

    def draw(row, height, style, rng):
        alpha, colours = resized(stamps[row], height)
        return (alpha[:, ::-1], colours[:, ::-1]) if rng.random() < 0.5 else (alpha, colours)

    return draw


def write_sources(out, found, rows_of, photos_of, seed):
    lines = [f'# Sources (seed {seed})', '', 'Stamps of Tux Paint, GPL-2. Changed: resized, mirrored.', '']
    lines += [f'- {found[row][1].as_posix()} ({split}): {found[row][0]}'
              for split in digits.SPLITS for row in rows_of[split]]
    lines += ['', 'Photographs, as shipped in scikit-image. Changed: cropped, resized.', '']
    lines += [f'- {name} ({split}): {digits.PHOTOS[name]}' for split in digits.SPLITS for name in photos_of[split]]
    (out / digits.MARKER).write_text('\n'.join(lines) + '\n', encoding='utf-8')


def write_all(source, out, scale, seed):
    found = find_stamps(source)
    names = list(CLASSES)
    labels = np.array([names.index(name) for name, _ in found])
    draw = stamp_drawer([read_stamp(source / path) for _, path in found])
    rows_of = digits.split_rows(labels, VAL_OBJECTS, seed)
    photos_of = digits.split_photos(seed)
    summary = [f'{len(found)} objects, of each class ' + ', '.join(
        f'{name} {number}' for name, number in zip(names, np.bincount(labels), strict=True))]
    for s, split in enumerate(digits.SPLITS):
        photos = digits.load_photos(photos_of[split])
        for kind, write in enumerate((digits.write_coco, digits.write_ade)):
            number = SCALES[scale]['coco' if write is digits.write_coco else 'ade'][s]
            items = digits.scenes(draw, rows_of[split], photos, number, STYLE,
                                  np.random.default_rng([seed, 2 + kind, s]))
            more = (names, 'objects', 'stamp_index') if write is digits.write_coco else ()
            summary.append(write(out, split, labels, items, *more))
    write_sources(out, found, rows_of, photos_of, seed)
    return summary


def generate(source, out, scale='default', seed=0, overwrite=False):
    """Write both data sets to `out`, completely or not at all."""
    source = Path(source)
    if not source.is_dir():
        raise SystemExit(f'{source} is not a folder. {REMEDY}')
    return digits.write_whole_folder(out, overwrite, lambda folder: write_all(source, folder, scale, seed))


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='folder of stamps')
    parser.add_argument('out', help='folder to write; must not exist')
    parser.add_argument('--scale', choices=SCALES, default='default')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--overwrite', action='store_true', help='replace a folder that this tool wrote before')
    args = parser.parse_args(args)
    digits.stop_as_ctrl_c()
    summary = generate(args.source, args.out, args.scale, args.seed, args.overwrite)
    print('\n'.join(summary))
    print(f'written to {args.out}')


if __name__ == '__main__':
    main()
