"""Readers of annotations for to_coco.py. Coordinates become pixels; nothing is repaired."""
from collections import Counter
from xml.etree import ElementTree

from annotation_formats.coco import is_coco, read_coco
from annotation_formats.files import (
    NAME_FILES,
    is_below,
    read_json,
    walk,
)
from annotation_formats.labelme import is_labelme, read_labelme
from annotation_formats.voc import read_voc
from annotation_formats.yolo import is_yolo, read_yaml, read_yolo

READERS = dict(yolo=read_yolo, voc=read_voc, labelme=read_labelme, coco=read_coco)


def formats_of(source, written):
    """Return {format: first file of it} of a source. Files below ``written``, the output of an earlier run, do not
    count. Up to twenty files of each ending are opened."""
    files = [source] if source.is_file() else [path for path in walk(source) if not is_below(path, written)]
    looks, opened = {}, Counter()
    names = next((path for path in files if path.name in NAME_FILES), None)
    for path in files:
        ending = path.suffix.lower()
        if ending not in ('.xml', '.json', '.txt', '.yaml', '.yml') or opened[ending] == 20:
            continue
        opened[ending] += 1
        if ending in ('.yaml', '.yml'):
            if 'names' in read_yaml(path):
                looks.setdefault('yolo', path)
        elif ending == '.txt':
            if path.name not in NAME_FILES and is_yolo(path):
                looks.setdefault('yolo', path)
        elif ending == '.xml':
            try:
                if ElementTree.parse(path).getroot().tag == 'annotation':
                    looks.setdefault('voc', path)
            except ElementTree.ParseError:
                continue
        else:
            try:
                content = read_json(path)
            except ValueError:
                continue
            if is_coco(content) or is_labelme(content):
                looks.setdefault('coco' if is_coco(content) else 'labelme', path)
    return looks or (dict(yolo=names) if names else {})
