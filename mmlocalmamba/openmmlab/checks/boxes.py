"""Rules for boxes and masks in COCO's format: the file, its pictures, the configuration and the evaluator together."""
import difflib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmlocalmamba.openmmlab.checks.coco_file import NUMBER_FROM_1, ROUNDING, CocoFile, is_number, key_of, plain, shown
from mmlocalmamba.openmmlab.checks.findings import Finding, Note, Problem, Tally, absent_classes, counted, listed
from mmlocalmamba.openmmlab.checks.pictures import loaded_size
from mmlocalmamba.openmmlab.checks.reader import Header, is_local
from mmlocalmamba.openmmlab.checks.splits import Split

_KEPT, _CROWD = 'kept', 'crowd: ignored'
_UNLISTED, _IGNORED, _OUTSIDE = 'of unlisted pictures', "marked 'ignore'", 'outside of the picture'
_NO_AREA, _SMALL, _OTHER_CLASS = "with 'area' of 0", 'narrower than a pixel', 'of other classes'
_REASONS = (_KEPT, _CROWD, _UNLISTED, _IGNORED, _OUTSIDE, _NO_AREA, _SMALL, _OTHER_CLASS)


# ---- the data set of the configuration ----


def class_findings(split: Split, coco: CocoFile) -> Iterator[Finding]:
    """Yield where the class names of the configuration and the categories of the file disagree."""
    classes, names, file = split.classes, coco.names, coco.file
    if classes is None or not names:
        return
    missing = [name for name in classes if name not in names]
    others = [name for name in dict.fromkeys(names) if name not in classes]
    per_class = Counter(coco.category[coco.category >= 0].tolist())
    boxes = {name: sum(per_class[place] for place, other in enumerate(names) if other == name) for name in names}
    if split.inherited and missing:
        used = [name for name in dict.fromkeys(names) if boxes[name]] or list(dict.fromkeys(names))
        yield Problem(file, f'the configuration names no classes, so {split.dataset} takes its own {len(classes)} '
                            f'({listed(classes, 3)}), but the file has {listed(map(shown, names))}',
                      f'Set metainfo=dict(classes={tuple(used)!r}) in each data set, and the model to {len(used)} '
                      'classes',
                      about='classes')
        return
    for name in classes:
        places = [place for place, other in enumerate(names) if other == name]
        if len(places) > 1:
            empty = [coco.categories[place].get('id') for place in places if not per_class[place]]
            remove = empty if 0 < len(empty) < len(places) else empty[1:]
            yield Problem(file, f'the class {shown(name)} is the name of several categories (id '
                                f'{listed(coco.categories[place].get("id") for place in places)}), which count as '
                                'several classes',
                          f'Remove the category of id {listed(remove)}, which no box has' if remove
                          else 'Give all boxes the id of one of them, and remove the others', about='classes')
    if missing:
        yield Problem(file, f'lacks classes of the configuration: {listed(map(shown, missing))}. '
                            f'It has {listed(map(shown, names))}', _add_classes(missing, others, coco, classes),
                      about='classes')
    else:
        order = [name for name in dict.fromkeys(names) if name in classes]
        if order != list(classes):
            yield Problem(file, f'the classes {listed(classes)} are in another order than in the file, by which '
                                'MMDetection numbers them',
                          f'Set metainfo=dict(classes={tuple(order)!r}) in each data set', about='classes')
    unused = [name for name in others if boxes[name]]
    if unused and not missing:
        yield Note(file, f'the configuration does not have {listed(map(shown, unused))}, so this is left out: '
                         f'{counted(sum(boxes[name] for name in unused), "box")}',
                   'Add what you want to metainfo.classes')
    alike: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        alike[plain(name)].append(name)
    for same in alike.values():
        if len(same) > 1 and any(name in classes for name in same):
            yield Note(file, f'the categories {listed(map(shown, same))} look the same', 'Join them')


def _add_classes(missing: list[str], others: list[str], coco: CocoFile, classes: Sequence[str]) -> str:
    pairs = {name: [other for other in others if plain(other) == plain(name)] or difflib.get_close_matches(
        plain(name), others, 1, 0.75) for name in missing}
    if any(pairs.values()) or len(others) >= len(missing) and others:
        meant = [f'{shown(other)} for {shown(name)}' for name, found in pairs.items() for other in found]
        return 'Correct metainfo.classes' + (f': set {listed(meant)}' if meant else '')
    used = [identity for identity in coco.category_of if isinstance(identity, int)]
    free = iter(range(max(used, default=0) + 1, max(used, default=0) + 1 + len(missing)))
    # MMDetection numbers the classes by their place in the list
    added = {name: dict(id=next(free), name=name) for name in missing}
    order = [added.get(name) or dict(id=coco.categories[coco.names.index(name)].get('id'), name=name)
             for name in classes]
    told = f'{order}' if len(order) <= 20 else f'also {list(added.values())[:8]}, each at its place in the classes'
    return f"If they have no objects here, set the file's 'categories' to {told}; otherwise correct metainfo.classes"


