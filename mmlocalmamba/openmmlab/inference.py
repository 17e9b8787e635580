"""Models of configurations for picture files, by the inferencers of mmpretrain, mmdet and mmsegmentation."""
from importlib import import_module
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from mmlocalmamba.backbones.base import find_backbone
from mmlocalmamba.deployment.graphs import image_channels
from mmlocalmamba.openmmlab.checkpoint_hook import other_classes, unfilled
from mmlocalmamba.openmmlab.checks.findings import listed
from mmlocalmamba.openmmlab.deployment import load_model
from mmlocalmamba.predict import Found, Predictor, Result
from mmlocalmamba.weights.loading import grouped, load_checkpoint, read, weights_for

# default_scope -> module and class of its inferencer, and its argument for the checkpoint
_INFERENCERS = {'mmpretrain': ('mmpretrain', 'ImageClassificationInferencer', 'pretrained'),
                'mmdet': ('mmdet.apis', 'DetInferencer', 'weights'),
                'mmseg': ('mmseg.apis', 'MMSegInferencer', 'weights')}
_TOP = 5


def _pixels(picture: Image.Image) -> np.ndarray:
    """Return (H, W, C), blue, green, red where there are three, as OpenMMLab reads files."""
    pixels = np.asarray(picture)
    return np.ascontiguousarray(pixels[..., ::-1] if pixels.ndim == 3 and pixels.shape[2] == 3 else
                                pixels.reshape(*pixels.shape[:2], -1))


def _classes(found: Any) -> Result:
    scores = found.pred_score.cpu().numpy()
    return Result(classes=[(int(label), float(scores[label])) for label in np.argsort(-scores)[:_TOP]])


def _objects(found: Any, score: float) -> Result:
    from pycocotools import mask as coder
    found = found['predictions'][0].pred_instances.cpu()
    found = found[found.scores >= score]
    masks = found.masks if 'masks' in found else [None] * len(found)
    objects = []
    for label, value, box, mask in zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), masks):
        mask = None if mask is None else np.asarray(mask, dtype=bool)
        code = None
        if mask is not None:
            code = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
            code = dict(size=code['size'], counts=code['counts'].decode())
        objects.append(Found(label, value, box, mask, code))
    return Result(objects=objects)


def _labels(found: Any, score: float) -> Result:
    return Result(labels=found.pred_sem_seg.data[0].cpu().numpy())


def _refuse_another(cfg: Config, config: str, checkpoint: str) -> None:
    """Refuse a checkpoint that does not fill the model: an inferencer would go on with random weights.

    Raises:
        RuntimeError: naming the weights and the remedy.
    """
    model, _ = load_model(cfg, None)
    prefix, backbone = find_backbone(model)
    contents = read(load_checkpoint(checkpoint), prefix=prefix)
    weights = contents.weights if backbone is None else weights_for(contents, backbone, checkpoint)[1]
    if missing := unfilled(model, weights):
        raise RuntimeError(
            f'{checkpoint} is not of the model of {config}: {len(missing)} of its weights are not in the file or have '
            f'another shape: {listed(grouped(missing))}. '
            + (other_classes(model, weights) or 'Name the configuration that it was trained with.'))


def inferencer(config: str, checkpoint: str, device: str | None = None, score: float = 0.3) -> Predictor:
    """Return the model of a configuration, for pictures.

    Args:
        config: path of the configuration.
        checkpoint: file, URL or ``mmlocalmamba://NAME``.
        device: torch device; None for a GPU if there is one.
        score: least score of an object.

    Raises:
        ValueError: the configuration is of another package, or its boxes are turned.
        RuntimeError: the package is not installed, or the checkpoint does not fill the model.
    """
    cfg = Config.fromfile(config)
    scope = cfg.get('default_scope')
    if scope not in _INFERENCERS:
        raise ValueError(f'{config} is a configuration of {scope}: predictions exist only for '
                         f'{", ".join(_INFERENCERS)}')
    module, kind, argument = _INFERENCERS[scope]
    try:
        make = getattr(import_module(module), kind)
    except ImportError as error:
        raise RuntimeError(f'{module} cannot be imported ({error}): models of {scope} need it') from error
    _refuse_another(cfg, config, checkpoint)
    infer = make(config, device=device, **{argument: checkpoint})
    infer.show_progress = False
    meta = getattr(infer.model, 'dataset_meta', None) or getattr(infer.model, '_dataset_meta', None) or {}
    unpack = _objects if scope == 'mmdet' else _labels
    palette = meta.get('palette')

    def run(picture: Image.Image) -> Result:
        if scope == 'mmpretrain':  # its call draws a progress bar for each picture
            data, = infer.preprocess([_pixels(picture)])
            return _classes(infer.forward(data)[0])
        return unpack(infer(_pixels(picture), return_datasamples=True), score)

    return Predictor(run, meta.get('classes') or (), image_channels(infer.model),
                     palette if isinstance(palette, (list, tuple)) else None)
