"""Convert YOLO, Pascal VOC, LabelMe and COCO annotations into a COCO file that MMDetection reads as it was meant.

    python tools/dataset_converters/to_coco.py data/animals/data.yaml data/animals/coco
    python tools/dataset_converters/to_coco.py data/animals/labelme data/animals/train.json --images data/animals/photos
    python tools/dataset_converters/to_coco.py data/animals/voc data/animals/train.json --hold-out 0.2

SOURCE is a folder, a data.yaml or an annotation file. OUT is a JSON file, or a folder for a file of each split. The
format is found by looking at the files, or named by --format:

    yolo     boxes and polygons; data.yaml or classes.txt; labels beside the pictures or in labels/
    voc      a folder of XML files
    labelme  polygons, rectangles, circles and masks
    coco     files of CVAT, Label Studio, Roboflow and others, which are repaired: ids from 0, ids that are text, a root
             category, missing fields, polygons in other forms, pictures that EXIF turns

With --hold-out 0.2, a fifth of the pictures, drawn at random but always the same, goes to a second file for the
validation: train_val.json beside train.json.

Ids begin with 1. Boxes and polygons are cut at the border of the picture. Pictures without objects are kept. Everything
that is changed or left out is counted and printed with examples; with --strict nothing is written if an object or a
picture is left out. Where a file may mean two things, such as boxes that look like x1, y1, x2, y2, nothing is written
before an option says which. Files are written whole or not at all.
"""
import argparse
import json
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from annotation_formats import READERS, formats_of
from annotation_formats.files import Log, clean_name, frame_size, is_below, key, names_in

from mmlocalmamba.files import write_whole

# Rounding in the source may put a box this many pixels outside of its picture, which nobody needs to know.
ROUNDING = 0.05
# MMDetection skips narrower and lower boxes.
SMALLEST = 1


# ---- where objects are ----

def point_mapping(picture, args, log):
    """Return (size of the frame, function of x and y from the frame to the loaded picture, orientation to apply).

    The frame is the picture on which the objects were drawn. None if the sizes contradict each other.
    """
    shown, stored, declared = picture.shown, picture.stored, picture.declared
    turned = picture.orientation
    frame = frame_size(picture, args)
    if args.exif is None and turned > 1:
        if turned > 4 and declared == stored != shown:
            frame = stored
        elif declared is None or turned < 5 or stored[0] == stored[1]:
            log.note('pictures that EXIF turns; their objects are taken as drawn on the turned picture (--exif stored '
                     'if they were drawn on the pixels as stored)', picture.path)
    if frame == shown and args.exif != 'stored':
        turned = 1
    if turned > 1:
        log.changed('pictures that EXIF turns; their objects are turned with them', picture.path)
    scale = (1, 1)
    if declared is None:
        if picture.entry:
            log.changed('sizes of pictures that were missing', picture.path)
    elif declared not in (frame, shown):
        if declared == frame[::-1]:
            log.changed('widths and heights that were swapped', picture.path)
        elif args.resized == 'scale':
            scale = (frame[0] / declared[0], frame[1] / declared[1])
            log.changed('pictures of another size than in the annotations; their objects are scaled', picture.path)
        elif args.resized == 'keep':
            log.changed('sizes of pictures that were wrong', picture.path)
        else:
            log.left_out('pictures of another size than in the annotations (--resized scale scales the objects, '
                         '--resized keep only corrects the size)', f'{picture.path} is {frame[0]}x{frame[1]}, the '
                         f'annotations say {declared[0]}x{declared[1]}')
            return None
    width, height = frame
    turn = {1: lambda x, y: (x, y), 2: lambda x, y: (width - x, y), 3: lambda x, y: (width - x, height - y),
            4: lambda x, y: (x, height - y), 5: lambda x, y: (y, x), 6: lambda x, y: (height - y, x),
            7: lambda x, y: (height - y, width - x), 8: lambda x, y: (y, width - x)}[turned]
    return frame, scale, turned, lambda x, y: turn(x * scale[0], y * scale[1])


