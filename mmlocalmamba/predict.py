"""Predictions for picture files: ``python -m mmlocalmamba predict``. The results are drawn, and written as JSON.

Classifiers of this package run here; :mod:`mmlocalmamba.openmmlab.inference` runs the models of configurations.
Pictures need Pillow. With rich installed there is a progress bar.
"""
import colorsys
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from mmlocalmamba.files import SCHEME, write_whole
from mmlocalmamba.models import create_model
from mmlocalmamba.weights.loading import load_checkpoint, read
from mmlocalmamba.weights.released import IMAGENET, NAMED, Weights

_TOP = 5  # classes of a picture in its JSON
_DRAWN = 3  # classes below a drawn picture
_SMALLEST, _LARGEST = 384, 1600  # longer side of a drawn picture in pixels
_UNNAMED = 'class {}'


class Found(NamedTuple):
    """An object.

    Attributes:
        label: class number.
        score: 0 to 1.
        box: x1, y1, x2, y2 in pixels.
        mask: (H, W), bool, or None.
        code: the mask in COCO's run-length code, or None.
    """
    label: int
    score: float
    box: list[float]
    mask: np.ndarray | None = None
    code: dict[str, Any] | None = None


@dataclass
class Result:
    """What a model says about a picture: one of the three.

    Attributes:
        classes: (class number, score), best first.
        objects: those of a detector, best first; None for other models.
        labels: (H, W) class numbers of a segmentor.
    """
    classes: list[tuple[int, float]] = field(default_factory=list)
    objects: list[Found] | None = None
    labels: np.ndarray | None = None


@dataclass
class Predictor:
    """A model for pictures.

    Attributes:
        run: function of a picture that :func:`read_picture` returns.
        names: class names; numbers stand in for a name that is missing.
        channels: of the pictures: 1 (grey), 3 (red, green, blue) or more.
        palette: colour of each class (0 to 255), or None.
    """
    run: Callable[[Image.Image], Result]
    names: Sequence[str]
    channels: int = 3
    palette: Sequence[Sequence[int]] | None = None

    def name(self, label: int) -> str:
        return str(self.names[label]) if label < len(self.names) else _UNNAMED.format(label)

    def color(self, label: int) -> tuple[int, int, int]:
        if self.palette is not None and label < len(self.palette):
            red, green, blue = self.palette[label]
            return red, green, blue
        # Steps of the golden ratio keep neighbouring numbers apart.
        color = colorsys.hsv_to_rgb(0.61803 * label % 1, 0.75, 0.9)
        return int(255 * color[0]), int(255 * color[1]), int(255 * color[2])


# ---- pictures ----


class Picture(NamedTuple):
    """A file, and its name relative to the folder that was given."""
    path: Path
    name: Path


def find_pictures(paths: Sequence[str], out: Path | None = None) -> tuple[list[Picture], list[str]]:
    """Find the files to predict.

    Args:
        paths: pictures and folders; folders are searched with all that is below them.
        out: folder of the results, which is not searched; None for no folder.

    Returns:
        Pictures, and a line for each file with an ending that Pillow does not read.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures, others = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(2, 'there is no such picture or folder', str(path))
        if not path.is_dir():
            pictures.append(Picture(path, Path(path.name)))
            continue
        for file in sorted(path.rglob('*')):
            if file.is_dir() or out is not None and out.resolve() in file.resolve().parents:
                continue
            if file.suffix.lower() in endings:
                pictures.append(Picture(file, file.relative_to(path)))
            else:
                others.append(f'{file}: Pillow reads no picture with this ending')
    return pictures, others


def read_picture(path: Path, channels: int) -> Image.Image:
    """Read a picture, upright, with the channels of a model.

    Raises:
        ValueError: it cannot be read, or has other channels, where there are neither 1 nor 3.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path}: {error}') from None
    if channels in (1, 3):
        if picture.mode.startswith('I') or picture.mode == 'F':  # Pillow would cut off all above 255
            values = np.asarray(picture, dtype=np.float64)
            span = values.max() - values.min()
            picture = Image.fromarray(np.uint8(255 * (values - values.min()) / (span or 1)))
        return picture.convert('L' if channels == 1 else 'RGB')
    if len(picture.getbands()) != channels:
        raise ValueError(f'{path}: it has {len(picture.getbands())} channels, but the model reads {channels}')
    return picture


# ---- drawing ----


@cache
def _font(size: int) -> Any:
    """Return matplotlib's font, if it is installed: Pillow's own has few letters besides ASCII."""
    spec = find_spec('matplotlib')
    if spec is not None and spec.origin:
        with suppress(OSError, ImportError):  # other files, or a Pillow without FreeType
            return ImageFont.truetype(str(Path(spec.origin).parent / 'mpl-data/fonts/ttf/DejaVuSans.ttf'), size)
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1
        return ImageFont.load_default()


