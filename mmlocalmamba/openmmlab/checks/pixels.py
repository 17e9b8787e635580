"""Rules for label images of semantic segmentation."""
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mmlocalmamba.openmmlab.checks.findings import Finding, Note, Problem, Tally, absent_classes, listed
from mmlocalmamba.openmmlab.checks.pictures import by_ending, left_out, loaded_size
from mmlocalmamba.openmmlab.checks.reader import Header
from mmlocalmamba.openmmlab.checks.splits import Split

_IGNORED = 255
_ONE_CHANNEL = ('1', 'L', 'P', 'I', 'I;16', 'I;16B', 'I;16L', 'I;16N')
_SET_REDUCE = ('reduce_zero_label={} in each data set and in LoadAnnotations of both pipelines')
# Names of what lies between the other classes: the label 0, if they are the first.
_BACKGROUND = re.compile(r'\b(background|bg|other|rest|void|none|unlabell?ed)\b', re.IGNORECASE)
# Share of pixels from which on the label 0 counts as a class.
_SHARE = 0.01


def _meaning(split: Split, value: int) -> int:
    """Return the class number that mmseg makes of a label; 255 is ignored."""
    value %= 256  # mmseg keeps 8 bits
    if split.options['reduce_zero_label']:
        value = _IGNORED if value in (0, _IGNORED) else value - 1
    return (split.options['label_map'] or {}).get(value, value)


def audit_pixels(split: Split, headers: dict[str, Header], labels: dict[str, Header],
                 pixels: dict[str, dict[int, int]], skip: int = 0) -> tuple[list[Finding], Tally]:
    """Return the findings of label images, and the table.

    Args:
        headers: of the pictures.
        labels: headers of the label images.
        pixels: {label image: {value: count}} of those that were read.
        skip: number of unreadable files that the training may skip.
    """
    tally = Tally(split.title, 'pixels', (split.count, split.count))
    findings = list(_files(split, headers, labels, skip))
    others = left_out(split.whole_folder, [*split.pictures, *split.labels])
    if others:
        tally.left_out.update(Counter(f'end in {ending}, not in {split.options["img_suffix"]}'
                                      for ending in map(_ending, others)))
        tally.pictures = split.count + len(others), split.count
        findings.append(Note(split.folder, f"img_suffix is '{split.options['img_suffix']}', so these are left out "
                                           f'({by_ending(others)})', 'Rename them to one ending, or join a data set '
                             'for each with ConcatDataset', noun='picture', entries=others))
    for reduces in {*split.options['pipeline_reduces']} - {split.options['reduce_zero_label']}:
        findings.append(Problem(split.folder, f'reduce_zero_label is {split.options["reduce_zero_label"]} in the data '
                                              f'set, but {reduces} in LoadAnnotations',
                                f'Set {_SET_REDUCE.format("True or False")}'))
    if split.classes and split.options['loader'].known:
        findings += _classes(split, tally, pixels)
    return findings, tally


def _ending(path: str) -> str:
    return f'.{path.rsplit(".", 1)[-1]}'


