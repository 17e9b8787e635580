"""Rules for the picture files of any data set: missing, unreadable, with more than 8 bits, with several frames."""
import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from functools import cache

from mmlocalmamba.openmmlab.checks.findings import Finding, Note, Problem, Tally, listed
from mmlocalmamba.openmmlab.checks.reader import (
    _TURNED,
    Header,
    endings,
    folders_in,
    image_files,
    is_local,
    loaded_range,
    stored_range,
)
from mmlocalmamba.openmmlab.checks.splits import Split
from mmlocalmamba.openmmlab.engine.broken_files import Loader

# Number of pictures of a kind that are decoded to see what becomes of them.
_DECODED = 4
# An 8-bit picture with fewer grey values than this, made of one with more, shows nothing.
_GREY_VALUES = 17


def picture_findings(split: Split, headers: dict[str, Header], skip: int = 0) -> Iterator[Finding]:
    """Yield what is wrong with picture files.

    Args:
        headers: of the pictures.
        skip: number of unreadable files that the training may skip.
    """
    where = split.folder or split.file
    missing = [path for path, header in headers.items() if header.broken == 'it is missing']
    deep = [path for path, header in headers.items() if header.bits > 8 and 'unchanged' not in split.loader.flag]
    wide = [path for path in deep if headers[path].bits > 16]  # float and 32-bit TIFF
    if any(map(split.loader.reads, wide[:_DECODED])):
        wide = []
    broken = [path for path, header in headers.items() if header.broken and header.broken != 'it is missing'] + wide
    kind = Note if split.trains and len(missing) + len(broken) <= skip else Problem
    if missing:
        yield kind(where, 'the file does not exist' + _similar(missing[0]),
                   f'Correct data_root, data_prefix or the names in {split.file}' if split.file else
                   'Correct data_root or data_prefix', noun='picture', entries=missing)
    if broken:
        first = headers[broken[0]]
        yield kind(where, first.broken or f'{split.loader.backend} does not read its {first.bits} bits in colour',
                   'Convert the files to PNG or JPEG, or leave them out', noun='picture', entries=broken)
    yield from _deep(where, split.loader, [path for path in deep if path not in set(wide)])
    several = [path for path, header in headers.items() if header.frames > 1]
    if several:
        yield Note(where, 'the file has several frames, of which only the first is read',
                   'Write each frame as a file if you want them', noun='picture', entries=several)


def _deep(where: str, loader: Loader, paths: list[str]) -> Iterator[Finding]:
    """Yield what becomes of pictures with more than 8 bits for a channel."""
    if not paths:
        return
    write = ('Scale the values of the files to 0 to 255 and write them with 8 bits, or set '
             "LoadImageFromFile(color_type='unchanged') and write a pipeline and data_preprocessor for their values")
    for path in paths[:_DECODED]:
        stored, loaded = stored_range(path), loaded_range(path, loader)
        if loaded is None or stored is not None and _width(loaded) < min(_GREY_VALUES, _width(stored) * 255):
            became = 'nothing' if loaded is None else f'{loaded[0]:g} to {loaded[1]:g}, almost one colour'
            held = '' if stored is None else f' ({stored[0]:g} to {stored[1]:g} in {os.path.basename(path)})'
            yield Problem(where, f'of its values with more than 8 bits{held} reading leaves {became}', write,
                          noun='picture', entries=paths)
            return
    yield Note(where, 'it has more than 8 bits for a channel, and is read with 8', write, noun='picture', entries=paths)


def _width(values: tuple[float, float]) -> float:
    return values[1] - values[0]


def _similar(path: str) -> str:
    """Name a file that differs by the form of its accents, capital letters or ending alone."""
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder or '.')
    except OSError:
        parent = os.path.dirname(folder)
        others = folders_in(parent)
        return f', nor does the folder {folder}' + (f'; {parent} has the folders {listed(others)}' if others else '')
    for other in names:
        if unicodedata.normalize('NFC', other) == unicodedata.normalize('NFC', name):
            return (f', but {ascii(other)} does: its accents have another Unicode form than {ascii(name)} (mim run '
                    'mmlocalmamba to_coco FILE NEW --images FOLDER writes the names that the files have)')
    stem = os.path.splitext(name)[0].lower()
    found = [other for other in names if other.lower() == name.lower()] or [
        other for other in names if os.path.splitext(other)[0].lower() == stem]
    return f', but {found[0]} does' if found else ''


def loaded_size(path: str, header: Header, loader: Loader) -> tuple[int, int]:
    """Return (width, height) of a picture as the pipeline reads it. A turn by EXIF is tried, since formats differ."""
    size = header.width, header.height
    if header.orientation not in _TURNED or not loader.turns or header.width == header.height:
        return size
    if header.format != 'JPEG':
        try:
            array = loader(path)
            return array.shape[1], array.shape[0]
        except Exception:
            return size
    return size[::-1]


def left_out(folder: str, used: Iterable[str]) -> list[str]:
    """Return the image files of a folder that are not among the used ones."""
    if not folder or not is_local(folder) or not os.path.isdir(folder):
        return []
    known = {os.path.abspath(path) for path in used if is_local(path)}
    return sorted(path for path in image_files(folder) if os.path.abspath(path) not in known)


def unlisted(paths: Iterable[str], root: str) -> list[str]:
    """Return the image files beside the given ones, in those of their folders that are below a root."""
    known = {os.path.abspath(path) for path in paths}
    root = os.path.abspath(root or '.')
    places = {place for path in known if (place := os.path.dirname(path)) == root or place.startswith(root + os.sep)}
    return sorted(path for place in places for path in image_files(place, deep=False) if path not in known)


def locations(paths: Iterable[str]) -> dict[str, str]:
    """Return {path with no symbolic link among its folders: path as it is given}, of local files."""
    folder = cache(os.path.realpath)
    return {os.path.join(folder(os.path.dirname(path) or '.'), os.path.basename(path)): path
            for path in paths if path and is_local(path)}


def trained_findings(split: Split, own: dict[str, str], trained: Collection[str]) -> Iterator[Finding]:
    """Yield how many pictures of a validation or test are pictures of the training as well.

    Args:
        own: locations of its pictures.
        trained: locations of the training's pictures.
    """
    both = [path for place, path in own.items() if place in trained]
    where, write = split.file or split.folder, f'Set another data_prefix or ann_file for the {split.name}'
    # Pictures of an unknown data set may be asked for other things.
    if both and len(both) == len(own) and split.kind != 'pictures':
        yield Problem(where, f'all {len(own):,} pictures are training pictures as well, so it cannot show how the '
                             'model does on new ones', write)
    elif both:
        yield Note(where, f'{len(both):,} of {len(own):,} pictures are training pictures as well', write,
                   noun='picture', entries=both)


def by_ending(paths: Iterable[str]) -> str:
    return ', '.join(f'{count} {ending or "without ending"}' for ending, count in endings(paths).items())


def sizes(tally: Tally, headers: dict[str, Header]) -> None:
    """Add the sizes of the pictures and what was read to a table."""
    read = [header for header in headers.values() if not header.broken]
    if read:
        width, height = (_span(getattr(header, side) for header in read) for side in ('width', 'height'))
        modes = sorted({f'{header.mode} {header.bits} bit' for header in read})
        tally.remarks.append(f'width {width}, height {height} pixels; {", ".join(modes)}; {len(read):,} headers read')


def _span(values: Iterable[int]) -> str:
    numbers = set(values)
    return f'{min(numbers)} to {max(numbers)}' if len(numbers) > 1 else f'{min(numbers)}'
