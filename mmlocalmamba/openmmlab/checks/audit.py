"""The audit of the data: read the files of each data set, compare them with the configuration, count what is kept."""
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmlocalmamba import __version__
from mmlocalmamba.files import of_the_same_ending, write_whole
from mmlocalmamba.openmmlab.checks import boxes, folders, pictures, pixels, reader
from mmlocalmamba.openmmlab.checks.findings import Finding, Note, Problem, Tally, counted, listed
from mmlocalmamba.openmmlab.checks.splits import Split, describe, describe_names
from mmlocalmamba.openmmlab.engine.data import leaf_datasets

# The result of an audit that took longer, in seconds, is kept for the next time.
_WORTH_KEEPING = 2.0
# Number of results that are kept.
_KEPT = 16


@dataclass
class Audit:
    """Findings and tables of all data sets of a run.

    Attributes:
        findings: problems and notes, without repetitions.
        tallies: a table for each data set.
        seconds: time that it took.
    """
    findings: list[Finding] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.stops]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.stops]

    def doubts_classes(self, name: str) -> bool:
        """Return True if the classes of a data set are in doubt, so that no head should be fitted to them."""
        return any(finding.about == 'classes' and finding.split.startswith(name) for finding in self.problems)


@dataclass
class Truth:
    """The annotation file that an evaluator scores by.

    Attributes:
        content: the parsed JSON.
        file: its path, '' if it is not known.
        masks: True if masks are scored.
    """
    content: Any
    file: str
    masks: bool


@dataclass
class _Result:
    findings: list[Finding]
    tally: Tally
    paths: list[str]  # all files that were read


def truths(evaluator: Any, configured: Any) -> list[Truth]:
    """Return the annotation files of an evaluator.

    Args:
        evaluator: MMEngine's evaluator, or None.
        configured: its configuration: a dict, a list of dicts, or something else.
    """
    dicts = configured if isinstance(configured, (list, tuple)) else [configured]
    metrics = getattr(evaluator, 'metrics', ())
    found = []
    for place, metric in enumerate(metrics):
        api = getattr(metric, '_coco_api', None)
        if api is not None and not getattr(metric, 'format_only', False):
            given = dicts[place] if len(dicts) == len(metrics) else None
            file = given.get('ann_file') if isinstance(given, dict) else None
            found.append(Truth(api.dataset, file or '', 'segm' in getattr(metric, 'metrics', ())))
    return found


def audit_data(datasets: dict[str, Any], evaluated: dict[str, list[Truth]] | None = None, head: Any = None,
               skip: int = 0, others: Iterable[str] = ()) -> Audit:
    """Audit data sets.

    Args:
        datasets: {'training', 'validation' or 'test': data set, wrappers included}.
        evaluated: {name as in ``datasets``: result of :func:`truths`}.
        head: the segmentation head, or None.
        skip: number of unreadable pictures that the training may skip.
        others: further annotation files of the configuration; pictures that they list are not called left out.
    """
    begin = time.monotonic()
    result = Audit()
    found: list[tuple[str, Finding]] = []
    known: list[str] = []
    box_splits: dict[str, Split] = {}
    places: list[tuple[Split, dict[str, str]]] = []
    for name, dataset in datasets.items():
        leaves = list(leaf_datasets(dataset))
        for number, leaf in enumerate(leaves, 1):
            part = f'{name} {number}' if len(leaves) > 1 else name
            basic = list(basics(leaf))
            found += [(part, finding) for finding in basic]
            if basic:
                continue
            split = describe(leaf, part)
            given = _cached(split, (evaluated or {}).get(name, []), skip)
            found += [(part, finding) for finding in given.findings]
            if split.kind == 'pixels':
                found += [(part, finding) for finding in pixels.head_findings(split, head)]
            result.tallies.append(given.tally)
            known += given.paths
            if split.kind != 'boxes':
                places.append((split, pictures.locations(split.pictures)))
            elif not split.partial:  # the file has pictures of the other part, too
                places.append((split, pictures.locations(given.paths)))
            if split.kind == 'boxes':
                box_splits.setdefault(split.folder, split)
    trained = {place for split, own in places if split.trains for place in own}
    for split, own in places:
        if not split.trains:
            found += [(split.name, finding) for finding in pictures.trained_findings(split, own, trained)]
    for split in box_splits.values():
        if rest := pictures.unlisted([*known, *_listed_by(others, split)], split.folder):
            found.append((split.name, Note(
                split.folder, 'no annotation file of this configuration has it, so it is left out '
                              f'({pictures.by_ending(rest)})',
                'Add it to the annotation file, without annotations if nothing is in it', noun='picture',
                entries=rest)))
    for part, finding in {str(finding): (part, finding) for part, finding in reversed(found)}.values():
        result.findings.insert(0, replace(finding, split=part))
    result.seconds = time.monotonic() - begin
    return result