def _files(split: Split, headers: dict[str, Header], labels: dict[str, Header], skip: int) -> Iterator[Finding]:
    """Yield label images that are missing, unreadable, of several channels or of another size than the picture."""
    where = split.options['label_folder'] or split.folder
    missing = [path for path, header in labels.items() if header.broken == 'it is missing']
    broken = [path for path, header in labels.items() if header.broken and header.broken != 'it is missing']
    kind = Note if split.trains and len(missing) + len(broken) <= skip else Problem
    if missing:
        yield kind(where, 'a picture has no label image of this name', 'Give each picture a label image of the same '
                      f"name with the ending '{split.options['seg_map_suffix']}', or set img_suffix and seg_map_suffix",
                      noun='label image', entries=missing)
    if broken:
        yield kind(where, labels[broken[0]].broken, 'Write the label image as PNG', noun='label image',
                      entries=broken)
    loader = split.options['loader']
    colours = [path for path, header in labels.items()
               if loader.known and not header.broken and header.mode not in _ONE_CHANNEL]
    if colours:
        yield Problem(where, f'its mode is {labels[colours[0]].mode}, but labels need one channel',
                      'Write the number of the class as the value of each pixel. mim run mmlocalmamba '
                      'label_images MASKS LABELS --colors FILE does so; a line of FILE is name:R,G,B, such as '
                      "sky:0,0,255, as in CVAT's labelmap.txt",
                      noun='label image', entries=colours)
    palettes = [path for path, header in labels.items() if header.mode == 'P']
    if palettes and loader.backend != 'pillow':
        yield Problem(where, f'it has a palette, and imdecode_backend={loader.backend!r} reads colours',
                      "Set LoadAnnotations(imdecode_backend='pillow')", noun='label image', entries=palettes)
    other = []
    for picture, label in zip(split.pictures, split.labels):
        header, own = headers.get(picture), labels.get(label)
        if header and own and not header.broken and not own.broken:
            size = loaded_size(picture, header, split.loader)
            if size != (own.width, own.height):
                turned = ', since EXIF turns it' if size != (header.width, header.height) else ''
                other.append((label, f'{own.width}x{own.height}', f'{"x".join(map(str, size))}', turned))
    if other:
        _, own_size, picture_size, turned = other[0]
        yield Problem(where, f'its size is {own_size}, but the picture has {picture_size} when it is loaded{turned}',
                      'Turn the pixels of the pictures in the files (PIL.ImageOps.exif_transpose), or the label images'
                      if turned else 'Resize the label image to the picture with PIL.Image.NEAREST, or use the picture '
                                     'that was labelled', noun='label image', entries=[path for path, *_ in other])


def _classes(split: Split, tally: Tally, pixels: dict[str, dict[int, int]]) -> Iterator[Finding]:
    """Yield labels of no class and classes without labels; fill the table."""
    classes = split.classes or ()
    total: Counter[int] = Counter()
    for values in pixels.values():
        total.update(values)
    whole = len(pixels) == len({*split.labels})
    of_all = '' if whole else f' of {len({*split.labels}):,}, at random'
    tally.remarks.append(f'pixels of {len(pixels):,} label images read{of_all}')
    counts: Counter[int] = Counter()
    for value, count in total.items():
        counts[_meaning(split, value)] += count
    for number, name in enumerate(classes):
        tally.classes[str(name)] = [counts[number], counts[number]]
    tally.reasons['ignored (255)'] = counts[_IGNORED]
    if not total:
        return
    reduces, where = split.options['reduce_zero_label'], split.folder
    raw = sorted(total)
    deep = [path for path, values in pixels.items() if any(value > 255 or value < 0 for value in values)]
    if deep:
        yield Problem(where, f'labels of more than 8 bits, up to {max(raw)}: MMSegmentation keeps the lower 8 bits, '
                             'which are other classes', 'Write labels 0 to 254, and 255 for what is ignored',
                      noun='label image', entries=deep)
        return
    wrong = [value for value in raw if _meaning(split, value) != _IGNORED and _meaning(split, value) >= len(classes)]
    if wrong:
        paths = [path for path, values in pixels.items() if values.keys() & set(wrong)]
        yield Problem(where, f'has the label{"s" * (len(wrong) > 1)} {listed(wrong)}, but the {len(classes)} classes '
                             f'are the labels {_range(split)}', _remedy(split, total, wrong), noun='label image',
                      entries=paths)
        return
    present = [number for number in range(len(classes)) if counts[number]]
    if len(present) <= 1 < len(classes):
        only = f'the class {classes[present[0]]!r} alone has' if present else 'no class has'
        kind = Problem if whole and not split.partial and not split.name.startswith('test') else Note
        yield kind(where, f'{only} pixels, {counts[_IGNORED]:,} pixels are ignored; the labels are {listed(raw)} '
                          f'with reduce_zero_label={reduces}: any network is right everywhere, and nothing is learnt',
                   _lonely(split, total))
    elif reduces and whole and split.trains and len(present) == len(classes) - 1 == present[-1] + 1 and (
            total[0] > _SHARE * sum(total.values())):
        yield Problem(where, f'the labels are {_span(raw)} for {len(classes)} classes, but reduce_zero_label=True '
                             'takes 1 '
                             f'to {len(classes)}: label 0 is ignored, and every label gets the name of the class '
                             'before',
                      f'If the labels begin with 0, set {_SET_REDUCE.format(False)}. If {classes[-1]!r} has no pixels, '
                      'remove the class')
    elif whole and split.trains and not split.partial and (absent := absent_classes(tally, map(str, classes))):
        hint = ('. If the labels begin with 0, set ' + _SET_REDUCE.format(False)) if reduces and total[0] else ''
        yield Note(where, 'no pixel is of this class', f'Label it, or remove the class{hint}', noun='class',
                   entries=absent)


