"""Read LabelMe's files: a JSON file for each picture."""
import base64
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from annotation_formats.files import (
    Picture,
    Pictures,
    Source,
    Thing,
    add_unlabelled,
    categories_of,
    declared_size,
    folders_of,
    orientation_of,
    read_json,
    split_of,
    walk,
)

# Shapes that have no inside.
NO_AREA = ('line', 'linestrip', 'point', 'points')


def _circle(points):
    """Return a polygon that is less than half a pixel from a circle, given by its centre and a point on it."""
    (x, y), (other_x, other_y) = points
    radius = math.hypot(other_x - x, other_y - y)
    count = 4 * max(3, math.ceil(math.pi / math.acos(1 - 0.5 / max(radius, 1)) / 4))
    return [value for step in range(count) for angle in [2 * math.pi * step / count]
            for value in (x + radius * math.cos(angle), y + radius * math.sin(angle))]


def _labelme_mask(shape, points, size):
    from pycocotools import mask as masks
    (left, top), _ = [[round(value) for value in point] for point in points]
    with Image.open(io.BytesIO(base64.b64decode(shape['mask']))) as image:
        part = np.asarray(image.convert('L')) > 0
    whole = np.zeros(size[::-1], np.uint8, order='F')
    room = whole[max(top, 0):top + part.shape[0], max(left, 0):left + part.shape[1]]
    room[:] = part[max(-top, 0):, max(-left, 0):][:room.shape[0], :room.shape[1]]
    encoded = masks.encode(whole)
    return dict(size=encoded['size'], counts=encoded['counts'].decode())


def _labelme_shape(shape, size):
    """Return (box or None, segmentation).

    Raises:
        ValueError, TypeError, KeyError, OSError: the reason why the shape is no object.
    """
    kind, points = shape.get('shape_type') or 'polygon', [[float(x), float(y)] for x, y in shape['points']]
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError('a coordinate is not finite')
    if kind == 'mask':
        return None, _labelme_mask(shape, points, size)
    if kind == 'rectangle' and len(points) in (2, 4):
        xs, ys = zip(*points)
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], [
            [min(xs), min(ys), max(xs), min(ys), max(xs), max(ys), min(xs), max(ys)]]
    if kind == 'circle' and len(points) == 2:
        return None, [_circle(points)]
    if kind in NO_AREA:
        raise ValueError(f'a {kind} has no area')
    if len(points) < 3 or kind in ('rectangle', 'circle'):
        raise ValueError(f'a {kind} of {len(points)} points')
    return None, [[value for point in points for value in point]]


def is_labelme(content):
    return isinstance(content, dict) and isinstance(content.get('shapes'), list)


def read_labelme(args, log):
    root = args.source.parent if args.source.is_file() else args.source
    files = [args.source] if args.source.is_file() else [
        path for path in walk(root) if path.suffix.lower() == '.json']
    found, pictures, names = Pictures(folders_of(root, args), log), [], set()
    for file in files:
        try:
            content = read_json(file)
        except ValueError as error:
            log.left_out('files that are not JSON', error)
            continue
        if not is_labelme(content):
            log.left_out('files of another format (LabelMe has "shapes")', file)
            continue
        named, embedded = str(content.get('imagePath') or ''), None
        if args.extract and content.get('imageData'):
            embedded = _embedded(file, content, root, args, log)
        path = embedded or found.of(file, named)
        if path is None:
            if content.get('imageData'):
                log.note('annotation files hold their picture (imageData): --extract FOLDER writes it', file)
            continue
        declared = declared_size((content.get('imageWidth'), content.get('imageHeight')))
        split = split_of(file, root)
        picture = args.embedded[path][1] if embedded else found.open(path, split)
        if picture is None:
            continue
        picture.split, picture.declared = split, declared
        pictures.append(picture)
        groups = {}
        for number, shape in enumerate(content['shapes'], 1):
            where = f'{file}, shape {number}'
            try:
                name = str(shape['label']).strip()
                box, segmentation = _labelme_shape(shape, declared or picture.shown)
            except (ValueError, TypeError, KeyError, OSError) as error:
                log.left_out('shapes that are no object', f'{where}: {error}')
                continue
            names.add(name)
            group = (name, shape.get('group_id') if shape.get('group_id') is not None else ('shape', number))
            thing = groups.setdefault(group, Thing(where, name, box, segmentation))
            if thing.where != where:
                thing.segmentation = _joined(thing.segmentation, segmentation, declared or picture.shown)
                thing.box = None
                log.changed('shapes joined with others of their group_id', where)
        picture.things = list(groups.values())
    add_unlabelled(pictures, found, root, args, log, 'an annotation file')
    return Source(pictures, categories_of(names, root))


def _joined(one, two, size):
    if isinstance(one, list) and isinstance(two, list):
        return one + two
    from pycocotools import mask as masks
    encoded = masks.merge([part for item in (one, two) for part in (
        masks.frPyObjects(item, size[1], size[0]) if isinstance(item, list) else [item])])
    return dict(size=encoded['size'], counts=encoded['counts'].decode())


def _embedded(file, content, root, args, log):
    """Note the picture that a LabelMe file holds for writing, and return its path."""
    try:
        data = base64.b64decode(content['imageData'], validate=False)
        with Image.open(io.BytesIO(data)) as image:
            ending = {'JPEG': '.jpg', 'PNG': '.png', 'BMP': '.bmp', 'WEBP': '.webp', 'TIFF': '.tif'}.get(image.format)
            if ending is None:
                raise ValueError(f'it is a {image.format}')
            path = Path(os.path.normpath(args.extract / file.relative_to(root))).with_suffix(ending)
            args.embedded[path] = (data, Picture(path, '', image.size, orientation_of(image)))
    except (ValueError, OSError, TypeError) as error:
        log.note('pictures in annotation files (imageData) that cannot be read', f'{file}: {error}')
        return None
    return path