def turn_mask(mask, orientation):
    """Return a mask (H, W) as the picture is shown after EXIF's rotation."""
    return {1: lambda: mask, 2: lambda: mask[:, ::-1], 3: lambda: mask[::-1, ::-1], 4: lambda: mask[::-1],
            5: lambda: mask.T, 6: lambda: np.rot90(mask, -1), 7: lambda: mask[::-1, ::-1].T,
            8: lambda: np.rot90(mask)}[orientation]()


def rle_api():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise SystemExit('masks as RLE need pycocotools: pip install pycocotools') from error
    return mask


def encoded(rle):
    """Return a run-length encoding in pycocotools' form.

    Raises:
        ValueError: it is none.
    """
    try:
        height, width = (int(side) for side in rle['size'])
        counts = rle['counts']
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts) < 0:
                raise ValueError(f'its runs have {sum(counts)} pixels, its size {height * width}')
            return rle_api().frPyObjects(dict(size=[height, width], counts=counts), height, width)
        return dict(size=[height, width], counts=counts.encode() if isinstance(counts, str) else counts)
    except (KeyError, TypeError) as error:
        raise ValueError(f'an RLE has a size and counts ({error})') from error


def flat_polygons(segmentation):
    """Yield (polygon as a flat list, True if its form was another) of a segmentation, which is a list."""
    rows = segmentation
    if rows and all(isinstance(value, (int, float)) for value in rows):
        rows, bare = [rows], True  # one polygon, not in a list
    elif rows and all(isinstance(row, (list, tuple)) and len(row) == 2 and all(
            isinstance(value, (int, float)) for value in row) for row in rows):
        rows, bare = [rows], True  # one polygon of pairs
    else:
        bare = False
    for row in rows:
        if isinstance(row, (list, tuple)) and row and all(isinstance(pair, (list, tuple)) and len(pair) == 2
                                                          for pair in row):
            yield [value for pair in row for value in pair], True
        else:
            yield row, bare


def area_of(points):
    """Return the area of a polygon, x1, y1, x2, y2, ..."""
    x, y = points[::2], points[1::2]
    return abs(sum(x[index - 1] * y[index] - x[index] * y[index - 1] for index in range(len(x)))) / 2


def cut(points, width, height):
    """Cut a polygon at the borders of a picture (Sutherland and Hodgman)."""
    polygon = list(zip(points[::2], points[1::2]))
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        result = []
        for start, end in zip(polygon[-1:] + polygon[:-1], polygon):
            inside, was_inside = sign * (end[axis] - limit) >= 0, sign * (start[axis] - limit) >= 0
            if inside != was_inside:
                part = (limit - start[axis]) / (end[axis] - start[axis])
                crossing = [start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])]
                crossing[axis] = limit
                result.append(tuple(crossing))
            if inside:
                result.append(end)
        polygon = result
    return [value for pair in polygon for value in pair]


# ---- one object, one picture ----