def audit_boxes(split: Split, coco: CocoFile, headers: dict[str, Header]) -> tuple[list[Finding], Tally]:
    """Return the findings of an annotation file and its pictures, and the table."""
    findings = [*coco.findings, *class_findings(split, coco)]
    wanted = set(split.classes) if split.classes is not None else set(coco.names)
    of_class = np.array([name in wanted for name in coco.names] + [False])
    reason = np.full(len(coco.annotations), _REASONS.index(_KEPT))
    ignored = np.array([bool(annotation.get('ignore')) for annotation in coco.annotations], dtype=bool)
    for chosen, why in ((coco.crowd, _CROWD), (~of_class[coco.category], _OTHER_CLASS), (coco.small, _SMALL),
                        (coco.area <= 0, _NO_AREA), (coco.outside, _OUTSIDE), (ignored, _IGNORED),
                        (coco.image < 0, _UNLISTED)):
        reason[chosen] = _REASONS.index(why)
    tally = Tally(split.title, 'boxes')
    for place, name in enumerate(coco.names):
        mine = reason[coco.category == place]
        counts = tally.classes.setdefault(name, [0, 0])
        counts[0] += len(mine)
        counts[1] += int((mine == 0).sum())
    tally.reasons.update({why: int((reason == number).sum()) for number, why in enumerate(_REASONS) if number})
    kept = reason <= 1
    _count_pictures(split, coco, tally, of_class, kept, findings)
    if split.trains and len(coco.annotations) and not (reason == 0).any():
        findings.append(Problem(coco.file, 'no box is kept', 'See the table for the reasons'))
    elif split.trains and not len(coco.annotations):
        findings.append(Problem(coco.file, 'it has no annotations', 'Name the annotation file of the training'))
    elif split.trains and not split.partial and split.classes is not None and not any(
            finding.about == 'classes' for finding in findings):
        if absent := absent_classes(tally, split.classes):
            findings.append(Note(coco.file, 'no box of this class is kept', 'Add boxes, or remove the class',
                                 noun='class', entries=absent))
    many = [name for place, name in enumerate(coco.names) if name in wanted
            and (mine := coco.crowd[coco.category == place]).sum() > max(len(mine) / 2, 3)]
    if many and not coco.crowd.all():
        findings.append(Note(coco.file, "more than half of its objects have 'iscrowd': 1 and are ignored",
                             "Write 'iscrowd': 0 for single objects", noun='class', entries=many))
    if split.options.get('masks'):
        findings += _mask_findings(coco, kept)
    findings += _size_findings(split, coco, headers)
    return findings, tally


def _count_pictures(split: Split, coco: CocoFile, tally: Tally, of_class: np.ndarray, kept: np.ndarray,
                    findings: list[Finding]) -> None:
    """Count the pictures that MMDetection leaves out, and compare with what the data set kept."""
    options, listed_images = split.options, set(coco.image_of.values())
    with_class = set(coco.image[of_class[coco.category]].tolist())
    if options.get('filter_empty'):
        tally.left_out['without a box of the classes'] = len(listed_images - with_class)
        listed_images &= with_class
    least = options.get('min_size', 0)
    small = {place for place in listed_images if all(is_number(coco.images[place].get(key)) for key in (
        'width', 'height')) and min(coco.images[place]['width'], coco.images[place]['height']) < least}
    tally.left_out[f'smaller than min_size={least}'] = len(small)
    expected = len(listed_images - small)
    tally.pictures = len(coco.images), split.count
    if split.partial:
        tally.left_out['by indices'] = expected - split.count
    elif expected != split.count and not any(finding.stops for finding in findings):
        findings.append(Note(coco.file, f'by its entries {expected} pictures are kept, but {split.dataset} has '
                                        f'{split.count}', 'Look for further filters of the data set'))
    counts = Counter(coco.image[kept].tolist())
    other = [identity for identity, count in options.get('kept', {}).items()
             if counts[coco.image_of.get(identity, -1)] != count]
    if other and not any(finding.stops for finding in findings):
        findings.append(Note(coco.file, f'{split.dataset} keeps another number of its boxes than this audit counts',
                             'Look for further filters of the data set', noun='picture', entries=other, key='id'))