def _range(split: Split) -> str:
    classes = len(split.classes or ())
    return (f'1 to {classes} with reduce_zero_label=True (0 and 255 are ignored)' if split.options['reduce_zero_label']
            else f'0 to {classes - 1} (255 is ignored)')


def _span(raw: list[int]) -> str:
    raw = [value for value in raw if value != _IGNORED]
    return f'{raw[0]} to {raw[-1]}' if raw == list(range(raw[0], raw[-1] + 1)) else listed(raw)


def _remedy(split: Split, total: dict[int, int], wrong: list[int]) -> str:
    classes, reduces = split.classes or (), split.options['reduce_zero_label']
    if not reduces and wrong == [len(classes)] and 0 not in total:
        return f'The labels begin with 1: set {_SET_REDUCE.format(True)}'
    first = len(classes) + reduces  # the first label without a name
    named = f'{"a name" if len(wrong) == 1 else "names"} for the label{"s" * (len(wrong) > 1)} {listed(wrong)}'
    if wrong != list(range(first, first + len(wrong))):
        return f'Correct the label images, or give metainfo.classes a name for each label up to {wrong[-1]}, and the ' \
               'model as many classes'
    if not reduces and wrong == [first] and classes and not _BACKGROUND.search(str(classes[0])):
        # The name that is missing may be the first one, which shifts all others.
        return ('The name of a class is missing in metainfo.classes, whose first name, '
                f"{classes[0]!r}, is that of label 0. If label 0 is the background, write 'background' first; if label "
                f'{first} is another class, write its name last; and give the model {first + 1} classes. If label 0 is '
                f'no class, set {_SET_REDUCE.format(True)} instead')
    return f'Write {named} at the end of metainfo.classes, and give the model {len(classes) + len(wrong)} classes'


def _lonely(split: Split, total: dict[int, int]) -> str:
    values = {value for value in total if value != _IGNORED}
    count = len(split.classes or ())
    if split.options['reduce_zero_label'] and values and max(values) < count and 0 in values and len(values) > 1:
        return f'The labels begin with 0: set {_SET_REDUCE.format(False)}'
    if _IGNORED in total:
        return (f'255 is ignored. If it is a class, write its number: 1 for the second of {count} classes '
                'with reduce_zero_label=False')
    return 'Write the number of the class as the value of each pixel'


def head_findings(split: Split, head: Any) -> Iterator[Finding]:
    """Yield a problem for a single class that a head cannot learn: softmax of one number is 1."""
    if len(split.classes or ()) == 1 and getattr(head, 'out_channels', 1) == 1 and not any(
            getattr(part, 'use_sigmoid', False) for part in _losses(head)):
        yield Problem(split.folder, 'there is one class, and softmax of one is always right', 'Add the background as a '
                      'class, or use out_channels=1 with a loss of use_sigmoid=True')


def _losses(head: Any) -> list[Any]:
    losses = getattr(head, 'loss_decode', [])
    try:
        return list(losses)
    except TypeError:
        return [losses]