class Converter:
    """Bring the objects of a picture to the loaded picture, and cut, complete and check them."""

    def __init__(self, args, log):
        self.args, self.log = args, log

    def convert(self, picture):
        """Return annotations without ids, or None if the picture is left out."""
        mapping = point_mapping(picture, self.args, self.log)
        if mapping is None:
            return None
        rows, seen = [], set()
        for thing in picture.things:
            row = self.annotation(thing, picture, *mapping)
            if row is None:
                continue
            identity = json.dumps([row[name] for name in ('name', 'bbox', 'iscrowd')] + [row.get('segmentation')])
            if identity in seen:
                self.log.left_out('objects that were there twice', thing.where)
                continue
            seen.add(identity)
            rows.append(row)
        return rows

    def annotation(self, thing, picture, frame, scale, turned, move):
        """Return the annotation of an object, or None, logged, if there is none."""
        moved = turned > 1 or scale != (1, 1)
        segmentation, mask_area, bounds = self.segmentation(thing, picture, frame, scale, turned, move, moved)
        box = self.box(thing, bounds, move, moved)
        if box is None:
            return None
        row = {name: value for name, value in thing.entry.items() if name not in (
            'image_id', 'category_id', 'bbox', 'segmentation', 'area', 'iscrowd')}
        if moved and any('keypoint' in name for name in row):
            row = {name: value for name, value in row.items() if 'keypoint' not in name}
            self.log.left_out('sets of keypoints on pictures that EXIF turns or that were resized', thing.where)
        width, height = picture.shown
        left, top, right, bottom = (float(value) for value in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
        corners = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if box[2] <= 0 or box[3] <= 0:
            return self.log.left_out('boxes without an area', f'{thing.where}: {box}')
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            return self.log.left_out('boxes outside of their picture',
                                     f'{thing.where}: {_short(box)}, the picture is {width}x{height}')
        if max(abs(one - two) for one, two in zip(corners, (left, top, right, bottom))) > ROUNDING:
            self.log.changed('boxes cut at the border of the picture', f'{thing.where}: {_short(box)}, the picture is '
                                                                       f'{width}x{height}')
        if corners != (left, top, right, bottom):
            box = _short([corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]])
        if min(box[2:]) < SMALLEST:
            return self.log.left_out('boxes that are narrower than a pixel, which MMDetection skips',
                                     f'{thing.where}: {box}')
        row.update(name=thing.name, bbox=box, iscrowd=self.crowd(thing))
        row['area'] = self.area(thing, moved, mask_area, box)
        if segmentation:
            row['segmentation'] = segmentation
        return row

    def crowd(self, thing):
        value = thing.entry.get('iscrowd', None)
        if value in (0, 1) and not isinstance(value, bool):
            return value
        if value is None and 'id' not in thing.entry:
            return 0  # the format has no crowds
        number = int(value in (True, '1', 'true'))
        self.log.changed('iscrowd that was missing or no number', f'{thing.where}: {value!r} -> {number}')
        return number

    def area(self, thing, moved, mask_area, box):
        given = thing.entry.get('area')
        good = isinstance(given, (int, float)) and not isinstance(given, bool) and given > 0 and math.isfinite(given)
        if good and not moved:
            return given
        if not good and 'id' in thing.entry:
            self.log.changed('areas that were missing or 0', f'{thing.where}: {given!r}')
        return round(mask_area or box[2] * box[3], 3)

    def box(self, thing, bounds, move, moved):
        """Return x, y, width, height on the loaded picture, or None, logged."""
        box = thing.box
        if box is None or isinstance(box, list) and not box:
            if bounds is None:
                return self.log.left_out('objects without a box or a usable segmentation', thing.where)
            if 'id' in thing.entry:
                self.log.changed('boxes that were missing, from the segmentation', thing.where)
            return bounds
        try:
            values = [float(value) for value in box]
            if len(values) != 4 or not all(map(math.isfinite, values)):
                raise ValueError
        except (TypeError, ValueError):
            return self.log.left_out('boxes that are not four numbers', f'{thing.where}: {box!r}')
        if moved:
            (x, y), (other_x, other_y) = move(*values[:2]), move(values[0] + values[2], values[1] + values[3])
            if min(values[2:]) > 0:
                values = [min(x, other_x), min(y, other_y), abs(other_x - x), abs(other_y - y)]
        if not moved and all(isinstance(value, (int, float)) for value in box) and 'id' in thing.entry:
            return box  # as in the source, to the last digit
        return _short(values)

    def segmentation(self, thing, picture, frame, scale, turned, move, moved):
        """Return (segmentation or None, its area or None, its box or None) on the loaded picture."""
        source = thing.segmentation
        if not source:
            return None, None, None
        if isinstance(source, dict):
            return self.rle(thing, source, frame if scale == (1, 1) else picture.declared, frame, turned, moved)
        if not isinstance(source, list):
            self.log.left_out('segmentations that are neither polygons nor RLE; the boxes are kept', thing.where)
            return None, None, None
        width, height = picture.shown
        polygons, untouched = [], not moved
        for polygon, reshaped in flat_polygons(source):
            try:
                values = [float(value) for value in polygon]
                if len(values) < 6 or len(values) % 2 or not all(map(math.isfinite, values)):
                    raise ValueError
            except (TypeError, ValueError):
                self.log.left_out('polygons that are not three or more points', f'{thing.where}: {str(polygon)[:60]}')
                untouched = False
                continue
            if reshaped:
                self.log.changed('polygons whose form is [[x1, y1, x2, y2, ...]] now', thing.where)
                untouched = False
            if moved:
                values = [value for x, y in zip(values[::2], values[1::2]) for value in move(x, y)]
            xs, ys = values[::2], values[1::2]
            reach = max(-min(xs), -min(ys), max(xs) - width, max(ys) - height)
            if reach > 0:
                values, untouched = cut(values, width, height), False
                if reach > ROUNDING:
                    self.log.changed('polygons cut at the border of the picture', thing.where)
            if len(values) < 6 or area_of(values) <= 0:
                self.log.left_out('polygons without an area in the picture', f'{thing.where}: {str(polygon)[:60]}')
                untouched = False
                continue
            polygons.append(values)
        if not polygons:
            self.log.note('objects without a usable polygon, which a detector with masks cannot learn', thing.where)
            return None, None, None
        left, top = (min(min(values[axis::2]) for values in polygons) for axis in (0, 1))
        right, bottom = (max(max(values[axis::2]) for values in polygons) for axis in (0, 1))
        kept = source if untouched and 'id' in thing.entry else [_short(values) for values in polygons]
        return kept, sum(map(area_of, polygons)), _short([left, top, right - left, bottom - top])

    def rle(self, thing, source, expected, frame, turned, moved):
        try:
            code = encoded(source)
            if tuple(code['size']) != expected[::-1]:
                raise ValueError(f'it is {code["size"][1]}x{code["size"][0]}, not {expected[0]}x{expected[1]}')
            masks = rle_api()
            if moved:
                mask = np.asarray(Image.fromarray(masks.decode(code)).resize(frame, Image.Resampling.NEAREST))
                code = masks.encode(np.asfortranarray(turn_mask(mask, turned)))
                source = dict(size=[int(side) for side in code['size']], counts=code['counts'].decode())
            area, box = float(masks.area(code)), masks.toBbox(code).tolist()
        except ValueError as error:
            self.log.left_out('RLE masks that do not fit; the boxes are kept', f'{thing.where}: {error}')
            return None, None, None
        if not area:
            self.log.left_out('RLE masks without a pixel; the boxes are kept', thing.where)
            return None, None, None
        return source, area, _short(box)