def _mask_findings(coco: CocoFile, chosen: np.ndarray) -> Iterator[Finding]:
    """Yield what is wrong with the masks of the chosen annotations."""
    found: dict[str, list[Any]] = defaultdict(list)
    for place in np.flatnonzero(chosen).tolist():
        if why := mask_fault(coco.annotations[place].get('segmentation'), coco.size[place]):
            found[why].append(coco.ids[place])
    for why, ids in found.items():
        text, write = _MASK_TEXTS[why]
        kind = Note if why == 'polygon' and len(ids) <= chosen.sum() / 2 else Problem
        yield kind(coco.file, text, write, noun='annotation', entries=ids, key='id')


_POLYGONS = "Write 'segmentation': [[x1, y1, x2, y2, x3, y3, ...], ...], a list for each part of the object"
_MASK_TEXTS = {
    'none': ("it has a box but no polygon ('segmentation'), and the pipeline loads masks",
             'To train on boxes alone, use faster-rcnn_localvmamba-* or retinanet_localvmamba-*; with another '
             'detector, set LoadAnnotations(with_mask=False) and use a model and metric without masks'),
    'nested': ("'segmentation' has lists of pairs, or is one list of numbers", _POLYGONS),
    'polygon': ("no polygon of 'segmentation' has three points and an even number of values: the object is ignored",
                _POLYGONS),
    'rle': ("'segmentation' is a dict without 'size' and 'counts'", 'Write RLE as pycocotools does, or polygons'),
    'size': ("the 'size' of the RLE is not [height, width] of the picture",
             'Encode the mask at the size of the picture'),
}


def mask_fault(segmentation: Any, size: Sequence[float]) -> str:
    """Return a key of the texts above, or '' for a mask that can be read."""
    if not segmentation:
        return 'none'
    if isinstance(segmentation, dict):
        if not isinstance(segmentation.get('counts'), (list, str)) or not isinstance(segmentation.get('size'), list):
            return 'rle'
        return '' if list(segmentation['size']) == [size[1], size[0]] or not np.isfinite(size).all() else 'size'
    if not isinstance(segmentation, list) or not all(isinstance(part, list) for part in segmentation) or any(
            not is_number(value) for part in segmentation for value in part[:2]):
        return 'nested'
    return '' if any(len(part) >= 6 and len(part) % 2 == 0 for part in segmentation) else 'polygon'


def _size_findings(split: Split, coco: CocoFile, headers: dict[str, Header]) -> Iterator[Finding]:
    """Yield where the file says another size than the picture has when it is loaded."""
    groups: dict[str, list[str]] = defaultdict(list)
    turned = []
    for image in coco.images:
        path = picture_path(split, image)
        header = headers.get(path)
        if header is None or header.broken or not all(is_number(image.get(key)) and image[key] > 0
                                                      for key in ('width', 'height')):
            continue
        told, actual = (image['width'], image['height']), loaded_size(path, header, split.loader)
        if header.orientation not in (1, *_TURNED_BY_EXIF) and split.loader.turns:
            turned.append(path)
        if told == actual:
            continue
        if told == actual[::-1] or abs(told[0] - actual[1]) + abs(told[1] - actual[0]) <= ROUNDING < abs(
                actual[0] - actual[1]):
            groups['exif' if actual != (header.width, header.height) else 'swapped'].append(path)
        elif max(abs(told[0] - actual[0]), abs(told[1] - actual[1])) <= ROUNDING:
            groups['near'].append(path)
        else:
            groups['other'].append(path)
    first = {path: image for image in coco.images if (path := picture_path(split, image)) in {
        paths[0] for paths in groups.values()}}
    for why, paths in groups.items():
        kind, text, write = _SIZE_TEXTS[why]
        image, size = first[paths[0]], loaded_size(paths[0], headers[paths[0]], split.loader)
        yield kind(coco.file, f'its size there is {image["width"]}x{image["height"]}, but the picture has '
                              f'{size[0]}x{size[1]} when it is loaded{text}', write, noun='picture', entries=paths)
    if turned:
        yield Note(coco.file, 'EXIF turns it by 180 degrees or mirrors it when it is loaded',
                   'Make sure that the boxes were drawn on the turned picture', noun='picture', entries=turned)


