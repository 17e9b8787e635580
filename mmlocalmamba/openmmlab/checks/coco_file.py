"""What an annotation file in COCO's format says by itself, and what is wrong with it under any configuration."""
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmlocalmamba.openmmlab.checks.findings import Finding, Note, Problem, listed

# Pixels by which a box may reach out of its picture, and a size may differ, by rounding.
ROUNDING = 2
# Number of boxes that are compared with their polygons.
_COMPARED = 2000
CONVERTS = 'mim run mmlocalmamba to_coco FILE NEW --images FOLDER does so'
NUMBER_FROM_1 = f'Number the annotations from 1. {CONVERTS}'


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def shown(name: Any) -> str:
    """Show a name, with escapes for what is not seen: control characters, and accents that are characters of their own.

    Without escapes, a composed accent and a separate one would look the same in a message that compares them.
    """
    text = str(name)
    return repr(text) if unicodedata.is_normalized('NFC', text) else ascii(text)


def plain(name: Any) -> str:
    """Return a name without spaces at the ends, invisible characters, composed accents and capital letters."""
    text = unicodedata.normalize('NFKC', str(name))
    return ' '.join(''.join(char for char in text if unicodedata.category(char) != 'Cf').split()).casefold()


class CocoFile:
    """The content of an annotation file as lists, with the findings that need no configuration.

    Args:
        content: the parsed JSON.
        file: its path.
    """

    def __init__(self, content: Any, file: str) -> None:
        self.file = file
        self.findings: list[Finding] = []
        content = content if isinstance(content, dict) else {}
        for key in ('images', 'categories'):
            if not isinstance(content.get(key), list):
                self._problem(f"it has no list '{key}'", "COCO's format is {'images': [...], 'annotations': [...], "
                                                         "'categories': [...]}")
        self.images, self.annotations, self.categories = (
            [entry for entry in content.get(key) or () if isinstance(entry, dict)]
            for key in ('images', 'annotations', 'categories'))
        self._check_images()
        self._check_categories()
        self._check_annotations()

    def _problem(self, text: str, write: str, noun: str = '', entries: Sequence[Any] = (), key: str = 'id ') -> None:
        self.findings.append(Problem(self.file, text, write, noun=noun, entries=entries, key=key.strip()))

    # ---- entries by themselves ----

    def _require(self, noun: str, entries: list[dict], keys: Sequence[str], write: str) -> None:
        for key in keys:
            lacking = [entry.get('id', f'at place {place}') for place, entry in enumerate(entries)
                       if entry.get(key) is None]
            if lacking:
                self._problem(f"it has no '{key}'", write, noun, lacking)

    def _check_images(self) -> None:
        self._require('picture', self.images, ('id', 'file_name'), "Write 'id' and 'file_name' of each picture")
        for key in ('width', 'height'):
            wrong = [image.get('id') for image in self.images if not is_number(image.get(key)) or image[key] <= 0]
            if wrong:
                self._problem(f"'{key}' is missing, 0 or no number, and boxes are clipped to it", "Write the picture's "
                              'size in pixels, as PIL.ImageOps.exif_transpose(PIL.Image.open(file)).size gives it',
                              'picture', wrong)
        ids = [image.get('id') for image in self.images]
        self.image_of = {identity: place for place, identity in enumerate(ids) if _hashable(identity)}
        if repeated := _repeated([identity for identity in ids if _hashable(identity) and identity is not None]):
            self._problem('several pictures have this id, and all boxes of the id go to the last of them',
                          "Give each picture an id of its own, and its annotations the same 'image_id'", 'id', repeated,
                          key='')
        kinds = {type(identity) for identity in ids if identity is not None}
        if len(kinds) > 1:
            self._problem(f'ids are of several types: {listed(sorted(kind.__name__ for kind in kinds))}',
                          'Write all of them as integers', 'picture',
                          [identity for identity in ids if not isinstance(identity, int)])
        elif kinds == {str}:
            self.findings.append(Note(self.file, "ids are strings; COCO's are integers, and some programs refuse "
                                                 "others",
                                      'Write integers', noun='picture', entries=ids, key='id'))
        names = [image.get('file_name') for image in self.images]
        if repeated := _repeated([name for name in names if isinstance(name, str)]):
            self._problem('several pictures have this file name: each is trained and scored with a part of the boxes, '
                          'or with those of another file', "Join the entries of the same file, or write the folders "
                          "into 'file_name'", 'file name', repeated, key='')

    def _check_categories(self) -> None:
        self._require('category', self.categories, ('id', 'name'), "Write 'id' and 'name' of each category")
        ids = [category.get('id') for category in self.categories]
        self.category_of = {identity: place for place, identity in enumerate(ids) if _hashable(identity)}
        self.names = [str(category.get('name')) for category in self.categories]
        if repeated := _repeated([identity for identity in ids if _hashable(identity) and identity is not None]):
            self._problem('several categories have this id', 'Give each an id of its own', 'id', repeated, key='')

    def _check_annotations(self) -> None:
        annotations = self.annotations
        self._require('annotation', annotations, ('id', 'image_id', 'category_id', 'bbox', 'area'),
                      "Write 'id', 'image_id', 'category_id', 'bbox' ([x, y, width, height]) and 'area' (without a "
                      f"mask: width * height). {CONVERTS}")
        self.ids = [annotation.get('id') for annotation in annotations]
        if repeated := _repeated([identity for identity in self.ids if _hashable(identity) and identity is not None]):
            self._problem('several annotations have this id', NUMBER_FROM_1, 'id', repeated, key='')
        self.image = np.array([self.image_of.get(key_of(annotation.get('image_id')), -1) for annotation in annotations],
                              dtype=int)
        self.category = np.array([self.category_of.get(key_of(annotation.get('category_id')), -1)
                                  for annotation in annotations], dtype=int)
        self._check_links('image_id', 'picture', self.image, self.image_of)
        self._check_links('category_id', 'category', self.category, self.category_of)
        self.crowd = np.array([bool(annotation.get('iscrowd')) for annotation in annotations], dtype=bool)
        odd = [annotation.get('id') for annotation in annotations
               if 'iscrowd' in annotation and annotation['iscrowd'] not in (0, 1)]
        if odd:
            self._problem("'iscrowd' is not 0 or 1, and all but 0 counts as a crowd, which is ignored", 'Write 0',
                          'annotation', odd)
        if len(annotations) and self.crowd.all():
            self._problem("'iscrowd' is 1 everywhere: all objects are ignored and nothing is learnt from them",
                          "Write 'iscrowd': 0 for single objects; a mask as RLE may have it, too", 'annotation',
                          self.ids)
        self._check_boxes()

    def _check_links(self, field: str, noun: str, links: np.ndarray, of: dict[Any, int]) -> None:
        unknown = [place for place in np.flatnonzero(links < 0).tolist()
                   if self.annotations[place].get(field) is not None]
        if not unknown:
            return
        values = list(dict.fromkeys(key_of(self.annotations[place][field]) for place in unknown))
        entries = [self.ids[place] for place in unknown]
        known, typed = list(of), {str(identity): identity for identity in of}
        write = f"Write the 'id' of {'an entry of images' if noun == 'picture' else 'a category'}; it has " \
                f'{listed(map(repr, known))}'
        if all(str(value) in typed for value in values):
            write = (f'Write {values[0]!r} as {typed[str(values[0])]!r}: types must agree')
            self._problem(f"'{field}' is of another type than the 'id' that it refers to", write, 'annotation', entries)
        elif noun == 'category':
            numbers = {value for value in values if isinstance(value, int)}
            shift = next((step for step in (1, -1) if numbers and {
                *numbers, *(annotation.get(field) for annotation in self.annotations
                            if isinstance(annotation.get(field), int))} <= {identity - step for identity in of
                                                                            if isinstance(identity, int)}), 0)
            if shift:
                write += f". If all are off by one, add {shift} to each '{field}'"
            self._problem(f"'{field}' {listed(map(repr, values))} is no category's id, and these boxes are left out",
                          write, 'annotation', entries)
        else:
            kind = Problem if len(unknown) == len(links) else Note
            self.findings.append(kind(self.file, f"'{field}' {listed(map(repr, values))} is no picture's id, and these "
                                      'boxes are left out', write, noun='annotation', entries=entries, key='id'))

    def _check_boxes(self) -> None:
        boxes, wrong = np.full((len(self.annotations), 4), np.nan), []
        for place, annotation in enumerate(self.annotations):
            box = annotation.get('bbox')
            if isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_number, box)):
                boxes[place] = box
            elif box is not None:
                wrong.append(self.ids[place])
        if wrong:
            self._problem("'bbox' is not four numbers", 'Write [x, y, width, height] in pixels', 'annotation', wrong)
        self.boxes = boxes
        self.area = np.array([annotation['area'] if is_number(annotation.get('area')) else np.nan
                              for annotation in self.annotations], dtype=float)
        size = np.array([[image.get(key) if is_number(image.get(key)) else np.nan for key in ('width', 'height')]
                         for image in self.images] + [[np.nan, np.nan]], dtype=float)
        self.size = size[self.image]  # place -1: unknown
        with np.errstate(invalid='ignore'):
            self._judge_boxes()

    def _judge_boxes(self) -> None:
        boxes, size, ids = self.boxes, self.size, np.array(self.ids, dtype=object)
        start, extent = boxes[:, :2], boxes[:, 2:]
        known = np.isfinite(boxes).all(1) & (size > 0).all(1)
        inner = np.clip(np.minimum(start + extent, size) - np.maximum(start, 0), 0, None)
        self.outside = known & (inner.prod(1) == 0) & (extent > 0).all(1)
        self.small = np.isfinite(boxes).all(1) & (extent < 1).any(1)
        self.no_area = (self.area <= 0) & ~self.small & ~self.outside
        beyond = known & ((start < -ROUNDING) | (start + extent > size + ROUNDING)).any(1)
        count = max(int(known.sum()), 1)
        fractions = known & (boxes <= 1.0001).all(1) & (boxes >= 0).all(1) & (extent > 0).all(1) & (size > 4).all(1)
        corners = known & (extent > start).all(1) & (start >= -ROUNDING).all(1) & (extent <= size + ROUNDING).all(1)
        told, by_corners = self._told_corners(known)
        if fractions.sum() > count / 2:
            self._problem("'bbox' is in fractions of the picture, where COCO has pixels", 'Multiply x and width by the '
                          "picture's width, y and height by its height (YOLO's x and y are centres: subtract half of "
                          'width and height)', 'annotation', ids[fractions])
        elif corners.sum() >= 0.99 * count and (beyond.sum() > 0.1 * count or by_corners > 0.9 * told):
            self._problem("'bbox' seems to be [x1, y1, x2, y2], where COCO has [x, y, width, height]: all fit into "
                          'their pictures as corners only', 'Write [x1, y1, x2 - x1, y2 - y1]', 'annotation',
                          ids[known])
        else:
            negative = known & (extent < 0).any(1)
            if negative.any():
                self._problem("'bbox' has a negative width or height", 'Write [x, y, width, height] in pixels',
                              'annotation', ids[negative])
            self._share(self.outside, count, 'the box is outside its picture and is left out',
                        "Correct 'bbox', or the picture's size")
            self._share(beyond & ~self.outside, count, 'the box extends beyond its picture and is clipped', "Correct "
                        "'bbox' ([x, y, width, height] in pixels), or the picture's 'width' and 'height'")
            self._share(self.small & ~negative, count, 'the box is narrower than a pixel and is left out',
                        "Correct 'bbox'")
        if self.no_area.any():
            self._problem("'area' is 0, and MMDetection leaves such objects out",
                          'Write the area of the mask, or width * height', 'annotation', ids[self.no_area])

    def _told_corners(self, known: np.ndarray) -> tuple[int, int]:
        """Return of how many boxes polygon or area tell how they are written, and how many of them are corners."""
        told = by_corners = 0
        for place in np.flatnonzero(known)[:_COMPARED].tolist():
            box, parts = self.boxes[place], self.annotations[place].get('segmentation')
            corners, sides = box[2:], box[:2] + box[2:]
            if isinstance(parts, list) and parts and all(isinstance(part, list) and len(part) >= 6 and all(
                    map(is_number, part)) and not len(part) % 2 for part in parts):
                end = np.concatenate([np.reshape(part, (-1, 2)) for part in parts]).max(0)
                as_corners, as_sides = (abs(end - given).max() <= ROUNDING for given in (corners, sides))
            elif self.area[place] > 0:
                as_corners, as_sides = (abs(given.prod() - self.area[place]) <= 0.02 * self.area[place] + 1
                                        for given in (corners - box[:2], box[2:]))
            else:
                continue
            told += as_corners != as_sides
            by_corners += as_corners and not as_sides
        return told, by_corners

    def _share(self, chosen: np.ndarray, count: int, text: str, write: str) -> None:
        """Add a finding: a problem if it is about more than half of the boxes."""
        if chosen.any():
            kind = Problem if chosen.sum() > count / 2 else Note
            self.findings.append(kind(self.file, text, write, noun='annotation', key='id',
                                      entries=np.array(self.ids, dtype=object)[chosen]))


def _hashable(value: Any) -> bool:
    return not isinstance(value, (list, dict))


def key_of(value: Any) -> Any:
    """Return a value that can be looked up, whatever stands in the file."""
    return value if _hashable(value) else str(value)


