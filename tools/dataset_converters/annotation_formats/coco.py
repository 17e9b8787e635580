"""Read files in COCO's format, of CVAT, Label Studio, Roboflow and others."""
import json
import re

from annotation_formats.files import (
    Pictures,
    Source,
    Thing,
    clean_name,
    declared_size,
    folders_of,
    is_below,
    is_picture,
    read_json,
    split_of,
    to_xywh,
    walk,
)


def is_coco(content):
    return isinstance(content, dict) and isinstance(content.get('images'), list) and isinstance(
        content.get('annotations'), list) and isinstance(content.get('categories'), list)


def read_coco(args, log):
    root = args.source.parent if args.source.is_file() else args.source
    files = {}
    for path in [args.source] if args.source.is_file() else walk(root):
        if path.suffix.lower() != '.json' and path != args.source or is_below(path, args.written):
            continue
        try:
            content = read_json(path)
        except ValueError as error:
            log.left_out('files that are not JSON', error)
            continue
        if is_coco(content):
            files[path] = content
        else:
            log.left_out('JSON files without the lists "images", "annotations" and "categories"', path)
    place = root if args.source.is_dir() or any(map(is_picture, walk(root))) else root.parent
    found = Pictures([args.images] if args.images else folders_of(place, args), log)
    pictures, categories, header = [], {}, {}
    for file, content in files.items():
        match = re.search(r'(?:^|_)(train|val|test)(?:ing|id|idation|\d{4})?$', file.stem.lower())
        split = '' if len(files) == 1 else split_of(file, root) or (match[1] if match else file.stem)
        header = header or {name: content[name] for name in ('info', 'licenses') if name in content}
        pictures += _read_coco_file(file, content, split, found, categories, args, log)
    for path in found.paths:
        if path not in found.used:
            log.note('pictures that are not in the file', path)
    return Source(pictures, list(categories.values()), header)


def _read_coco_file(file, content, split, found, categories, args, log):
    """Return the pictures of a file, and add its categories to ``categories`` by name."""
    names = {}
    for row in content['categories']:
        if not isinstance(row, dict) or 'id' not in row or not str(row.get('name', '')).strip():
            raise SystemExit(f'{file}: the category {row!r} lacks an id or a name')
        if str(row['id']) in names:
            raise SystemExit(f'{file}: two categories have the id {row["id"]!r}: '
                             f'{names[str(row["id"])]!r} and {row["name"]!r}')
        name = clean_name(row['name'], file, log)
        if name in names.values():
            log.changed('categories joined with another of the same name', f'{file}: {name!r}, id {row["id"]!r}')
        names[str(row['id'])] = name
        if categories.get(name, row)['id'] != row['id'] and name not in list(names.values())[:-1]:
            log.changed('category ids that another file gives to the same class', f'{file}: {name!r}, id {row["id"]!r}')
        categories.setdefault(name, dict(row, name=name))

    by_id, by_path, listed = {}, {}, {}
    for row in content['images']:
        if not isinstance(row, dict) or 'id' not in row or not row.get('file_name'):
            log.left_out('images without an id or a file name', f'{file}: {json.dumps(row)[:100]}')
            continue
        number, name = str(row['id']), str(row['file_name'])
        if number in listed:
            if listed[number] == name:
                log.changed('images that were listed twice', f'{file}: id {number}, {name}')
                continue
            raise SystemExit(f'{file}: the image id {row["id"]!r} is of two pictures, {listed[number]} and {name}: it '
                             'was joined from files whose ids collide, and whose boxes are whose is lost. Convert each '
                             'of these files by itself')
        listed[number] = name
        try:
            path = found.find(name, args.images or file.parent)
        except LookupError as error:
            log.left_out('images, because several pictures fit', f'{file}: {error}')
            continue
        if path is None:
            log.left_out('images whose picture was not found', f'{file}: {name}')
            continue
        if path in by_path:
            log.changed('images joined with another of the same picture', f'{file}: id {number}, {path}')
            by_id[number] = by_path[path]
            continue
        size = declared_size((row.get('width'), row.get('height')))
        picture = found.open(path, split, declared=size, entry=dict(row))
        if picture is not None:
            by_id[number] = by_path[path] = picture
    _check_categories(file, content['annotations'], names, args)
    for index, row in enumerate(content['annotations']):
        if not isinstance(row, dict):
            log.left_out('annotations that are no object', f'{file}: annotations[{index}]')
            continue
        where = f'{file}: annotation {row.get("id", index)!r}'
        name = names.get(_shifted(row.get('category_id'), args.category_offset))
        if str(row.get('image_id')) not in listed:
            log.left_out('annotations of pictures that are not listed', f'{where}, image_id {row.get("image_id")!r}')
        elif name is None:
            log.left_out('annotations of no category', f'{where}, category_id {row.get("category_id")!r}')
        elif str(row['image_id']) not in by_id:
            log.left_out('annotations of pictures that were left out', where)
        else:
            by_id[str(row['image_id'])].things.append(Thing(
                where, name, row.get('bbox'), row.get('segmentation'), dict(row)))
    _check_boxes(file, by_path.values(), args)
    _check_crowds(file, by_path.values(), args, log)
    return list(by_path.values())


