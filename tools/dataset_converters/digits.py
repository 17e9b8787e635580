"""Write small classification, detection and segmentation data sets. Nothing is downloaded.

The images are real ones that scikit-learn and scikit-image contain.

    python tools/dataset_converters/digits.py data/digits
    python tools/dataset_converters/digits.py /tmp/smoke --scale tiny
    python tools/dataset_converters/digits.py data/digits --rotated

The script writes into OUT (ADE20K style calls train `training` and val `validation`):

    imagenet/{train,val}/{0..9}/*.png         32x32, one folder per class
    coco/{train,val}/*.png                    128x128, several digits each
    coco/annotations/instances_{train,val}.json
    ade/images/{training,validation}/*.png    128x128
    ade/annotations/{training,validation}/*.png
    dota/{train,val}/{images,annfiles}/       128x128, rotated digits; with --rotated
    SOURCES.md                                credits of the source images

COCO categories are called '0' to '9' and have the ids 1 to 10. Masks are compressed RLE, so `LoadAnnotations` needs its
default `poly2mask=True`. Label images follow ADE20K, for `reduce_zero_label=True`: 0 is ignored (the soft border of a
stroke), 1 is background, 2 to 11 are the digits 0 to 9. Label files of `dota` follow DOTA and have a line for each
digit: four corners of the smallest rectangle around its visible part, the class, and difficulty 0. File names of
`coco`, `ade` and `dota` end in the photograph's name. Those of `imagenet` are the row in scikit-learn's `load_digits`.

Train and validation share no digit and no photograph. They share writers, because the source does not name the writer
of a digit. The same seed gives the same bytes as long as the installed versions of the libraries stay the same.

Licences. Digits: "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, CC BY 4.0. Photographs: see PHOTOS. scikit-image documents each as CC0, as public domain, or as without
known copyright restrictions.
"""
import argparse
import itertools
import json
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits

# {file in skimage/data: terms, from scikit-image's documentation}. Drawings, images of writing and images without known
# terms are left out.
PHOTOS = {
    'astronaut.png': 'NASA, public domain',
    'brick.png': 'CC0',
    'camera.png': 'CC0, Lav Varshney',
    'chelsea.png': 'CC0, Stefan van der Walt',
    'coffee.png': 'CC0, Rachel Michetti, courtesy of Pikolo Espresso Bar',
    'coins.png': 'Brooklyn Museum, no known copyright restrictions',
    'grass.png': 'CC0',
    'gravel.png': 'CC0',
    'hubble_deep_field.jpg': 'NASA, public domain',
    'ihc.png': 'CMMI, no known copyright restrictions',
    'retina.jpg': 'CC0, Mikael Häggström',
    'rocket.jpg': 'SpaceX, public domain',
}
VAL_PHOTOS = 4
VAL_DIGITS = 0.2  # of each class

# (train, val): images per class for imagenet (None: all), images for the rest
SCALES = {
    'default': dict(imagenet=(None, None), coco=(400, 60), ade=(400, 60), dota=(400, 60)),
    'tiny': dict(imagenet=(8, 4), coco=(8, 4), ade=(8, 4), dota=(8, 4)),
}
SPLITS = ('train', 'val')

IMAGE_SIZE = 128
# Digits per image and their height in pixels, both ends included. `outline` is the ink level (0 to 1) at which the
# outline of a stroke is drawn; a lower level gives fatter strokes.
COCO_STYLE = dict(count=(2, 6), height=(20, 56), outline=0.45)
ADE_STYLE = dict(count=(3, 6), height=(28, 56), outline=0.4)
# Digits are brighter than any background. If some digits are dark, a small segmentation network that is trained from
# scratch for a few minutes learns to separate digits from background, but hardly one digit from another.
PHOTO_GAIN = 0.55
INK = (180, 255)  # range of each colour channel
MAX_TILT = 15  # degrees
# This rotation is large enough that boxes along the axes fit badly, and small enough that a 6 is not a 9.
DOTA_STYLE = dict(COCO_STYLE, tilt=75)
MAX_OVERLAP = 0.05  # share of the smaller of two boxes
PLACE_TRIES = 50

BORDER = 2  # empty cells around the 8x8 digit: room to rotate, and a margin
MARKER = 'SOURCES.md'  # the last file written; it marks folders of this script


def split_rows(labels, val_share, seed=0):
    """Return the indices of the train and of the val objects, stratified by label."""
    rng = np.random.default_rng([seed, 0])
    parts = dict(train=[], val=[])
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cut = round(len(rows) * val_share)
        parts['val'].append(rows[:cut])
        parts['train'].append(rows[cut:])
    return {name: np.sort(np.concatenate(p)) for name, p in parts.items()}


