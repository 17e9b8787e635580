"""Tiny data sets on disk in the three formats, and their audit."""
import copy
import json

import numpy as np
from mmengine.registry import DATASETS, METRICS, DefaultScope
from PIL import Image

from mmlocalmamba.openmmlab import checks


def picture(path, width=40, height=30, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(len(path.name)).randint(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **save)
    return path


# ---- boxes ----

CLASSES = ('cat', 'dog', 'cow')


def coco_content(pictures=6, classes=CLASSES):
    """Two boxes with polygons on each picture, of all classes in turn; all is right."""
    content = dict(images=[], annotations=[],
                   categories=[dict(id=number, name=name) for number, name in enumerate(classes, 1)])
    for number in range(1, pictures + 1):
        content['images'].append(dict(id=number, file_name=f'{number}.jpg', width=40, height=30))
        for place in range(2):
            x, y, w, h = 4 + 10 * place, 5 + number, 12, 8
            content['annotations'].append(dict(
                id=len(content['annotations']) + 1, image_id=number, bbox=[x, y, w, h], area=w * h - 4, iscrowd=0,
                category_id=len(content['annotations']) % len(classes) + 1,
                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]))
    return content


def write_coco(folder, content, name='train.json'):
    for image in content.get('images', ()):
        if 'file_name' in image and not (path := folder / 'images' / str(image['file_name'])).exists():
            picture(path)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def build(scope, registry, cfg):
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(copy.deepcopy(cfg))


def coco_dataset(file, classes=CLASSES, masks=False, test_mode=False, color_type='color', **options):
    return build('mmdet', DATASETS, dict(
        type='CocoDataset', ann_file=str(file), data_prefix=dict(img=str(file.parent / 'images')), test_mode=test_mode,
        metainfo=dict(classes=classes) if classes else None, filter_cfg=dict(filter_empty_gt=True, min_size=8),
        pipeline=[dict(type='LoadImageFromFile', color_type=color_type),
                  dict(type='LoadAnnotations', with_bbox=True, with_mask=masks)]) | options)


def coco_audit(file, name='training', truth=None, metric='bbox', **options):
    """Audit a data set; as validation, with an evaluator of ``truth`` or of the same file."""
    dataset = coco_dataset(file, test_mode=name != 'training', **options)
    evaluated = {}
    if name != 'training':
        truth = truth or file
        evaluator = type('Evaluator', (), dict(metrics=[build('mmdet', METRICS, dict(
            type='CocoMetric', ann_file=str(truth), metric=metric))]))
        evaluated[name] = checks.truths(evaluator, dict(ann_file=str(truth)))
    return checks.audit_data({name: dataset}, evaluated)


# ---- label images ----


def write_labels(folder, labels, mode=None):
    """Write pictures with label images.

    Args:
        labels: arrays (H, W), or Pillow's images.
    """
    for number, label in enumerate(labels):
        label = label if isinstance(label, Image.Image) else Image.fromarray(label)
        label = label if mode is None else label.convert(mode)
        picture(folder / 'images' / f'{number}.png', *label.size)
        (folder / 'labels').mkdir(exist_ok=True)
        label.save(folder / 'labels' / f'{number}.png')
    return folder


def stripes(*values, width=40, height=30):
    """A label image with a stripe for each value."""
    return np.repeat(np.resize(np.array(values), (1, width)), height, 0).astype(np.uint8)


def label_dataset(folder, classes, reduce_zero_label=False, loads=None, **options):
    return build('mmseg', DATASETS, dict(
        type='BaseSegDataset', data_root=str(folder), img_suffix='.png', reduce_zero_label=reduce_zero_label,
        data_prefix=dict(img_path='images', seg_map_path='labels'), metainfo=dict(classes=classes),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=loads)]) | options)


# ---- folders ----


def write_folders(folder, counts, ending='.png'):
    """Write a folder of pictures for each class of {name: number}."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(folder / name / f'{name.strip(".")}{number}{ending}')
    return folder


def folder_dataset(folder, **options):
    return build('mmpretrain', DATASETS, dict(type='CustomDataset', data_root=str(folder),
                                              pipeline=[dict(type='LoadImageFromFile')]) | options)


# ---- what is found ----


def texts(audit):
    """Return (problems, notes) as one text each."""
    return '\n'.join(map(str, audit.problems)), '\n'.join(map(str, audit.notes))


def clean(audit):
    assert not audit.findings, [str(finding) for finding in audit.findings]
    return audit
