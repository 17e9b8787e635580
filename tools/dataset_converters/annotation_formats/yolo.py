"""Read YOLO's labels: boxes and polygons, a text file for each picture."""
import math
import os
import re
from collections import Counter
from pathlib import Path

import yaml

from annotation_formats.files import (
    NAME_FILES,
    Pictures,
    Source,
    Thing,
    frame_size,
    is_picture,
    names_in,
    read_text,
    split_of,
    to_xywh,
    walk,
)


def _names_of_yaml(path, content):
    names = content.get('names')
    if isinstance(names, dict):
        try:
            numbers = {int(number): name for number, name in names.items()}
        except ValueError as error:
            raise SystemExit(f'{path}: names must map numbers to names ({error})') from error
        names = [numbers.get(number) for number in range(max(numbers, default=-1) + 1)]
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, type(None))) for name in names):
        raise SystemExit(f'{path}: names must be a list of names, or a mapping from numbers to names')
    return names


def read_yaml(path):
    """Return the mapping in a YAML file; all its values are text, so that a class may be called `no` or 1."""
    try:
        content = yaml.load(read_text(path), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise SystemExit(f'{path} is not YAML: {error}') from error
    return content if isinstance(content, dict) else {}


def _yolo_description(root, args):
    """Return (data.yaml or None, its content or {})."""
    files = [args.source] if args.source.is_file() else [
        *sorted(root.glob('*.y*ml')), *sorted((root / '..').glob('data.y*ml'))]
    described = [(path, content) for path in files for content in [read_yaml(path)] if 'names' in content]
    if len(described) > 1 and described[0][0].parent == described[1][0].parent:
        raise SystemExit(f'{described[0][0]} and {described[1][0]} both have names: give one of them as the source')
    path, content = described[0] if described else (None, {})
    if path and path.parent != root:
        content = dict(names=content['names'])  # its folders are those of the whole data set
    return path, content


def _yolo_names(root, label_folders, described, content):
    """Return the names of the classes and the file that has them.

    These are data.yaml in ``root``, a file of names beside the labels or above, and one or the other above ``root``.
    """
    inside = [place for folder in [*label_folders, root] for place in [folder, *folder.parents]
              if folder == place or place.is_relative_to(root)]
    own, above = (next((path for place in dict.fromkeys(places) for path in (
        *(place / name for name in NAME_FILES), *sorted(place.glob('*.names'))) if path.is_file()), None)
        for places in (inside, [root / '..']))
    if described and (described.parent == root or not own):
        names = _names_of_yaml(described, content)
        if own and names_in(own) != names:
            raise SystemExit(f'{described} and {own} name the classes differently: remove one, or give --classes')
        return names, described
    if own or above:
        return names_in(own or above), own or above
    raise SystemExit(f'{root}: the class names are missing. Write them into {root / "classes.txt"}, one a line in the '
                     'order of their numbers, or give --classes')


def _yolo_label(path, root, images, texts):
    """Return the label file of a picture, as Ultralytics, Darknet and others place it; None if there is none."""
    parts, names = path.parts, (f'{path.stem}.txt', f'{path.name}.txt')
    folders = [Path(*parts[:index], labels, *parts[index + 1:-1])
               for index in range(len(parts) - 2, -1, -1) if parts[index].lower() == 'images'
               for labels in ('labels', 'Labels')]
    folders += [path.parent, path.parent / 'labels', path.parent.parent / 'labels']
    for base in filter(None, (root, images)):
        if path.is_relative_to(base):
            below = path.relative_to(base).parent
            folders += [root / 'labels' / below, root / below]
    return next((folder / name for folder in folders for name in names
                 if folder / name in texts or (folder / name).is_file()), None)


def _yolo_splits(path, content, root, log):
    """Return {picture: split} of the folders and lists that a data.yaml names."""
    base = next((place for place in (root / content.get('path', ''), Path(content.get('path', '')), root)
                 if any((place / str(entry)).exists() for entry in _entries(content))), root)
    splits = {}
    for split in ('train', 'val', 'test'):
        for entry in _entries(content, split):
            # Roboflow writes ../train/images, from a folder that is not there.
            place = next((place for place in (base / entry, root / entry, root / re.sub(r'^(\.\./)+', '', entry))
                          if place.exists()), None)
            if place is None:
                log.note(f'folders in {path.name} do not exist', f'{split}: {entry}')
                continue
            place = Path(os.path.normpath(place))
            if place.is_file():
                lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
                files = [next((found for found in (place.parent / line, base / line) if found.is_file()), Path(line))
                         for line in lines]
                for missing in [file for file in files if not file.is_file()]:
                    log.left_out(f'pictures of {place.name} that do not exist', missing)
                files = [Path(os.path.normpath(file)) for file in files if file.is_file()]
            else:
                files = [file for file in walk(place) if is_picture(file)]
            for file in files:
                if splits.setdefault(file, split) != split:
                    log.left_out('pictures of a second split', f'{file} is in {splits[file]} and in {split}')
    return splits


def _entries(content, *splits):
    for split in splits or ('train', 'val', 'test'):
        value = content.get(split) or []
        yield from [value] if isinstance(value, str) else value


def _yolo_thing(words, names, size, keypoints, args):
    """Return the Thing of a line.

    Raises:
        ValueError: the reason why the line is none.
    """
    numbers = [float(word) for word in words]
    if not all(map(math.isfinite, numbers)):
        raise ValueError('a value is not finite')
    number, values = int(numbers[0]), numbers[1:]
    if number != numbers[0] or not 0 <= number < len(names) or names[number] is None:
        raise ValueError(f'class {words[0]} has no name; there are 0 to {len(names) - 1}')
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]
    width, height = size if args.units != 'pixels' else (1, 1)
    if args.units != 'pixels' and (max(values) > 2 or min(values) < -1):
        raise ValueError('the values are no fractions of the picture; --units pixels if they are pixels')
    thing = Thing('', names[number])
    if len(values) == 4:
        thing.box = to_xywh([values[0] * width, values[1] * height, values[2] * width, values[3] * height],
                            args.boxes or 'cxcywh')
    elif len(values) == 5:
        raise ValueError('5 numbers after the class: a prediction with its confidence?')
    elif len(values) >= 6 and len(values) % 2 == 0:
        thing.segmentation = [[value * (height if index % 2 else width) for index, value in enumerate(values)]]
    else:
        raise ValueError(f'{len(values)} numbers after the class: a box has 4, a polygon an even number from 6')
    return thing