def split_photos(seed=0):
    """Return the file names of the train and of the val photographs."""
    names = np.random.default_rng([seed, 1]).permutation(sorted(PHOTOS))
    return dict(train=sorted(map(str, names[VAL_PHOTOS:])),
                val=sorted(map(str, names[:VAL_PHOTOS])))


def load_photos(names):
    """Read photographs from the installed scikit-image as RGB images."""
    spec = find_spec('skimage')
    if spec is None:
        raise SystemExit('scikit-image is not installed: '
                         'pip install scikit-image')
    folder = Path(spec.origin).parent / 'data'
    photos = {}
    for name in names:
        # skimage.data would try to download a missing file.
        if not (folder / name).is_file():
            raise SystemExit(f'{name} is not in {folder}: this release of '
                             'scikit-image lacks it, install another one')
        photos[name] = Image.open(folder / name).convert('RGB')
    return photos


def draw_digit(digit, height, outline, angle=0.0):
    """Draw an 8x8 digit (ink 0 to 16) as smooth strokes.

    Returns the opacity (0 to 1) on a square whose side is 1.5 times `height`;
    the digit is `height` pixels high and in the middle.
    """
    ink = Image.fromarray(np.pad(digit / 16, BORDER).astype(np.float32))
    side = round(height * (1 + 2 * BORDER / 8))
    ink = ink.resize((side, side), Image.BICUBIC)
    ink = ink.rotate(angle, Image.BICUBIC)
    # Ink grows from 0 to 1 within about 1.5 cells. It fades over about 2 pixels here.
    sharpness = 1.5 * height / 8 / 2
    return np.clip((np.asarray(ink) - outline) * sharpness + 0.5, 0, 1)


def crop_to_content(alpha):
    """Cut away the empty rows and columns around a digit."""
    rows, cols = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return alpha[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]


def crop_photo(photo, rng, gain=PHOTO_GAIN):
    """Return a random square of a photograph, darkened, as a float array (H, W, 3)."""
    side = int(rng.integers(IMAGE_SIZE, min(photo.size) + 1))
    x, y = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    crop = photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.LANCZOS,
                        box=(x, y, x + side, y + side))
    crop = np.asarray(crop, dtype=np.float64) * gain
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def overlaps(box, others):
    """Return True if a box (x, y, w, h) covers too much of another box."""
    x, y, w, h = box
    for ox, oy, ow, oh in others:
        inter_w = min(x + w, ox + ow) - max(x, ox)
        inter_h = min(y + h, oy + oh) - max(y, oy)
        if (inter_w > 0 and inter_h > 0
                and inter_w * inter_h > MAX_OVERLAP * min(w * h, ow * oh)):
            return True
    return False


def find_place(shape, boxes, rng):
    """Return a random box (x, y, w, h) for a digit, or None if there is no room."""
    h, w = shape
    if max(shape) > IMAGE_SIZE:
        return None
    for _ in range(PLACE_TRIES):
        x = int(rng.integers(0, IMAGE_SIZE - w + 1))
        y = int(rng.integers(0, IMAGE_SIZE - h + 1))
        if not overlaps((x, y, w, h), boxes):
            return x, y, w, h
    return None


def digit_drawer(digits):
    """Return a function that draws a digit for `compose`."""

    def draw(row, height, style, rng):
        alpha = draw_digit(digits[row], height, style['outline'],
                           rng.uniform(-1, 1) * style.get('tilt', MAX_TILT))
        return crop_to_content(alpha), None

    return draw


def compose(photo, draw, rows, style, rng):
    """Paste digits, or other objects, on a photograph's crop.

    Args:
        photo (Image): The background is cut from this photograph.
        draw (function): (row, height, style, rng) -> opacity (h, w), and the
            object's pixels (h, w, 3), or None for one random bright colour.
        rows (iterator): Yields the next object.
        style (dict): See COCO_STYLE and ADE_STYLE.

    Returns:
        The image (uint8), and one (row, opacity of the image's size) for each
        object in the order of pasting: the last one is on top.
    """
    image = crop_photo(photo, rng, style.get('photo_gain', PHOTO_GAIN))
    count = rng.integers(*style['count'], endpoint=True)
    heights = np.exp(rng.uniform(*np.log(style['height']), count))
    boxes, pasted = [], []
    for height in sorted(heights, reverse=True):  # large objects first, because they need more room
        row = next(rows)
        alpha, pixels = draw(row, height, style, rng)
        box = find_place(alpha.shape, boxes, rng)
        if box is None:
            continue
        x, y, w, h = box
        if pixels is None:
            pixels = rng.uniform(*INK, 3)
        part = image[y:y + h, x:x + w]
        part += alpha[..., None] * (pixels - part)
        full = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
        full[y:y + h, x:x + w] = alpha
        boxes.append(box)
        pasted.append((row, full))
    return image.round().astype(np.uint8), pasted