def basics(dataset: Any) -> Iterator[Problem]:
    """Yield what is wrong with a data set whose files are not worth reading then."""
    if not len(dataset):
        where = getattr(dataset, 'ann_file', '') or getattr(dataset, 'data_prefix', '')
        yield Problem(str(where), f'{type(dataset).__name__} found no samples',
                      'Check data_root, data_prefix, the ending of the files (img_suffix) and the classes of the '
                      'annotations')
    elif isinstance(classes := (getattr(dataset, 'metainfo', None) or {}).get('classes'), str):
        yield Problem(type(dataset).__name__, f'classes must be a tuple, got the string {classes!r}',
                      f'Set ({classes!r}, )', about='classes')


def explain(dataset: Any) -> str:
    """Return what is wrong with the annotation file of a data set that could not be built, as lines of a message."""
    file = getattr(dataset, 'ann_file', None)
    if not isinstance(file, str) or not file.endswith('.json'):
        return ''
    try:
        coco = boxes.CocoFile(reader.read_json(file), file)
        split = describe_names(dataset, 'training')
        found = [*coco.findings, *boxes.class_findings(split, coco)]
    except Exception:  # the first error is the better one
        return ''
    return ''.join(f'\n  {finding}' for finding in found if finding.stops)


def no_samples(dataset: Any) -> str:
    """Return why a data set may have no samples, and the remedy."""
    file, folder = getattr(dataset, 'ann_file', ''), (getattr(dataset, 'data_prefix', None) or {}).get('img_path')
    suffix = getattr(dataset, 'img_suffix', None)
    if suffix and isinstance(folder, str) and os.path.isdir(folder) and not file:
        found = reader.image_files(folder)
        if not found:
            return f'{folder} has no pictures. Check data_root and data_prefix'
        ending = os.path.splitext(found[0])[1]
        return (f'no file of {folder} ends in img_suffix={suffix!r}; its pictures are {pictures.by_ending(found)}. Set '
                f'img_suffix={ending!r} in each data set, if its pictures are these')
    return (f'{file or getattr(dataset, "data_prefix", "")} has none of the classes '
            f'{(getattr(dataset, "metainfo", None) or {}).get("classes")}. Check both')


def _absent(path: str) -> str:
    """Say that a path does not exist, and of a relative one in which folder."""
    return f'{path} does not exist' + ('' if os.path.isabs(path) else f' below {os.getcwd()}')


def missing_file(file: str) -> str:
    """Return what is there instead of an annotation file that does not exist, and the remedy."""
    if not os.path.isdir(os.path.dirname(file) or '.'):
        return f'the annotation file {_absent(file)}, nor does its folder. Correct data_root or ann_file'
    inside = of_the_same_ending(file)
    return (f'the annotation file {_absent(file)}. Its folder has '
            f'{listed(inside) if inside else "no such files"}. Correct data_root or ann_file')


def missing_folder(folder: str) -> str:
    """Return what is there instead of a folder that does not exist, and the remedy."""
    folder = folder.rstrip('/')
    parent, name = os.path.split(folder)
    if not os.path.isdir(parent or '.'):
        return f'the folder {_absent(folder)}, nor does {parent}. Correct data_root or data_prefix'
    inside = reader.folders_in(parent)
    classes = [entry for entry in inside
               if not entry.startswith('.') and reader.image_files(os.path.join(parent, entry))]
    splits = {'train', 'val', 'test', 'training', 'validation', 'valid'}
    if name in splits and classes and not splits & set(classes):
        return (f'the folder {_absent(folder)}. Its parent {parent} has {counted(len(classes), "folder")} of '
                f'pictures ({listed(classes)}): split the pictures into {parent}/train and {parent}/val, each with '
                'these folders (docs/data.md shows how)')
    return (f'the folder {_absent(folder)}. {parent or "The present folder"} has '
            + (f'{counted(len(inside), "folder")} ({listed(inside)})' if inside else 'no folders')
            + '. Correct data_root or data_prefix')