def _shifted(number, offset):
    if not offset:
        return str(number)
    try:
        return str(int(number) + offset)
    except (TypeError, ValueError):
        return str(number)


def _check_categories(file, rows, names, args):
    """Stop if the numbers of annotations are those of categories, but off by one."""
    used = {str(row.get('category_id')) for row in rows if isinstance(row, dict)}
    if args.category_offset is not None or used <= set(names):
        return
    for offset in (1, -1):
        if {_shifted(number, offset) for number in used} <= set(names):
            raise SystemExit(
                f'{file}: annotations have category ids that no category has ({", ".join(sorted(used - set(names)))}), '
                f'but all fit if they are {"one more" if offset > 0 else "one less"}: cats may be called dogs. '
                f'--category-offset {offset} corrects it, --category-offset 0 leaves out what fits none')


def _boxes(pictures):
    for picture in pictures:
        for thing in picture.things:
            box = thing.box
            if isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box):
                yield thing, box, picture.declared or picture.shown


def _check_boxes(file, pictures, args):
    """Convert boxes as the options say, and stop if they are not what the options or the format say."""
    boxes = list(_boxes(pictures))
    if args.units is None and boxes and all(0 <= min(box) and max(box) <= 1 for _, box, _ in boxes):
        raise SystemExit(f'{file}: no number of a box is larger than 1, so they seem to be fractions of the picture: '
                         f'{boxes[0][0].where} has {boxes[0][1]}. --units fractions converts them, --units pixels '
                         'keeps them')
    if args.units == 'fractions':
        for thing, box, (width, height) in boxes:
            thing.box = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
            thing.entry.pop('area', None)
    boxes = list(_boxes(pictures))
    as_corners = [box[0] < box[2] <= width + 1 and box[1] < box[3] <= height + 1 for _, box, (width, height) in boxes]
    outside = [thing for thing, box, (width, height) in boxes
               if box[0] + box[2] > width + 1 or box[1] + box[3] > height + 1]
    if args.boxes is None and outside and all(as_corners):
        raise SystemExit(f'{file}: {len(outside)} of {len(boxes)} boxes reach out of their pictures as x, y, width, '
                         f'height, and none does as x1, y1, x2, y2: {outside[0].where} has {outside[0].box}. --boxes '
                         'xyxy converts them, --boxes xywh keeps them')
    if args.boxes:
        for thing, box, _ in boxes:
            thing.box = to_xywh(box, args.boxes)
            if args.boxes != 'xywh':
                thing.entry.pop('area', None)


def _check_crowds(file, pictures, args, log):
    things = [thing for picture in pictures for thing in picture.things]
    if not things or not all(thing.entry.get('iscrowd') in (1, '1', True) for thing in things):
        return
    if args.crowds is None:
        raise SystemExit(f'{file}: every object is a crowd (iscrowd=1), which no detector learns: tools write it where '
                         'the mask is a bitmap. --crowds objects makes them objects, --crowds keep keeps them')
    if args.crowds == 'objects':
        for thing in things:
            thing.entry['iscrowd'] = 0
            log.changed('crowds that are objects now (iscrowd=0)', thing.where)