def _short(values):
    """Round to thousandths of a pixel."""
    return [round(float(value), 3) for value in values]


# ---- categories ----

def chosen_categories(source, args, log):
    """Return the categories to write, in order. Names of objects become clean ones."""
    categories, names = {}, {}
    for row in source.categories:
        name = names[row['name']] = clean_name(row['name'], args.source, log)
        if name in categories:
            log.changed('classes joined with another of the same name', repr(row['name']))
        categories.setdefault(name, dict(row, name=name))
    used = Counter()
    for picture in source.pictures:
        for thing in picture.things:
            thing.name = names[thing.name]
            used[thing.name] += 1
    if args.classes:
        for name in categories:
            if name not in args.classes:
                log.left_out('classes that --classes does not name', f'{name!r}, {used[name]} objects')
        return {name: categories.get(name, dict(name=name)) for name in args.classes}
    for name, row in list(categories.items()):
        children = [other for other in categories.values() if other is not row and other.get('supercategory') == name]
        if children and not used[name] and row.get('supercategory') in (None, '', 'none', name):
            log.left_out('root categories without objects', f'{name!r}, above {children[0]["name"]!r}')
            del categories[name]
    return categories


# ---- the file ----

def ids_of(rows):
    """Return the ids of rows if they are different whole numbers from 1, else None."""
    ids = [row.get('id') for row in rows]
    good = all(type(number) is int and number > 0 for number in ids) and len(set(ids)) == len(ids)
    return ids if good else None