def scenes(draw, rows, photos, number, style, rng):
    """Yield `number` composed images as (file name, image, pasted objects).

    Photographs take turns. Each object is used once before any is used again.
    """
    shuffled = itertools.chain.from_iterable(
        rng.permutation(rows) for _ in itertools.count())
    names = itertools.islice(itertools.cycle(sorted(photos)), number)
    for i, name in enumerate(names):
        image, pasted = compose(photos[name], draw, shuffled, style, rng)
        yield f'{i:04d}_{Path(name).stem}.png', image, pasted


def write_imagenet(out, split, digits, labels, rows, number):
    """Write each digit white on black in the folder of its class."""
    total = 0
    for label in range(10):
        folder = out / 'imagenet' / split / str(label)
        folder.mkdir(parents=True)
        for row in rows[labels[rows] == label][:number]:
            # A digit of 64/3 pixels and its border make 32 pixels.
            alpha = draw_digit(digits[row], 64 / 3, outline=0.5)
            image = (alpha * 255).round().astype(np.uint8)
            Image.fromarray(image).convert('RGB').save(
                folder / f'{row:04d}.png')
            total += 1
    return f'imagenet/{split}: {total} images'


def visible_parts(pasted):
    """Yield (row, mask of the object's visible part) of a composed image, the uppermost object first."""
    hidden = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for row, alpha in reversed(pasted):
        visible = (alpha >= 0.5) & ~hidden
        hidden |= visible
        yield row, visible


def write_coco(out, split, labels, items, names, what, source_key):
    """Write images, and instances_{split}.json with boxes and masks.

    Args:
        labels (list): Class of each object, an index into `names`.
        what (str): Plural name of the objects.
        source_key (str): Annotation field for the object's row.
    """
    folder = out / 'coco' / split
    folder.mkdir(parents=True)
    images, annotations = [], []
    for image_id, (name, image, pasted) in enumerate(items, start=1):
        Image.fromarray(image).save(folder / name)
        images.append(dict(id=image_id, file_name=name, width=IMAGE_SIZE,
                           height=IMAGE_SIZE))
        for row, visible in visible_parts(pasted):
            rle = coco_mask.encode(np.asfortranarray(visible, np.uint8))
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image_id,
                category_id=int(labels[row]) + 1,
                bbox=coco_mask.toBbox(rle).tolist(),
                area=int(coco_mask.area(rle)), iscrowd=0,
                segmentation=dict(size=rle['size'],
                                  counts=rle['counts'].decode('ascii')),
                **{source_key: int(row)}))
    folder = out / 'coco' / 'annotations'
    folder.mkdir(exist_ok=True)
    (folder / f'instances_{split}.json').write_text(json.dumps(dict(
        info=dict(description=f'{what} on photographs'.capitalize()),
        licenses=[], images=images, annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(names)])))
    return f'coco/{split}: {len(images)} images, {len(annotations)} {what}'