def _listed_by(files: Iterable[str], split: Split) -> list[str]:
    paths = []
    for file in files:
        try:
            images = reader.read_json(file)['images']
            paths += [boxes.picture_path(split, image) for image in images]
        except Exception:  # it is not needed; whoever uses it says what is wrong
            continue
    return paths


def _audit(split: Split, evaluated: Sequence[Truth], skip: int) -> _Result:
    """Read the files of a split and judge them."""
    if split.remote:
        return _Result([], Tally(split.title, 'pictures', (split.count, split.count),
                                 remarks=['the files are not local ones and were not read']), [])
    if split.kind == 'boxes':
        same = [truth for truth in evaluated if truth.file and os.path.exists(truth.file)
                and os.path.exists(split.file) and os.path.samefile(truth.file, split.file)]
        coco = boxes.CocoFile(same[0].content if same else reader.read_json(split.file), split.file)
        paths = boxes.picture_paths(split, coco)
        headers = reader.read_headers(paths, split.loader)
        findings, tally = boxes.audit_boxes(split, coco, headers)
        for truth in evaluated:
            scored = coco if truth in same else boxes.CocoFile(truth.content, truth.file or 'the file')
            findings += boxes.evaluator_findings(split, coco, scored, truth.masks)
    else:
        paths = [path for path in split.pictures if isinstance(path, str) and path]
        headers = reader.read_headers(paths, split.loader)
        if split.kind == 'pixels':
            labels = reader.read_headers(split.labels, split.options['loader'])
            good = [path for path, header in labels.items() if not header.broken]
            findings, tally = pixels.audit_pixels(split, headers, labels, reader.read_labels(good), skip)
            paths = [*paths, *split.labels]
        elif split.kind == 'classes':
            findings, tally = folders.audit_folders(split)
        else:
            findings, tally = [], Tally(split.title, 'pictures', (split.count, split.count))
    findings += pictures.picture_findings(split, headers, skip)
    pictures.sizes(tally, headers)
    return _Result(findings, tally, paths)


# ---- what is kept for the next time ----


def cache_folder() -> Path:
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmlocalmamba' / 'audits'


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _stamps(split: Split, paths: Sequence[str]) -> str:
    """Return a digest of sizes and times of files and of the number of files beside them."""
    folder = split.whole_folder
    return _digest((reader.stamp(paths), sorted(reader.image_files(folder)) if folder else []))


def _cached(split: Split, evaluated: Sequence[Truth], skip: int) -> _Result:
    """Audit a split, or return what was found when all of its files had the same sizes and times."""
    files = reader.stamp([split.file, *(truth.file for truth in evaluated)])
    path = cache_folder() / f'{_digest((__version__, split, files, [truth.masks for truth in evaluated], skip))}.json'
    known = all(truth.file for truth in evaluated)
    try:
        kept = json.loads(path.read_text(encoding='utf-8')) if known else {}
        paths = kept.get('paths') or [*split.pictures, *split.labels]
        if kept and kept['stamps'] == _stamps(split, paths):
            findings: list[Finding] = [(Problem if stops else Note)(**values) for stops, values in kept['findings']]
            return _Result(findings, Tally(**kept['tally']), paths)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
        pass
    begin = time.monotonic()
    result = _audit(split, evaluated, skip)
    if known and time.monotonic() - begin > _WORTH_KEEPING:
        paths = result.paths if split.kind == 'boxes' else []  # the others are in the configuration
        content = dict(stamps=_stamps(split, paths or [*split.pictures, *split.labels]), paths=paths,
                       tally=asdict(result.tally),
                       findings=[(finding.stops, asdict(finding)) for finding in result.findings])
        try:
            write_whole(str(path), json.dumps(content, default=str))
            for old in sorted(path.parent.glob('*.json'), key=os.path.getmtime)[:-_KEPT]:
                old.unlink()
        except OSError:  # the home directory may be read-only; the next audit reads the files again
            pass
    return result