def numbered(rows, what, log):
    """Give rows ids from 1, unless theirs are good."""
    ids = ids_of(rows)
    if ids is None:
        before = [row['id'] for row in rows if 'id' in row]
        ids = list(range(1, len(rows) + 1))
        if before:
            log.changed(f'sets of {what} ids; they are 1 to {len(rows)} now',
                        f'they began with {", ".join(map(repr, before[:3]))}')
    for row, number in zip(rows, ids):
        row['id'] = number
    return rows


def root_of(pictures, args):
    """Return the folder to which file names are relative: that of the source's names if they are right."""
    if args.images and all(is_below(picture.path, args.images) for picture in pictures):
        return args.images
    roots = set()
    for picture in pictures:
        name, path = picture.entry.get('file_name') or '/', picture.path.as_posix()
        roots.add(path.removesuffix(name) if path.endswith(f'/{name}') else None)
    if len(roots) == 1 and None not in roots:
        return Path(roots.pop())
    parents = [picture.path.parent for picture in pictures]
    if len(set(map(Path.is_absolute, parents))) > 1:
        parents = [Path(os.path.abspath(parent)) for parent in parents]
    return Path(os.path.commonpath(parents) or '.')


def build(pictures, converted, categories, header, args, log):
    """Return (content of a COCO file, folder of its pictures)."""
    root = root_of(pictures, args)
    ids = {name: row['id'] for name, row in categories.items()}
    images, annotations = [], []
    for picture in pictures:
        name = Path(os.path.relpath(picture.path, root)).as_posix()
        if picture.entry.get('file_name', name) != name:
            before = picture.entry['file_name']
            written = ascii if key(before) == key(name) else str  # the two forms of an accent look alike
            log.changed(f'file names that are relative to {root}', f'{written(before)} -> {written(name)}')
        width, height = picture.shown
        images.append(dict(picture.entry, file_name=name, width=width, height=height))
    numbered(images, 'image', log)
    for picture, image in zip(pictures, images):
        annotations += [dict(row, image_id=image['id'], category_id=ids[row['name']]) for row in converted[id(picture)]]
    for row in annotations:
        del row['name']
    numbered(annotations, 'annotation', log)
    return dict(header, images=images, annotations=annotations, categories=list(categories.values())), root


def convert(args, log):
    """Return {split: (content, folder of the pictures)}."""
    source = READERS[args.format](args, log)
    found = dict.fromkeys(picture.split for picture in source.pictures)
    if args.split is not None and args.split not in found:
        raise SystemExit(f'there is no split {args.split!r}; there are {", ".join(map(repr, found))}')
    categories = chosen_categories(source, args, log)
    numbered(list(categories.values()), 'category', log)
    converter, converted, splits = Converter(args, log), {}, {}
    for picture in source.pictures:
        if args.split not in (None, picture.split):
            continue
        picture.things = [thing for thing in picture.things if thing.name in categories]
        rows = converter.convert(picture)
        if rows is not None:
            converted[id(picture)] = rows
            splits.setdefault(picture.split, []).append(picture)
    if args.hold_out:
        splits = held_out(splits, args.hold_out)
    return {split: build(pictures, converted, categories, source.header, args, log)
            for split, pictures in sorted(splits.items())}