def write_ade(out, split, labels, items):
    """Write images and their label images."""
    split = dict(train='training', val='validation')[split]
    folders = [out / 'ade' / kind / split for kind in ('images', 'annotations')]
    for folder in folders:
        folder.mkdir(parents=True)
    total = 0
    for name, image, pasted in items:
        label_map = np.ones((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        for row, alpha in pasted:
            label_map[alpha > 0] = 0
            label_map[alpha >= 0.75] = labels[row] + 2
        Image.fromarray(image).save(folders[0] / name)
        Image.fromarray(label_map).save(folders[1] / name)
        total += 1
    return f'ade/{split}: {total} images'


def write_dota(out, split, labels, items):
    """Write images, and a text file with oriented boxes for each."""
    folders = [out / 'dota' / split / kind for kind in ('images', 'annfiles')]
    for folder in folders:
        folder.mkdir(parents=True)
    images = boxes = 0
    for name, image, pasted in items:
        Image.fromarray(image).save(folders[0] / name)
        lines = []
        for row, visible in visible_parts(pasted):
            points = np.argwhere(visible)[:, ::-1].astype(np.float32)
            # The rectangle encloses the outer edges of the pixels, as boxes of masks do.
            corners = (points[:, None] + np.float32([[0, 0], [0, 1], [1, 0], [1, 1]])).reshape(-1, 2)
            corners = cv2.boxPoints(cv2.minAreaRect(corners))
            lines.append(' '.join([*(f'{x:.2f}' for x in corners.ravel()), str(labels[row]), '0']))
        (folders[1] / name).with_suffix('.txt').write_text('\n'.join(lines) + '\n')
        images, boxes = images + 1, boxes + len(lines)
    return f'dota/{split}: {images} images, {boxes} rotated digits'


def write_sources(out, photos, seed):
    """Write the credits that the licences require, and the photographs of each split."""
    lines = [
        f'# Sources (seed {seed})', '',
        'Digits: Optical Recognition of Handwritten Digits, E. Alpaydin and '
        'C. Kaynak, UCI Machine Learning Repository, CC BY 4.0, as shipped in '
        'scikit-learn. Changed: enlarged, rotated, coloured.', '',
        'Photographs, as shipped in scikit-image. Changed: cropped, resized, '
        'darkened.',
        '']
    lines += [f'- {name} ({split}): {PHOTOS[name]}'
              for split in SPLITS for name in photos[split]]
    (out / MARKER).write_text('\n'.join(lines) + '\n', encoding='utf-8')


def write_all(out, scale, seed, rotated=False):
    """Write the data sets into the folder `out` and return a summary."""
    source = load_digits()
    digits, labels = source.images, source.target
    rows_of = split_rows(labels, VAL_DIGITS, seed)
    names_of = split_photos(seed)
    sizes, summary, draw = SCALES[scale], [], digit_drawer(digits)
    for s, split in enumerate(SPLITS):
        rows, photos = rows_of[split], load_photos(names_of[split])
        summary.append(write_imagenet(out, split, digits, labels, rows,
                                      sizes['imagenet'][s]))
        summary.append(write_coco(out, split, labels, scenes(
            draw, rows, photos, sizes['coco'][s], COCO_STYLE,
            np.random.default_rng([seed, 2, s])), list('0123456789'),
            'handwritten digits', 'digit_index'))
        summary.append(write_ade(out, split, labels, scenes(
            draw, rows, photos, sizes['ade'][s], ADE_STYLE,
            np.random.default_rng([seed, 3, s]))))
        if rotated:
            summary.append(write_dota(out, split, labels, scenes(
                draw, rows, photos, sizes['dota'][s], DOTA_STYLE,
                np.random.default_rng([seed, 4, s]))))
    write_sources(out, names_of, seed)
    return summary


def check_target(out, overwrite):
    """Raise SystemExit if `out` exists, unless this script wrote it and may replace it."""
    if not out.exists():
        return
    if not overwrite:
        raise SystemExit(f'{out} exists: choose another folder, or pass '
                         '--overwrite to replace it')
    if not (out / MARKER).is_file():
        raise SystemExit(f'{out} was not written by this tool (it has no '
                         f'{MARKER}): remove it yourself')


def write_whole_folder(out, overwrite, write):
    """Write the folder `out` by `write(folder)`, completely or not at all. `write` must leave MARKER in the folder."""
    out = Path(out).resolve()
    check_target(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    # These folders are siblings of `out`, so that renaming stays on one file system.
    partial = out.with_name(f'.{out.name}.partial-{os.getpid()}')
    replaced = out.with_name(f'.{out.name}.replaced-{os.getpid()}')
    partial.mkdir()
    try:
        summary = write(partial)
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return summary


def generate(out, scale='default', seed=0, overwrite=False, rotated=False):
    """Write all data sets to `out`, completely or not at all."""
    return write_whole_folder(
        out, overwrite, lambda folder: write_all(folder, scale, seed, rotated))


def stop_as_ctrl_c():
    """Clean up after SIGTERM as after Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped'))


def main(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('out', help='folder to write; must not exist')
    parser.add_argument('--scale', choices=SCALES, default='default')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--overwrite', action='store_true',
                        help='replace a folder that this script wrote')
    parser.add_argument('--rotated', action='store_true',
                        help='also write rotated digits with oriented boxes, for mmrotate')
    args = parser.parse_args(args)
    stop_as_ctrl_c()
    summary = generate(args.out, args.scale, args.seed, args.overwrite, args.rotated)
    print('\n'.join(summary))
    print(f'written to {args.out}')


if __name__ == '__main__':
    main()
