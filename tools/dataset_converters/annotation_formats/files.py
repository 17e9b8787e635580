"""Find files and pictures, count what is lost, and hold what a reader finds."""
import json
import os
import re
import unicodedata
import urllib.parse
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from PIL import ExifTags, Image

PICTURES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.dib', '.tif', '.tiff', '.webp', '.gif', '.ppm', '.pgm',
            '.pbm', '.pnm', '.jp2', '.avif', '.heic', '.heif')
NAME_FILES = ('classes.txt', 'obj.names', 'names.txt', '_darknet.labels')
Image.MAX_IMAGE_PIXELS = None  # only headers are read


class Log:
    """Count what is changed, left out or worth knowing, and keep the first places of each."""

    def __init__(self, examples=3):
        self.examples, self.counts, self.places = examples, Counter(), defaultdict(list)

    def add(self, group, what, where):
        self.counts[group, what] += 1
        if len(self.places[group, what]) < self.examples:
            self.places[group, what].append(str(where))

    def changed(self, what, where):
        self.add('changed', what, where)

    def left_out(self, what, where):
        self.add('left out', what, where)

    def note(self, what, where):
        self.add('note', what, where)

    def lines(self):
        for group in ('changed', 'left out', 'note'):
            for (own, what), count in self.counts.items():
                if own == group:
                    places = self.places[group, what]
                    yield f'{group:9} {what}: {count} ({"; ".join(places)}{"; ..." * (count > len(places))})'


@dataclass
class Thing:
    """An object. ``box`` is x, y, width, height; ``entry`` has other fields of COCO."""
    where: str
    name: str
    box: Any = None
    segmentation: Any = None
    entry: dict = field(default_factory=dict)


@dataclass
class Picture:
    """``stored`` is (width, height) in the file, ``declared`` that of the annotations, or None."""
    path: Path
    split: str
    stored: tuple
    orientation: int
    declared: tuple | None = None
    things: list = field(default_factory=list)
    entry: dict = field(default_factory=dict)

    @property
    def shown(self):
        """Width and height after the rotation by EXIF, which MMDetection applies."""
        return self.stored[::-1] if self.orientation > 4 else self.stored


@dataclass
class Source:
    """What a reader found. ``categories`` are in the order of the source."""
    pictures: list
    categories: list
    header: dict = field(default_factory=dict)


# ---- files ----

def walk(folder):
    """Return the files below a folder, sorted; hidden ones are not read, linked folders are read once."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.') and name != '__MACOSX')
        found += [Path(parent, name) for name in sorted(files) if not name.startswith('.')]
    return found


def read_text(path):
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise SystemExit(f'{path} is not UTF-8 ({error}): save it as UTF-8') from error


def read_json(path):
    """Return the contents of a JSON file.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f'{path} is not JSON ({error})') from error


def is_picture(path):
    return path.suffix.lower() in PICTURES


def key(name):
    """Return a file name in one form of Unicode, since macOS decomposes accents."""
    return unicodedata.normalize('NFC', name)


def split_of(path, root):
    """Return train, val, test or '': the first folder below ``root`` that is named like one."""
    for part in Path(os.path.relpath(path, root)).parts[:-1]:
        match = re.fullmatch(r'(train|val|test)(ing|id|idation|\d{4})?', part.lower())
        if match:
            return match[1]
    return ''