def held_out(splits, share):
    """Return {'train': pictures, 'val': a share of them}, drawn with a fixed seed."""
    if len(splits) != 1:
        found = ', '.join(map(repr, sorted(splits))) or 'none'
        raise SystemExit(f'--hold-out divides one split, but there are {found}: leave it out, or choose one by --split')
    pictures, = splits.values()
    count = max(round(len(pictures) * share), 1)
    if count >= len(pictures):
        raise SystemExit(f'--hold-out {share} leaves no picture of {len(pictures)} for the training')
    drawn = {*random.Random(0).sample(range(len(pictures)), count)}
    return {'train': [picture for place, picture in enumerate(pictures) if place not in drawn],
            'val': [picture for place, picture in enumerate(pictures) if place in drawn]}


def summary(content, split):
    """Return a line about a file: pictures, objects of each class."""
    counts = Counter(row['category_id'] for row in content['annotations'])
    empty = len(content['images']) - len({row['image_id'] for row in content['annotations']})
    classes = ', '.join(f'{row["name"]}: {counts[row["id"]]}' for row in content['categories'])
    pictures, objects = (f'{number} {noun}{"s" * (number != 1)}' for number, noun in (
        (len(content['images']), 'picture'), (len(content['annotations']), 'object')))
    return f'{split + ": " if split else ""}{pictures}, {empty} of them without objects; {objects} ({classes})'


def configuration(files, targets):
    """Yield the lines of a configuration that reads the files.

    Args:
        files: {split: (content, folder of the pictures)}.
        targets: {split: path of its file}.
    """
    content, _ = next(iter(files.values()))
    yield f'classes = {tuple(row["name"] for row in content["categories"])!r}'
    yield "model = __import__('mmlocalmamba').with_classes(_base_.model, len(classes))"
    parts = {split: next((part for part in ('val', 'test') if part in split), 'train') for split in files}
    for split, part in parts.items():
        target = str(targets[split])
        yield f'{part}_dataloader = dict(dataset=dict(' + f'  # {split}' * (split not in ('', part))
        yield f"    data_root='', ann_file={target!r}, data_prefix=dict(img={files[split][1].as_posix() + '/'!r}),"
        yield '    metainfo=dict(classes=classes)))'
        if part != 'train':
            yield f'{part}_evaluator = dict(ann_file={target!r})'
    if 'val' in parts.values() and 'test' not in parts.values():
        yield 'test_dataloader = val_dataloader'
        yield 'test_evaluator = val_evaluator'


