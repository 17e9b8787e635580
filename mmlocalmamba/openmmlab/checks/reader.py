"""Read what files of data hold: headers of images, pixels of label images, lists of folders. Nothing is judged here."""
import gc
import itertools
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from PIL import Image

from mmlocalmamba.openmmlab.engine.broken_files import Loader

# Seconds for the headers of a split, and for the pixels of its label images.
SECONDS_FOR_HEADERS, SECONDS_FOR_PIXELS = 60.0, 20.0
# At least this many label images are read, if there are as many.
_LABEL_IMAGES = 50
# Images that Pillow does not know by their ending.
_OTHER_ENDINGS = {'.heic', '.heif', '.avif', '.jxl', '.dng', '.cr2', '.nef', '.arw', '.exr', '.jfif', '.webp'}
_UNIMPORTANT_ENDINGS = {'.pdf', '.ps', '.eps', '.mpg', '.mpeg', '.h5', '.hdf', '.fit', '.fits', '.emf', '.wmf', '.icns',
                        '.ico', '.cur', '.grib', '.bufr'}
_FRAMES = {'GIF', 'WEBP', 'TIFF'}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_BITS = {'1': 1, 'I': 32, 'F': 32, 'I;16': 16, 'I;16B': 16, 'I;16L': 16, 'I;16N': 16}


@dataclass(frozen=True)
class Header:
    """What the header of an image file says; ``broken`` is the reason if it says nothing.

    Attributes:
        width, height: in pixels, as stored, before a turn by EXIF.
        mode: of Pillow: 'L', 'P', 'RGB', ...
        bits: for each channel.
        orientation: of EXIF, 1 to 8.
        frames: number of pictures in the file.
        format: true format, whatever the name's ending.
    """
    width: int = 0
    height: int = 0
    mode: str = ''
    bits: int = 8
    orientation: int = 1
    frames: int = 1
    format: str = ''
    broken: str = ''


def _bits(image: Image.Image, start: bytes) -> int:
    if image.format == 'PNG':
        return start[24]
    if image.format == 'TIFF':
        return max(np.atleast_1d(image.tag_v2.get(258, 8)).tolist())  # type: ignore[attr-defined]
    return _BITS.get(image.mode, 8)


def read_header(path: str, loader: Loader) -> Header:
    """Read the header of an image. ``loader`` is asked about files that Pillow does not know."""
    try:
        with open(path, 'rb') as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # large images
            start = file.read(32)
            file.seek(0)
            if not start:
                return Header(broken='it is empty')
            image = Image.open(file)
            # getexif() of a PNG decodes its pixels
            exif = image.getexif() if image.format != 'PNG' or 'exif' in image.info else {}
            orientation = exif.get(274, 1) if image.format != 'TIFF' else 1
            return Header(*image.size, mode=image.mode, bits=_bits(image, start), format=str(image.format),
                          orientation=orientation if orientation in range(1, 9) else 1,
                          frames=getattr(image, 'n_frames', 1) if image.format in _FRAMES else 1)
    except OSError as error:
        if not os.path.exists(path):
            return Header(broken='it is missing')
        if error.errno is not None:
            return Header(broken=f'{type(error).__name__}: {error.strerror}')
    except Exception:  # Pillow raises exceptions of many types; the loader decides
        pass
    if not loader.known:
        return Header()
    try:
        array = loader(path)
        assert array is not None
        return Header(array.shape[1], array.shape[0], mode='RGB')
    except Exception:
        kind = f', but {start[8:12].decode("ascii", "replace").strip()}' if start[4:8] == b'ftyp' else ''
        return Header(broken=f'neither Pillow nor {loader.backend} can read it{kind}')


def _mapped(function: Callable[[str], Any], paths: Sequence[str], seconds: float, least: int) -> dict[str, Any]:
    """Return {path: result}, in a fixed random order until the time is over, for at least ``least`` paths."""
    order = np.random.RandomState(0).permutation(len(paths)).tolist()
    end = time.monotonic() + seconds
    results: dict[str, Any] = {}
    with ThreadPoolExecutor(8) as pool:
        for begin in range(0, len(order), least):
            part = [paths[place] for place in order[begin:begin + least]]
            results.update(zip(part, pool.map(function, part)))
            if time.monotonic() > end:
                break
    return results


