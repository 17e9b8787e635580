"""Read Pascal VOC: an XML file for each picture."""
import math
from xml.etree import ElementTree

from annotation_formats.files import (
    Pictures,
    Source,
    Thing,
    add_unlabelled,
    categories_of,
    declared_size,
    folders_of,
    read_text,
    split_of,
    walk,
)


def _voc_splits(root, log):
    """Return {name without ending: split} of the lists in ImageSets/Main, or {}."""
    lists = {path.stem: path for path in walk(root) if path.suffix == '.txt' and path.parts[-3:-1] == (
        'ImageSets', 'Main') and path.stem in ('train', 'val', 'test', 'trainval')}
    if {'train', 'val'} <= set(lists):
        lists.pop('trainval', None)
    splits = {}
    for split, path in lists.items():
        for line in read_text(path).splitlines():
            if line.strip():
                splits.setdefault(line.split()[0], split)
    return splits


def _number(node, tag):
    text = node.findtext(tag)
    if text is None:
        raise ValueError(f'<{tag}> is missing')
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'<{tag}> is {text}')
    return value


def _voc_polygon(node):
    polygon = node.find('polygon')
    if polygon is None:
        return None
    values = {child.tag: float(child.text) for child in polygon if child.text and child.text.strip()}
    points = []
    while f'x{len(points) // 2 + 1}' in values and f'y{len(points) // 2 + 1}' in values:
        number = len(points) // 2 + 1
        points += [values[f'x{number}'], values[f'y{number}']]
    return points or None


def read_voc(args, log):
    root = args.source.parent if args.source.is_file() else args.source
    files = [args.source] if args.source.is_file() else [
        path for path in walk(root) if path.suffix.lower() == '.xml']
    found, splits = Pictures(folders_of(root, args), log), _voc_splits(root, log)
    pictures, names, rows = [], set(), []
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            log.left_out('files that are not XML', f'{file}: {error}')
            continue
        if tree.tag != 'annotation':
            log.left_out('files of another format (VOC has <annotation>; export from CVAT as COCO)',
                         f'{file} has <{tree.tag}>')
            continue
        path = found.of(file, (tree.findtext('filename') or '').strip())
        if path is None:
            continue
        if splits and file.stem not in splits:
            log.left_out('annotation files in no list of ImageSets/Main', file)
            found.used.add(path)
            continue
        size = [tree.findtext(f'size/{side}') for side in ('width', 'height')]
        picture = found.open(path, splits.get(file.stem) or split_of(file, root), declared=declared_size(size))
        if picture is None:
            continue
        pictures.append(picture)
        for number, node in enumerate(tree.findall('object'), 1):
            where = f'{file}, object {number}'
            name = (node.findtext('name') or '').strip()
            try:
                if not name:
                    raise ValueError('<name> is missing')
                if node.find('bndbox') is None:
                    raise ValueError('a rotated box' if node.find('robndbox') is not None else '<bndbox> is missing')
                corners = [_number(node.find('bndbox'), tag) for tag in ('xmin', 'ymin', 'xmax', 'ymax')]
                polygon = _voc_polygon(node)
            except ValueError as error:
                log.left_out('objects that cannot be read', f'{where}: {error}')
                continue
            names.add(name)
            thing = Thing(where, name, None, [polygon] if polygon else None)
            difficult = (node.findtext('difficult') or '0').strip() not in ('0', '')
            if difficult:
                thing.entry = dict(difficult=1, iscrowd=int(args.difficult == 'ignore'))
                log.note('difficult objects, ' + (
                    'to be ignored (iscrowd=1)' if args.difficult == 'ignore' else
                    'kept like others (--difficult ignore has them ignored, as VOC does)'), where)
            picture.things.append(thing)
            rows.append((thing, corners))
    base = args.base
    if base is None and rows:
        first = next((thing.where for thing, corners in rows if min(corners[:2]) < 1), None)
        fractions = sum(any(value % 1 for value in corners) for _, corners in rows)
        base = int(first is None and fractions <= len(rows) / 2)
        log.note('data set whose coordinates begin with ' + (
            '1, as in VOC, because none is 0 (--base 0 if they begin with 0)' if base else
            '0, because one is 0 or most are fractions (--base 1 if they begin with 1, as in VOC)'), first or root)
    for thing, (left, top, right, bottom) in rows:
        # VOC's pixels begin with 1, and the box includes the last.
        thing.box = [left - base, top - base, right - left + base, bottom - top + base]
        if thing.segmentation:
            thing.segmentation = [[value - base for value in thing.segmentation[0]]]
    add_unlabelled(pictures, found, root, args, log, 'an annotation file')
    return Source(pictures, categories_of(names, root))