def parse_args(args):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder, data.yaml or annotation file')
    parser.add_argument('out', type=Path, help='JSON file, or a folder for a file of each split')
    parser.add_argument('--format', choices=READERS)
    parser.add_argument('--images', type=Path, help='folder of the pictures; file names become relative to it')
    parser.add_argument('--classes', help='class names in order, separated by commas, or a file with one a line; for '
                                          'YOLO in the order of their numbers, for other formats the ones to keep')
    parser.add_argument('--split', help='write only this split')
    parser.add_argument('--hold-out', type=float, metavar='SHARE',
                        help='write this share of the pictures, such as 0.2, into a second '
                             'file for the validation: OUT_val.json beside OUT.json')
    parser.add_argument('--overwrite', action='store_true', help='replace files that exist')
    parser.add_argument('--strict', action='store_true', help='write nothing if anything would be left out')
    parser.add_argument('--examples', type=int, default=3, help='examples to print of each change (default: 3)')
    parser.add_argument('--unlabelled', choices=['keep', 'leave-out'],
                        help='pictures without an annotation file (default: keep for YOLO, else leave-out)')
    parser.add_argument('--boxes', choices=['xywh', 'xyxy', 'cxcywh'], help='numbers of a box in YOLO and COCO files')
    parser.add_argument('--units', choices=['pixels', 'fractions'], help='unit of these numbers')
    parser.add_argument('--base', type=int, choices=[0, 1], help="VOC's first pixel (default: by looking)")
    parser.add_argument('--difficult', choices=['keep', 'ignore'], default='keep',
                        help="VOC's difficult objects: keep, or have them ignored (iscrowd=1)")
    parser.add_argument('--crowds', choices=['keep', 'objects'], help='COCO files in which every object is a crowd')
    parser.add_argument('--category-offset', type=int, help='add this to the category ids of COCO annotations')
    parser.add_argument('--exif', choices=['shown', 'stored'],
                        help='objects were drawn on pictures as EXIF turns them, or as stored (default: by size)')
    parser.add_argument('--resized', choices=['scale', 'keep'],
                        help='pictures of another size than in the annotations: scale the objects, or keep them')
    parser.add_argument('--extract', type=Path, metavar='FOLDER', help='write the pictures that LabelMe files hold')
    args = parser.parse_args(args)
    args.written, args.embedded = args.out, {}
    if args.hold_out is not None and not 0 < args.hold_out < 1:
        raise SystemExit(f'--hold-out must be between 0 and 1, got {args.hold_out:g}')
    if not args.source.exists():
        raise SystemExit(f'{args.source} does not exist')
    if args.images and not args.images.is_dir():
        raise SystemExit(f'--images {args.images} is not a folder')
    if args.out.exists() and args.out.samefile(args.source):
        raise SystemExit(f'{args.out} is the source: write another file')
    if args.classes:
        names = names_in(Path(args.classes)) if Path(args.classes).is_file() else [
            name.strip() for name in args.classes.split(',')]
        if '' in names or len(set(names)) < len(names):
            raise SystemExit(f'--classes: a name is empty or there twice: {names}')
        args.classes = names
    return args


def format_of(args):
    """Return the format of the source, by looking."""
    looks = formats_of(args.source, args.written)
    if not looks:
        raise SystemExit(f'{args.source} has no annotations of {", ".join(READERS)}; --format says which if it has')
    if len(looks) > 1:
        found = ', '.join(f'{name} ({path})' for name, path in looks.items())
        raise SystemExit(f'{args.source} has annotations of several formats: {found}. --format says which to read')
    return next(iter(looks))


def main(args=None):
    args = parse_args(args)
    args.format = args.format or format_of(args)
    log = Log(args.examples)
    print(f'{args.source}: {args.format}')
    files = convert(args, log)
    lists = args.out.suffix.lower() == '.json'
    if lists and len(files) > 1 and not args.hold_out:
        raise SystemExit(f'{args.source} has the splits {", ".join(map(repr, files))}: name a folder instead of '
                         f'{args.out}, or one of them by --split')
    targets = {split: args.out / f'{split or "annotations"}.json' if not lists else args.out.with_stem(
        f'{args.out.stem}_val') if args.hold_out and split == 'val' else args.out for split in files}
    for line in log.lines():
        print(line)
    for split, (content, _) in files.items():
        print(summary(content, split))
    if not any(content['annotations'] for content, _ in files.values()):
        raise SystemExit('no object is left, so nothing is written')
    if args.strict and any(group == 'left out' for group, _ in log.counts):
        raise SystemExit('--strict: something is left out, so nothing is written')
    present = [path for path in (*targets.values(), *args.embedded) if path.exists()]
    if present and not args.overwrite:
        raise SystemExit(f'{present[0]} exists: choose another name, or pass --overwrite to replace it')
    for path, (data, _) in args.embedded.items():
        write_whole(str(path), data)
    for split, (content, _) in files.items():
        write_whole(str(targets[split]), json.dumps(content))
    print('\nlines for the configuration, after the line of _base_:\n')
    print('\n'.join(configuration(files, targets)))
    if len(files) == 1 and '' in files:
        print('# For the validation instead: the same with val_dataloader, and '
              f'val_evaluator = dict(ann_file={str(targets[""])!r}). --hold-out 0.2 writes a part for it.')


if __name__ == '__main__':
    main()
