"""Describe a data set of a configuration by plain values: all that the audit's rules may know of it."""
import os
from dataclasses import dataclass, field
from typing import Any

from mmlocalmamba.openmmlab.engine.broken_files import Loader, loaders, loading_steps

# Number of samples whose objects are compared with the annotation file.
_COMPARED = 200


@dataclass
class Split:
    """What the configuration's data set says.

    Attributes:
        name: 'training', 'validation' or 'test', and a number if there are several parts.
        kind: 'boxes' (COCO's format), 'pixels', 'classes' or 'pictures' (another data set: its image files alone).
        dataset: name of its class.
        file: annotation file, or else the folder of the pictures.
        folder: the folder of the pictures.
        classes: names, or None.
        inherited: True if the names are those of the data set's class, such as COCO's.
        count: number of samples.
        partial: True if ``indices`` takes a part of the samples.
        pictures: paths of the samples' pictures; of boxes, the annotation file has them.
        labels: paths of label images, or class numbers, one for each picture.
        loader: how pictures are read.
        remote: True if the files are not local ones.
        options: settings of the kind, such as ``reduce_zero_label``.
    """
    name: str
    kind: str
    dataset: str
    file: str
    folder: str
    classes: tuple[str, ...] | None
    inherited: bool
    count: int = 0
    partial: bool = False
    pictures: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    loader: Loader = Loader()
    remote: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def whole_folder(self) -> str:
        """The folder of which all pictures should be samples; '' if a file or ``indices`` chooses them."""
        return '' if self.file or self.partial else self.folder

    @property
    def trains(self) -> bool:
        return self.name.startswith('training')

    @property
    def title(self) -> str:
        return f'{self.name}: {self.dataset}, {self.file or self.folder}'


def _boxes(dataset: Any) -> dict[str, Any]:
    filtered = {} if dataset.test_mode else dataset.filter_cfg or {}
    kept = {}
    for index in range(min(len(dataset), _COMPARED)):
        info = dataset.get_data_info(index)
        kept[info['img_id']] = len(info['instances'])
    return dict(masks=any(getattr(step, 'with_mask', False) for step in loading_steps(dataset, 'LoadAnnotations')),
                filter_empty=bool(filtered.get('filter_empty_gt')), min_size=filtered.get('min_size', 0), kept=kept)


def _pixels(dataset: Any, label_map: Any, loader: Loader) -> dict[str, Any]:
    steps = loading_steps(dataset, 'LoadAnnotations')
    return dict(reduce_zero_label=bool(dataset.reduce_zero_label), img_suffix=dataset.img_suffix,
                seg_map_suffix=dataset.seg_map_suffix, label_map=label_map,
                pipeline_reduces=[step.reduce_zero_label for step in steps
                                  if getattr(step, 'reduce_zero_label', None) is not None],
                label_folder=dataset.data_prefix.get('seg_map_path') or '', loader=loader)


def describe_names(dataset: Any, name: str) -> Split:
    """Describe a data set by its class names, file and folder; it may have no samples."""
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    own = getattr(type(dataset), 'METAINFO', {}).get('classes')
    prefix = getattr(dataset, 'data_prefix', None) or {}
    folder = next((prefix[key] for key in ('img_path', 'img') if isinstance(prefix, dict) and prefix.get(key)), '')
    file = getattr(dataset, 'ann_file', '') or ''
    return Split(name, 'pictures', type(dataset).__name__, file if isinstance(file, str) else '',
                 folder if isinstance(folder, str) else '',
                 tuple(classes) if isinstance(classes, (list, tuple)) else None,
                 classes is not None and own is not None and tuple(classes) == tuple(own))


def describe(dataset: Any, name: str) -> Split:
    """Describe a data set that is no wrapper and has samples."""
    split = describe_names(dataset, name)
    split.count, split.partial = len(dataset), getattr(dataset, '_indices', None) is not None
    split.loader, labels = loaders(dataset)
    split.remote = any(getattr(part, 'backend_args', None) not in (None, {}, {'backend': 'local'})
                       for part in (dataset, *loading_steps(dataset, 'Load')))
    if hasattr(dataset, 'cat_ids') and getattr(type(dataset), 'COCOAPI', type).__name__ == 'COCO':
        split.kind, split.options = 'boxes', _boxes(dataset)
        return split
    if not hasattr(dataset, 'get_data_info'):
        return split
    first = dataset.get_data_info(0)
    key = 'seg_map_path' if first.get('seg_map_path') else 'gt_label'
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        split.pictures.append(info.get('img_path') or '')
        split.labels.append(info.get(key))
    if key == 'seg_map_path' and hasattr(dataset, 'reduce_zero_label') and hasattr(dataset, 'img_suffix'):
        split.kind, split.options = 'pixels', _pixels(dataset, first.get('label_map'), labels)
    elif key == 'gt_label' and isinstance(first.get(key), (int, list)):
        folders = getattr(dataset, 'folder_to_idx', None)
        split.kind, split.options = 'classes', dict(folders=sorted(folders) if folders else [],
                                                    extensions=getattr(dataset, 'extensions', None))
    else:
        split.labels = []
    if split.folder and not os.path.isdir(split.folder):
        split.folder = ''
    return split