_TURNED_BY_EXIF = (5, 6, 7, 8)
_SIZE_TEXTS = {
    'exif': (Problem, ', since EXIF turns it', 'Turn the pixels in the files (PIL.ImageOps.exif_transpose) and the '
             "boxes, or load them unturned: LoadImageFromFile(color_type='color_ignore_orientation')"),
    'swapped': (Problem, '', "Exchange 'width' and 'height' if the boxes fit the picture; otherwise turn the boxes, "
                             "too"),
    'near': (Note, '', "Correct 'width' and 'height'"),
    'other': (Problem, '', 'The pictures were resized after annotation, or are other pictures: scale the boxes, or use '
                           'the pictures that were annotated'),
}


def picture_path(split: Split, image: dict) -> str:
    return os.path.join(split.folder, str(image.get('file_name')))


def picture_paths(split: Split, coco: CocoFile) -> list[str]:
    return [path for image in coco.images if is_local(path := picture_path(split, image))]


# ---- evaluators ----

_SAME_FILE = 'Name the same annotation file in the data set and in the evaluator'


def evaluator_findings(split: Split, coco: CocoFile, truth: CocoFile, masks: bool) -> Iterator[Finding]:
    """Yield what goes wrong when results of a data set are scored by an annotation file.

    Args:
        split: the data set of the validation or test.
        coco: its annotation file.
        truth: the evaluator's annotation file; may be ``coco`` itself.
        masks: True if masks are scored, too.
    """
    file = f'{truth.file} (of the evaluator)' if truth is not coco else truth.file
    if 0 in truth.ids or '0' in truth.ids:
        yield Problem(file, "pycocotools takes the id 0 for 'no match', so that a found object counts as not found",
                      NUMBER_FROM_1, noun='annotation', entries=[0], key='id')
    words = [identity for identity in truth.ids if not is_number(identity) and identity is not None]
    if words:
        yield Problem(file, 'ids are no numbers, and pycocotools cannot score them', NUMBER_FROM_1, noun='annotation',
                      entries=words, key='id')
    lacking = [annotation.get('id') for annotation in truth.annotations if 'iscrowd' not in annotation]
    if lacking:
        yield Problem(file, "it has no 'iscrowd', and pycocotools stops with a KeyError", "Write 'iscrowd': 0",
                      noun='annotation', entries=lacking, key='id')
    if not truth.annotations:
        yield Problem(file, 'it has no annotations: AP is always -1',
                      'Name an annotation file with the truth, or turn off the validation')
    if masks:
        yield from _mask_findings_of_truth(file, truth)
    if truth is coco:
        return
    yield from (finding for finding in truth.findings if finding.stops)
    mine, theirs = ({key_of(image.get('id')): os.path.basename(str(image.get('file_name'))) for image in part.images}
                    for part in (coco, truth))
    strangers = [identity for identity in mine if identity not in theirs]
    if strangers:
        yield Problem(file, f'it lacks pictures of the data set ({coco.file})', _SAME_FILE, noun='picture',
                      entries=strangers, key='id')
    renamed = [identity for identity, name in mine.items() if theirs.get(identity, name) != name]
    if renamed:
        yield Problem(file, f'the id is of {theirs[renamed[0]]} there, but of {mine[renamed[0]]} in the data set '
                            f'({coco.file}): results are scored by the truth of other pictures', _SAME_FILE,
                      noun='picture', entries=renamed, key='id')
    more = [identity for identity in theirs if identity not in mine]
    if more and not strangers and not renamed:
        yield Problem(file, f'the data set ({coco.file}) lacks it, and its objects count as not found', _SAME_FILE,
                      noun='picture', entries=more, key='id')
    if split.classes is not None:
        ours, scored = ([name for name in part.names if name in split.classes] for part in (coco, truth))
        if ours != scored:
            yield Problem(file, f'its classes are {listed(map(shown, scored))}, those of the data set '
                                f'{listed(map(shown, ours))}: class numbers differ', _SAME_FILE, about='classes')


def _mask_findings_of_truth(file: str, truth: CocoFile) -> Iterator[Finding]:
    faulty = [truth.ids[place] for place, annotation in enumerate(truth.annotations) if annotation.get(
        'image_id') is not None and mask_fault(annotation.get('segmentation'), truth.size[place])]
    if faulty:
        yield Problem(file, "its 'segmentation' is no mask, and masks are scored", _POLYGONS, noun='annotation',
                      entries=faulty, key='id')
