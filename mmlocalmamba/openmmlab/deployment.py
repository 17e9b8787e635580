"""Models of configurations for export and evaluation."""
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from mmlocalmamba.backbones.base import find_backbone
from mmlocalmamba.deployment import graphs
from mmlocalmamba.openmmlab.compat import load_from_weights_only
from mmlocalmamba.weights.loading import load_whole_model, read


def load_model(cfg: Config, checkpoint: str | None) -> tuple[nn.Module, Sequence[str] | None]:
    """Build the model of a configuration with the weights of a checkpoint of ours or of the authors, for inference.

    Args:
        cfg: a complete configuration.
        checkpoint: file or URL; None keeps random weights, for measurements of speed.

    Returns:
        The model in evaluation mode, and the names of its classes if the checkpoint or the type of the data set says
        them.

    Raises:
        RuntimeError: the checkpoint is of another model. The message names what is missing.
        ValueError: there are no weights in it.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        dataset = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get('dataset', {})
        known = getattr(DATASETS.get(dataset['type']), 'METAINFO', {}) if 'type' in dataset else {}
    metainfo = {**(known or {}), **(dataset.get('metainfo') or {})}
    if checkpoint is None:
        return model.eval(), metainfo.get('classes')
    prefix, backbone = find_backbone(model)
    loaded = load_from_weights_only(checkpoint, 'cpu')
    load_whole_model(model, backbone, read(loaded, prefix=prefix), checkpoint)
    meta = loaded.get('meta') or {}
    return model.eval(), {**metainfo, **(meta.get('dataset_meta') or {})}.get('classes')


def tested_size(cfg: Config) -> tuple[int, int]:
    """Return (height, width) of the images that a configuration tests with.

    If they differ: 224x224 for classifiers, 800x1344 for detectors and 512x512 for segmentors.
    """
    size = None
    for step in (cfg.get('test_dataloader') or {}).get('dataset', {}).get('pipeline') or ():
        kind = str(step.get('type')).rpartition('.')[2]
        given = step.get('crop_size' if kind == 'CenterCrop' else 'scale') if kind in ('CenterCrop', 'Resize') else None
        if given is not None:
            width, height = (given, given) if isinstance(given, int) else given[:2]
            size = None if step.get('keep_ratio') and width != height else (height, width)
    return size or {'mmdet': (800, 1344), 'mmseg': (512, 512)}.get(cfg.get('default_scope'), (224, 224))


def metadata(cfg: Config, graph: graphs.Graph, shape: tuple[int, int], classes: Sequence[str] | None) -> dict[str, Any]:
    """Return :func:`mmlocalmamba.deployment.graphs.metadata` with the preprocessing of a configuration."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    to_rgb = preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb')
    return graphs.metadata(graph, shape, classes, preprocessor.get('mean') or (0., 0., 0.),
                           preprocessor.get('std') or (1., 1., 1.), 'RGB' if to_rgb else 'BGR')