class Pictures:
    """The pictures below some folders, by name."""

    def __init__(self, folders, log):
        self.log, self.used = log, set()
        self.paths = list(dict.fromkeys(
            path for folder in folders for path in walk(folder) if is_picture(path)))
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for path in self.paths:
            self.by_name[key(path.name)].append(path)
            self.by_stem[key(path.stem).lower()].append(path)

    def find(self, name, near):
        """Return the picture that an annotation file in the folder ``near`` calls ``name``; None if there is none.

        Raises:
            LookupError: several pictures fit equally well.
        """
        names = [PureWindowsPath(text).as_posix() for text in (name, urllib.parse.unquote(name))]
        for text in names:
            path = Path(os.path.normpath(near / text))
            if path.is_file():
                return path
        for text in map(Path, names):
            for candidates in (self.by_name.get(key(text.name)), self.by_stem.get(key(text.stem).lower())):
                if candidates:
                    best = _nearest(candidates, text, near)
                    if len(best) > 1:
                        raise LookupError(f'{text} may be {best[0]} or {best[1]}')
                    if best[0].suffix != text.suffix:
                        self.log.changed('file names got the ending of the picture', f'{text} -> {best[0].name}')
                    return best[0]
        return None

    def of(self, annotations, name):
        """Return the picture of an annotation file: that of the file's own name, or else ``name``; None, logged."""
        own = _nearest(self.by_stem.get(key(annotations.stem).lower(), []), annotations, annotations.parent)
        try:
            named = self.find(name, annotations.parent) if name else None
            if named is None or named in own:
                path = named or (own[0] if own else None)
            else:
                path = own[0] if own else named
            if len(own) > 1 and path is not named:
                raise LookupError(f'{own[0]} or {own[1]}')
        except LookupError as error:
            self.log.left_out('annotation files, because several pictures fit', f'{annotations}: {error}')
            return None
        if path is None:
            self.log.left_out('annotation files without a picture', annotations)
        elif named not in (None, path):
            self.log.note('annotation files name a picture of another name; the picture with their own name is taken',
                          f'{annotations} names {name}')
        return path

    def open(self, path, split, **fields):
        """Return the Picture of a path, or None, logged, if its header cannot be read."""
        self.used.add(path)
        try:
            with Image.open(path) as image:
                return Picture(path, split, image.size, orientation_of(image), **fields)
        except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's for a broken PNG
            self.log.left_out('pictures that cannot be read', f'{path} ({error})')
            return None


def orientation_of(image):
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _nearest(candidates, name, near):
    """Return the candidates that share most folders with a name, and then with the folder of its annotation file."""
    scores = [(_common_end(path, name), _common_end(path, near / name)) for path in candidates]
    return [path for path, score in zip(candidates, scores) if score == max(scores)]


def _common_end(path, other):
    """Return how many last folders two paths share."""
    count = 0
    for one, two in zip(reversed(path.parent.parts), reversed(other.parent.parts)):
        if key(one) != key(two):
            break
        count += 1
    return count


def folders_of(root, args):
    """Return folders in which pictures are looked for."""
    if args.images:
        return [args.images]
    return [root] if any(map(is_picture, walk(root))) else [root.parent]


def add_unlabelled(pictures, found, root, args, log, what):
    """Keep or leave out the pictures without annotations."""
    for path in found.paths:
        if path not in found.used:
            if args.unlabelled == 'keep':
                picture = found.open(path, split_of(path, root))
                if picture:
                    log.note(f'pictures without {what}, kept as pictures without objects', path)
                    pictures.append(picture)
            else:
                log.left_out(f'pictures without {what} (--unlabelled keep takes them as pictures without objects)',
                             path)


def names_in(path):
    """Return the class names of a file, one a line."""
    names = [line.strip() for line in read_text(path).split('\n')]
    while names and not names[-1]:
        names.pop()
    if '' in names:
        raise SystemExit(f'{path}:{names.index("") + 1}: the line is empty, but line N names class N - 1: write a name')
    return names


# ---- what several formats share ----

def frame_size(picture, args):
    """Return the size of the picture on which objects without a declared size were drawn."""
    return picture.stored if args.exif == 'stored' else picture.shown


def to_xywh(values, form):
    """Return x, y, width, height of a box in the form xywh, xyxy or cxcywh."""
    one, two, three, four = values
    return {'xywh': [one, two, three, four], 'xyxy': [one, two, three - one, four - two],
            'cxcywh': [one - three / 2, two - four / 2, three, four]}[form]


def declared_size(size):
    """Return (width, height), or None if one is missing or not positive."""
    try:
        width, height = (int(float(side)) for side in size)
    except (TypeError, ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def categories_of(names, root):
    """Return categories in the order of labelmap.txt (CVAT) or labels.txt (LabelMe), then of the alphabet."""
    listed = []
    for name in ('labelmap.txt', 'labels.txt'):
        if (root / name).is_file():
            listed += [line.split(':')[0].strip() for line in read_text(root / name).splitlines()
                       if not line.startswith('#')]
    listed = [name for name in dict.fromkeys(listed) if name in names]
    return [dict(name=name) for name in (*listed, *sorted(names - set(listed)))]


def clean_name(name, where, log):
    """Return a class name without spaces around it, in one form of Unicode."""
    clean = unicodedata.normalize('NFC', str(name)).strip().strip('\ufeff').strip()
    if clean != name:
        log.changed('class names without spaces around them, in one form of Unicode', f'{where}: {name!r} -> {clean!r}')
    return clean


def is_below(path, place):
    """Return True if a path is ``place``, or in it."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(place))