def read_yolo(args, log):
    root = args.source.parent if args.source.is_file() else args.source
    found = Pictures([args.images or root], log)
    texts = {path: None for path in walk(root) if path.suffix.lower() == '.txt'}
    labels = {path: _yolo_label(path, root, args.images, texts) for path in found.paths}
    described, content = _yolo_description(root, args)
    if args.classes:
        names, names_file = args.classes, '--classes'
    else:
        names, names_file = _yolo_names(
            root, dict.fromkeys(label.parent for label in labels.values() if label), described, content)
    splits = _yolo_splits(described, content, root, log) if described else {}
    for path in splits:
        labels.setdefault(path, _yolo_label(path, root, args.images, texts))
    try:
        keypoints = math.prod(int(size) for size in content.get('kpt_shape') or [0])
    except ValueError as error:
        raise SystemExit(f'{described}: kpt_shape must be two numbers ({error})') from error

    used = Counter(label for label in labels.values() if label)
    pictures = []
    for path, label in labels.items():
        if splits and path not in splits:
            log.left_out(f'pictures in no split of {described.name}', path)
            continue
        if label is None and args.unlabelled == 'leave-out':
            log.left_out('pictures without a label file', path)
            continue
        picture = found.open(path, splits.get(path) or split_of(path, root))
        if picture is None:
            continue
        pictures.append(picture)
        if label is None:
            log.note('pictures without a label file, kept as pictures without objects '
                     '(--unlabelled leave-out leaves them out)', path)
            continue
        if used[label] > 1:
            log.note('pictures share a label file with another picture', f'{path}: {label}')
        for number, line in enumerate(read_text(label).splitlines(), 1):
            words = line.split()
            if not words:
                continue
            where = f'{label}:{number}'
            try:
                thing = _yolo_thing(words, names, frame_size(picture, args), keypoints, args)
            except ValueError as error:
                log.left_out('lines that are no object', f'{where}: {error}')
                continue
            if keypoints and len(words) == 5 + keypoints:
                log.left_out('sets of keypoints; their boxes are kept', where)
            thing.where = where
            picture.things.append(thing)
    lists = {os.path.normpath(root / entry) for entry in _entries(content)}
    for text in texts:
        if text not in used and text != names_file and text.name not in NAME_FILES and str(text) not in lists \
                and is_yolo(text, empty=True):
            log.left_out('label files without a picture', text)
    for number, name in enumerate(names):
        if name is None:
            log.note('numbers of classes without a name', f'{names_file}: {number}')
    return Source(pictures, [dict(name=name) for name in names if name is not None])


def is_yolo(path, empty=False):
    """Return True if the first line of a file begins with five numbers."""
    with path.open(errors='replace') as file:
        words = next((line.split() for line in file if line.strip()), None)
    if words is None:
        return empty
    try:
        return len([float(word) for word in words[:5]]) == 5
    except ValueError:
        return False