def read_headers(paths: Iterable[str], loader: Loader) -> dict[str, Header]:
    """Read headers of local files: of all, or of a random part if that takes too long. Missing files are all found."""
    unique = [path for path in dict.fromkeys(paths) if is_local(path)]
    there = existing(unique)
    headers = _mapped(partial(read_header, loader=loader), [path for path in unique if path in there],
                      SECONDS_FOR_HEADERS, 1000)
    return headers | {path: Header(broken='it is missing') for path in unique if path not in there}


def is_local(path: Any) -> bool:
    return isinstance(path, str) and '://' not in path


def existing(paths: Iterable[str]) -> set[str]:
    """Return those paths that exist. Folders are listed once, which is faster than to ask for each file."""
    folders: dict[str, set[str]] = {}
    found = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            try:
                folders[folder] = set(os.listdir(folder or '.'))
            except OSError:
                folders[folder] = set()
        # file systems may not distinguish capital letters
        if name in folders[folder] or os.path.exists(path):
            found.add(path)
    return found


def folders_in(folder: str) -> list[str]:
    """Return the names of the folders in a folder; none if it does not exist."""
    try:
        return sorted(entry.name for entry in os.scandir(folder or '.') if entry.is_dir())
    except OSError:
        return []


def image_files(folder: str, deep: bool = True) -> list[str]:
    """Return the paths of all files in a folder, and with ``deep`` of those in it, whose ending is an image's."""
    Image.init()
    endings = (Image.registered_extensions().keys() | _OTHER_ENDINGS) - _UNIMPORTANT_ENDINGS
    walk = os.walk(folder, followlinks=True)
    return [os.path.join(place, name) for place, _, names in (walk if deep else itertools.islice(walk, 1))
            for name in names if os.path.splitext(name)[1].lower() in endings and not name.startswith('.')]


def count_pixels(path: str) -> dict[int, int] | None:
    """Return {value: number of pixels} of a label image of one channel; None if it cannot be read or has several."""
    try:
        with Image.open(path) as image:
            array = np.asarray(image)
    except Exception:  # Pillow raises exceptions of many types
        return None
    if array.ndim != 2:
        return None
    values, counts = np.unique(array, return_counts=True)
    return dict(zip(map(int, values.tolist()), counts.tolist()))


def read_labels(paths: Sequence[str]) -> dict[str, dict[int, int]]:
    """Count the values of label images: of all, or of a random part if that takes too long."""
    counts = _mapped(count_pixels, list(dict.fromkeys(paths)), SECONDS_FOR_PIXELS, _LABEL_IMAGES)
    return {path: values for path, values in counts.items() if values}


def loaded_range(path: str, loader: Loader) -> tuple[float, float] | None:
    """Return the smallest and the largest value of an image as the pipeline reads it; None if it cannot."""
    try:
        array = loader(path)
        return float(array.min()), float(array.max())
    except Exception:
        return None


def stored_range(path: str) -> tuple[float, float] | None:
    """Return the smallest and the largest value that an image file holds."""
    try:
        array = mmcv.imfrombytes(Path(path).read_bytes(), flag='unchanged', backend='cv2')
        return float(array.min()), float(array.max())
    except Exception:
        return None


def read_json(path: str) -> Any:
    """Parse a file. The garbage collector waits: it would look at millions of new objects again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with open(path, encoding='utf-8-sig') as file:
            return json.load(file)
    finally:
        if collects:
            gc.enable()


def stamp(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return (path, size, time of change) of files; missing ones have -1."""
    stamps = []
    for path in paths:
        try:
            status = os.stat(path)
            stamps.append((path, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append((path, -1, -1))
    return stamps


def endings(paths: Iterable[str]) -> dict[str, int]:
    """Return {ending: number of files}, the most frequent first. Capital letters count."""
    return dict(Counter(os.path.splitext(path)[1] for path in paths).most_common())