def _place(box: Sequence[float], width: float, height: float, size: tuple[int, int],
           taken: list[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Return the first free place of a label: above its box, below it, or inside at an edge."""
    left = min(max(0, box[0]), max(0, size[0] - width))
    tops = [box[1] - height, box[3], box[1], box[3] - height]
    within = [min(max(0, top), size[1] - height) for top in tops]
    free = [top for top in within
            if not any(abs(top - other[1]) < height and left < other[2] and other[0] < left + width for other in taken)]
    return left, (free or within)[0]


def draw(picture: Image.Image, result: Result, predictor: Predictor) -> Image.Image:
    """Draw a result on a copy of its picture, which is enlarged or reduced for the eye."""
    factor = max(1, _SMALLEST / max(picture.size)) * min(1, _LARGEST / max(picture.size))
    size = max(1, round(factor * picture.width)), max(1, round(factor * picture.height))
    shown = picture if len(picture.getbands()) in (1, 3) else picture.convert('RGB')
    canvas = shown.convert('RGB').resize(size, Image.Resampling.NEAREST if factor >= 4 else Image.Resampling.LANCZOS)
    font = _font(max(13, round(max(size) / 45)))
    if result.labels is not None:
        return _draw_labels(canvas, result.labels, predictor, font)
    if result.objects is not None:
        return _draw_objects(canvas, result.objects, predictor, factor, font)
    lines = [f'{score:6.1%}  {predictor.name(label)}' for label, score in result.classes[:_DRAWN]]
    return _with_lines(canvas, [(line, None) for line in lines], font)


def _with_lines(canvas: Image.Image, lines: Sequence[tuple[str, tuple[int, int, int] | None]], font: Any
                ) -> Image.Image:
    """Put lines of text, each behind a square of its colour, below a picture."""
    height = round(1.4 * font.size) if hasattr(font, 'size') else 16
    pen = ImageDraw.Draw(canvas)
    width = max([canvas.width, *(round(pen.textlength(line, font=font)) + height + 14 for line, _ in lines)])
    whole = Image.new('RGB', (width, canvas.height + height * len(lines) + 6), 'white')
    whole.paste(canvas)
    pen = ImageDraw.Draw(whole)
    for row, (line, color) in enumerate(lines):
        top = canvas.height + 3 + height * row
        if color is not None:
            pen.rectangle((6, top + 3, height, top + height - 3), fill=color)
        pen.text((6 if color is None else height + 8, top), line, fill='black', font=font)
    return whole


def _draw_labels(canvas: Image.Image, labels: np.ndarray, predictor: Predictor, font: Any) -> Image.Image:
    found = [(label, share) for label, share in _shares(labels) if predictor.name(label) != 'background']
    colors = np.array([predictor.color(label) for label in range(int(labels.max()) + 1)], dtype=np.uint8)
    over = Image.fromarray(colors[labels]).resize(canvas.size, Image.Resampling.NEAREST)
    where = np.uint8(140 * np.isin(labels, [label for label, _ in found]))
    canvas.paste(over, mask=Image.fromarray(where).resize(canvas.size, Image.Resampling.NEAREST))
    return _with_lines(canvas, [(f'{predictor.name(label)}  {share:.1%}', predictor.color(label))
                                for label, share in found[:8]], font)


def _draw_objects(canvas: Image.Image, objects: Sequence[Found], predictor: Predictor, factor: float, font: Any
                  ) -> Image.Image:
    for found in reversed(objects):  # the best on top
        if found.mask is not None:
            over = Image.fromarray(np.uint8(110 * found.mask)).resize(canvas.size, Image.Resampling.BILINEAR)
            canvas.paste(Image.new('RGB', canvas.size, predictor.color(found.label)), mask=over)
    pen = ImageDraw.Draw(canvas)
    for found in reversed(objects):
        pen.rectangle([factor * side for side in found.box], outline=predictor.color(found.label),
                      width=max(2, max(canvas.size) // 400))
    taken: list[tuple[float, float, float, float]] = []
    for found in objects:
        text = f'{predictor.name(found.label)} {found.score:.2f}'
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        width, height = right - left + 6, bottom - top + 6
        x, y = _place([factor * side for side in found.box], width, height, canvas.size, taken)
        pen.rectangle((x, y, x + width, y + height), fill=predictor.color(found.label))
        pen.text((x + 3 - left, y + 3 - top), text, fill='white', font=font)
        taken.append((x, y, x + width, y + height))
    return canvas


def _shares(labels: np.ndarray) -> list[tuple[int, float]]:
    """Return (class number, share of the pixels), the largest first."""
    numbers, counts = np.unique(labels, return_counts=True)
    return sorted(zip(numbers.tolist(), (counts / labels.size).tolist()), key=lambda pair: -pair[1])


# ---- results ----


def as_json(result: Result, predictor: Predictor) -> dict[str, Any]:
    """Return a result as values that JSON holds."""
    if result.labels is not None:
        return dict(classes=[dict(label=label, name=predictor.name(label), share=share)
                             for label, share in _shares(result.labels)])
    if result.objects is not None:
        return dict(objects=[
            dict(label=found.label, name=predictor.name(found.label), score=found.score, box=found.box,
                 **({} if found.code is None else dict(mask=found.code))) for found in result.objects])
    return dict(classes=[dict(label=label, name=predictor.name(label), score=score)
                         for label, score in result.classes])


def _stem(name: Path, taken: set[Path]) -> Path:
    """Return a name for the results of a picture that no other has."""
    stem, number = name.with_suffix(''), 1
    while stem in taken:
        number += 1
        stem = name.with_name(f'{name.stem}_{number}')
    taken.add(stem)
    return stem


def _tracked(pictures: Sequence[Picture]) -> Iterable[Picture]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return pictures
    return track(pictures, description='Predicting', console=Console(stderr=True))


def predict_files(predictor: Predictor, paths: Sequence[str], out: Path) -> bool:
    """Predict pictures; write a drawn one (.jpg) and a .json for each, and for segmentors class numbers (.png).

    Args:
        predictor: the model.
        paths: pictures and folders.
        out: folder of the results; below it they lie as the pictures below the given folders.

    Returns:
        False if a picture could not be read, or there is none.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    pictures, others = find_pictures(paths, out)
    broken: list[str] = []
    taken: set[Path] = set()
    objects = None
    for picture in _tracked(pictures):
        try:
            pixels = read_picture(picture.path, predictor.channels)
        except ValueError as error:
            broken.append(str(error))
            continue
        result = predictor.run(pixels)
        if result.objects is not None:
            objects = (objects or 0) + len(result.objects)
        stem = out / _stem(picture.name, taken)
        content = dict(picture=str(picture.path), width=pixels.width, height=pixels.height,
                       **as_json(result, predictor))
        if result.labels is not None:
            numbers = Image.fromarray(result.labels.astype(np.uint8 if result.labels.max() < 256 else np.uint16))
            content['labels'] = f'{stem.name}_labels.png'
            _save(stem.with_name(content['labels']), numbers, 'PNG')
        _save(stem.with_name(f'{stem.name}.jpg'), draw(pixels, result, predictor), 'JPEG', quality=92, subsampling=0)
        write_whole(str(stem.with_name(f'{stem.name}.json')), json.dumps(content, indent=1) + '\n')
    done = len(pictures) - len(broken)
    found = '' if objects is None else f', {objects} object{"s" * (objects != 1)} found'
    print(f'{done} picture{"s" * (done != 1)} predicted{found}: {out}')
    if objects == 0:
        print('--score 0.05 also finds objects of which the model is less sure')
    for title, lines in (('left out', others), ('not read', broken)):
        if lines:
            print(f'{len(lines)} {title}:', *lines[:10], *(['...'] if len(lines) > 10 else []), sep='\n  ')
    return bool(done) and not broken


def _save(path: Path, picture: Image.Image, kind: str, **options: Any) -> None:
    write_whole(str(path), lambda file: picture.save(file, kind, **options))


# ---- classifiers of this package ----


def class_names(weights: Weights) -> Sequence[str]:
    """Return the names of ImageNet's classes from torchvision, if it is installed; an empty list for other data."""
    if weights.dataset != IMAGENET:
        return []
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        print('torchvision, which has the names of ImageNet\'s classes, is not installed: numbers stand for them',
              file=sys.stderr)
        return []
    return ResNet18_Weights.DEFAULT.meta['categories']


def classifier(name: str, checkpoint: str | None = None, device: str = 'cpu') -> Predictor:
    """Return a classifier of this package, for pictures.

    Args:
        name: see :func:`mmlocalmamba.list_models`.
        checkpoint: file, URL or name; None for the weights that ``name`` stands for.
        device: torch device.

    Raises:
        ValueError, RuntimeError: as :func:`mmlocalmamba.create_model`; or the checkpoint has no head.
    """
    weights = NAMED.get(name, Weights('', '', model=name))
    source = checkpoint or SCHEME + name
    loaded = load_checkpoint(source)
    head = read(loaded).weights.get('head.fc.weight')
    if head is None:
        raise ValueError(f'{source} has no head of a classifier')
    model = create_model(name, pretrained=source, num_classes=len(head)).eval().to(device)
    names = (loaded.get('meta') or {}).get('dataset_meta', {}).get('classes')
    if names is None:
        names = class_names(weights) if len(head) == weights.num_classes else []
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (weights.mean, weights.std))

    @torch.no_grad()
    def run(picture: Image.Image) -> Result:
        factor = weights.resize / min(picture.size)
        picture = picture.resize((max(weights.size, round(factor * picture.width)),
                                  max(weights.size, round(factor * picture.height))), Image.Resampling.BICUBIC)
        left, top = (picture.width - weights.size) // 2, (picture.height - weights.size) // 2
        pixels = np.asarray(picture.crop((left, top, left + weights.size, top + weights.size)), dtype=np.float32)
        images = (torch.from_numpy(pixels).permute(2, 0, 1) - mean) / std
        scores, labels = model(images[None].to(device))[0].softmax(0).topk(min(_TOP, len(head)))
        return Result(classes=list(zip(labels.tolist(), scores.tolist())))

    return Predictor(run, names)
