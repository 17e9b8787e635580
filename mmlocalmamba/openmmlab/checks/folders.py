"""Rules for classification: a class number for each picture, from folders or a file."""
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from mmlocalmamba.openmmlab.checks.findings import Finding, Note, Problem, Tally, absent_classes, listed
from mmlocalmamba.openmmlab.checks.pictures import by_ending, left_out
from mmlocalmamba.openmmlab.checks.splits import Split


def audit_folders(split: Split) -> tuple[list[Finding], Tally]:
    """Return the findings of classes and their pictures, and the table."""
    tally = Tally(split.title, 'pictures', (split.count, split.count))
    counts = Counter(label for labels in split.labels for label in (labels if isinstance(labels, list) else [labels]))
    classes = split.classes or tuple(map(str, range(max(counts, default=-1) + 1)))
    for number, name in enumerate(classes):
        tally.classes[str(name)] = [counts[number], counts[number]]
    findings = [*_folders(split, tally), *_labels(split, tally, counts, classes)]
    return findings, tally


def _folders(split: Split, tally: Tally) -> Iterator[Finding]:
    """Yield folders that are no classes, names that differ from folders, and pictures that are left out."""
    folders, root = split.options['folders'], split.folder
    if not folders:
        return
    others = left_out(split.whole_folder, split.pictures)
    inside: dict[str, list[str]] = defaultdict(list)
    for path in others:
        inside[os.path.relpath(path, root).split(os.sep)[0]].append(path)
    used = {os.path.relpath(path, root).split(os.sep)[0] for path in split.pictures}
    hidden = [name for name in folders if name.startswith(('.', '__'))]
    if hidden:
        yield Problem(root, 'the folder counts as a class', 'Remove it', noun='folder', entries=hidden, about='classes')
    empty = [name for name in folders if name not in used and name not in hidden and not inside.get(name)]
    if empty and not split.partial:
        kind = Problem if split.trains else Note
        yield kind(root, 'it has no pictures, but counts as a class', 'Remove it, or add pictures', noun='folder',
                   entries=empty, about='classes')
    if others:
        tally.pictures = split.count + len(others), split.count
        tally.left_out.update(Counter(_reason(path, root, folders) for path in others))
        for place, name in ((place, str(name)) for place, name in enumerate(split.classes or ())):
            if place < len(folders):
                tally.classes[name][0] += len(inside.get(folders[place], ()))
        extensions = sorted({os.path.splitext(path)[1].lower() for path in others} | set(split.options['extensions']
                                                                                         or ()))
        loose = [path for path in others if os.path.dirname(path) == root.rstrip(os.sep)]
        rest = [path for path in others if path not in set(loose)]
        if loose:
            yield Note(root, 'it is in no folder of a class and is left out', 'Move it into one', noun='picture',
                       entries=loose)
        if rest:
            lost = [name for name in folders if name not in used and inside.get(name)]
            kind = Problem if lost else Note
            yield kind(root, f'its ending is not among extensions, so it is left out ({by_ending(rest)})'
                       + (f'; the classes {listed(lost)} have no other pictures' if lost else ''),
                       f'Set extensions={tuple(extensions)!r} in each data set; what OpenCV cannot read is named then',
                       noun='picture', entries=rest)
    if split.classes and list(split.classes) != folders and len(split.classes) == len(folders):
        if {*split.classes} == {*folders}:
            yield Problem(root, f'classes {listed(split.classes)} are in another order than the folders '
                                f'{listed(folders)}, which are numbered in alphabetical order',
                          f'Set classes={folders!r}, or leave them out', about='classes')
        elif {*split.classes} & {*folders}:
            strange = [name for name in split.classes if name not in folders]
            yield Problem(root, f'no folder is called {listed(strange)}; the folders are {listed(folders)}, numbered '
                                'in alphabetical order', f'Set classes={folders!r}, or leave them out', about='classes')


def _reason(path: str, root: str, folders: list[str]) -> str:
    return ('in no folder of a class' if os.path.dirname(path) == root.rstrip(os.sep)
            else f'ending {os.path.splitext(path)[1]}')


def _labels(split: Split, tally: Tally, counts: dict[Any, int], classes: tuple[str, ...]) -> Iterator[Finding]:
    """Yield class numbers of no class and classes of no picture."""
    where = split.file or split.folder
    wrong = sorted(label for label in counts if not 0 <= label < len(classes))
    if wrong:
        yield Problem(where, f'has the class number{"s" * (len(wrong) > 1)} {listed(wrong)}, but the {len(classes)} '
                             f'classes are 0 to {len(classes) - 1}',
                      'Number the classes from 0, or correct metainfo.classes',
                      about='classes')
        return
    many = any(isinstance(label, list) for label in split.labels)  # several classes for a picture
    if len(classes) == 1 and not many:
        yield Problem(where, f'there is one class ({classes[0]}): any network is right, with a loss of '
                             '0', 'Make a folder '
                      'for each class in the folder of the data set', about='classes')
    elif len(counts) == 1 and not many:
        kind = Problem if split.trains and not split.partial else Note
        yield kind(where, f'all pictures are of one class ({classes[next(iter(counts))]}): any network is right',
                   'Add pictures of the other classes')
    elif split.trains and not split.partial and not split.options['folders'] and (
            absent := absent_classes(tally, map(str, classes))):
        yield Note(where, 'no picture is of this class', 'Add pictures, or remove the class', noun='class',
                   entries=absent)
