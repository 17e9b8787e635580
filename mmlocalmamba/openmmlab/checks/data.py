"""Check datasets: samples, classes and masks."""
import json
from collections.abc import Iterator
from typing import Any

from mmlocalmamba.openmmlab.engine.broken_files import leaf_datasets

# Number of samples to check. Annotations without masks usually lack them in most samples.
SAMPLES = 1000


def listed(names: Any) -> str:
    """Join up to eight names for a message."""
    names = list(map(str, names))
    return ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')


def _categories(dataset: Any) -> Iterator[str]:
    """Yield a problem if the classes of a COCO file do not match those of the configuration."""
    classes, found = dataset.metainfo.get('classes'), getattr(dataset, 'cat_ids', None)
    if found is None or tuple(classes) == tuple(getattr(type(dataset), 'METAINFO', {}).get('classes', ())):
        return
    with open(dataset.ann_file) as file:
        names = [category['name'] for category in json.load(file)['categories']]
    missing = [name for name in classes if name not in names]
    if missing:
        yield (f'{dataset.ann_file} lacks classes of the configuration: {listed(missing)}. It has {listed(names)}: '
               'correct metainfo.classes')
    elif [name for name in names if name in classes] != list(classes):
        yield (f'the classes {listed(classes)} are in another order than in {dataset.ann_file}, by which '
               f'MMDetection numbers them: set {tuple(name for name in names if name in classes)}')


def _masks(dataset: Any) -> Iterator[str]:
    if not any(getattr(step, 'with_mask', False) for step in getattr(dataset.pipeline, 'transforms', ())):
        return
    for index in range(min(len(dataset), SAMPLES)):
        info = dataset.get_data_info(index)
        if any('mask' not in instance for instance in info.get('instances', ())):
            yield (f"an object of {info.get('img_path')} has a box but no polygon ('segmentation'), and the pipeline "
                   'loads masks. To train on boxes alone, use faster-rcnn_localvmamba-* or retinanet_localvmamba-*; '
                   'with another detector, set LoadAnnotations(with_mask=False) and use a model and metric without '
                   'masks')
            return


def data_problems(dataset: Any) -> list[str]:
    """Return the problems of a dataset by itself: no samples, classes that do not match its file, or missing masks."""
    problems = []
    for part in leaf_datasets(dataset):
        if not len(part):
            where = getattr(part, 'ann_file', '') or getattr(part, 'data_prefix', '')
            problems.append(f'{type(part).__name__} found no samples in {where}: check data_root, data_prefix, the '
                            'suffix of the files (img_suffix) and the classes of the annotations')
        elif isinstance(part.metainfo.get('classes'), str):
            classes = part.metainfo['classes']
            problems.append(f'classes must be a tuple, got the string {classes!r}: set ({classes!r}, )')
        else:
            problems += [*_categories(part), *_masks(part)]
    return problems
