"""What is exported: modules from a batch of normalised images to named tensors, made of the models of the packages."""
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor, nn

from mmlocalmamba.backbones.base import find_backbone
from mmlocalmamba.compat import load_checkpoint
from mmlocalmamba.weights.contents import read
from mmlocalmamba.weights.loading import adapted, grouped


def load_model(cfg: Config, checkpoint: str | None) -> tuple[nn.Module, list[str] | None]:
    """The model of a configuration with the weights of a checkpoint, ours or the authors', ready to infer, and the
    names of its classes, from the checkpoint or the data set's type, if they say.

    Args:
        cfg: a complete configuration.
        checkpoint: file or URL; None leaves weights at random, for measurements of speed.

    Raises:
        RuntimeError: the checkpoint is of another model; it names what is missing.
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
    loaded = load_checkpoint(checkpoint)
    contents = read(loaded, prefix=prefix)
    weights = contents.weights if backbone is None else adapted(contents, backbone, checkpoint)[1]
    expected = {name: value.shape for name, value in model.state_dict().items()}
    wrong = {'not in it': [name for name in expected if name not in weights],
             'of another shape': [name for name in expected if name in weights
                                  and weights[name].shape != expected[name]],
             'in it only': [name for name in weights if name not in expected]}
    if any(wrong.values()):
        lines = '\n  '.join(f'{len(names)} {what}: {", ".join(grouped(names)[:8])}'
                            for what, names in wrong.items() if names)
        raise RuntimeError(f'{checkpoint} is not a checkpoint of this {type(model).__name__}:\n  {lines}\nName the '
                           'configuration that it was trained with.')
    model.load_state_dict(weights)
    meta = loaded.get('meta') or {}
    return model.eval(), {**metainfo, **(meta.get('dataset_meta') or {})}.get('classes')


class Graph(nn.Module):
    """A model as it is exported.

    Attributes:
        task: as users know it.
        outputs: names of what ``forward`` returns, in order.
        any_batch: whether it takes more images than one.
    """
    task: str
    outputs: tuple[str, ...]
    any_batch = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, 3, H, W), float32."""
        raise NotImplementedError


class Classifier(Graph):
    """``logits`` (B, classes)."""
    task, outputs = 'classification', ('logits', )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.model(images, mode='tensor'), )


class Segmentor(Graph):
    """``logits`` (B, classes, H, W), of the whole image at once, whatever windows the configuration tests with."""
    task, outputs = 'segmentation', ('logits', )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(images.shape[-2:])
        meta = dict(ori_shape=shape, img_shape=shape, pad_shape=shape)
        return (self.model.encode_decode(images, [meta] * images.shape[0]), )


class Features(Graph):
    """The maps that the backbone and the neck give: ``features_0`` (B, C, H/4, W/4), ..."""
    task = 'features'

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__(model)
        self.outputs = tuple(f'features_{index}' for index in range(count))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.extract_feat(images))


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor]:
    """Indices (most,) of the boxes that stay, best first, and which of these are meant: groups do not meet."""
    from torchvision.ops import nms
    apart = boxes + (groups.to(boxes.dtype) * (boxes.max() + 1))[:, None]
    kept = nms(apart, scores, threshold)
    meant = torch.arange(most, device=kept.device) < kept.shape[0]
    return torch.cat([kept, kept.new_zeros(most)])[:most], meant


class TwoStageDetector(Graph):
    """Faster R-CNN or Mask R-CNN of MMDetection: what its ``predict`` finds in one image, in a fixed number of rows.

    ``boxes`` (N, 5): x1, y1, x2, y2 in pixels of the input, score, best first; ``labels`` (N,), -1 in the rows that are
    left over; ``masks`` (N, h, w): probabilities within each box, to be resized to it.
    """
    task, any_batch = 'detection', False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        head = model.roi_head
        self.outputs = ('boxes', 'labels', 'masks') if head.with_mask else ('boxes', 'labels')
        for name, cfg in (('rpn', model.test_cfg.rpn), ('rcnn', model.test_cfg.rcnn)):
            if cfg.nms.type != 'nms':
                raise NotImplementedError(f'test_cfg.{name}.nms is {cfg.nms.type!r}: only \'nms\' can be exported. '
                                          'Set it so, or export the features')

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(images.shape[-2:])
        maps = self.model.extract_feat(images)
        proposals, meant = self._propose(maps, shape)
        head, cfg = self.model.roi_head, self.model.test_cfg.rcnn
        pooled = self._pool(head.bbox_roi_extractor, maps, proposals)
        scores, deltas = head.bbox_head(pooled)
        classes = head.bbox_head.num_classes
        scores = scores.softmax(-1)[:, :classes] * meant[:, None].to(scores.dtype)
        agnostic = head.bbox_head.reg_class_agnostic
        each = proposals if agnostic else proposals.repeat_interleave(classes, dim=0)
        boxes = head.bbox_head.bbox_coder.decode(each, deltas.reshape(-1, 4), max_shape=shape)
        row, label = (scores > cfg.score_thr).nonzero().unbind(1)
        scores, boxes = scores[row, label], boxes[row if agnostic else row * classes + label]
        # One row that counts for nothing, so that there is a largest box.
        scores, boxes = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (scores, boxes))
        label = torch.cat([label, label.new_zeros(1)])
        kept, meant = _nms(boxes, scores, label, cfg.nms.iou_threshold, cfg.max_per_img)
        scores, boxes, label = scores[kept], boxes[kept], label[kept]
        meant = meant & (scores > cfg.score_thr)
        scores, boxes = scores * meant, boxes * meant[:, None]
        found = torch.cat([boxes, scores[:, None]], dim=1)
        labels = torch.where(meant, label, -1)
        if not head.with_mask:
            return found, labels
        masks = head.mask_head(self._pool(head.mask_roi_extractor, maps, boxes))
        if not head.mask_head.class_agnostic:
            masks = masks[torch.arange(len(masks), device=masks.device), label]
        return found, labels, masks.reshape(-1, *masks.shape[-2:]).sigmoid()

    def _propose(self, maps: Sequence[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) and which of them are meant."""
        rpn, cfg = self.model.rpn_head, self.model.test_cfg.rpn
        scores, deltas, priors, levels = [], [], [], []
        score_maps, delta_maps = rpn(maps)
        anchors = rpn.prior_generator.grid_priors([x.shape[-2:] for x in score_maps], device=maps[0].device)
        for level, (score, delta, prior) in enumerate(zip(score_maps, delta_maps, anchors)):
            score = score[0].permute(1, 2, 0).flatten()
            score = score.sigmoid() if rpn.use_sigmoid_cls else score.reshape(-1, 2).softmax(-1)[:, 0]
            delta = delta[0].permute(1, 2, 0).reshape(-1, 4)
            score, best = score.topk(min(cfg.nms_pre, len(prior)) if cfg.nms_pre > 0 else len(prior))
            scores.append(score)
            deltas.append(delta[best])
            priors.append(prior[best])
            levels.append(torch.full_like(best, level))
        boxes = rpn.bbox_coder.decode(torch.cat(priors), torch.cat(deltas), max_shape=shape)
        scores, least = torch.cat(scores), cfg.get('min_bbox_size', -1)
        if least >= 0:  # what is too small comes last, and is not meant
            scores = scores * ((boxes[:, 2:] - boxes[:, :2]) > least).all(1).to(scores.dtype)
        kept, meant = _nms(boxes, scores, torch.cat(levels), cfg.nms.iou_threshold, cfg.max_per_img)
        return boxes[kept], meant & (scores[kept] > 0)

    @staticmethod
    def _pool(extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Features of boxes (N, 4), each read from its level: (N, C, h, w)."""
        from torchvision.ops import roi_align
        rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
        levels = extractor.map_roi_levels(rois, extractor.num_inputs)
        # Instead of boxes of other levels a small one is read, which is cheap, and dropped. Instead of empty ones, too:
        # OpenVINO gives NaN for these.
        small = rois.new_tensor([0, 0, 0, 1, 1])
        whole = (boxes[:, 2:] > boxes[:, :2]).all(1)
        pooled = 0
        for index, (layer, features) in enumerate(zip(extractor.roi_layers, maps)):
            own = (whole & (levels == index))[:, None]
            part = roi_align(features, torch.where(own, rois, small), layer.output_size, layer.spatial_scale,
                             layer.sampling_ratio, aligned=layer.aligned)
            pooled = pooled + part * own[..., None, None].to(part.dtype)
        return pooled


def graph_of(model: nn.Module, shape: tuple[int, int], features: bool = False) -> Graph:
    """The graph that stands for a model.

    Args:
        model: a classifier, segmentor or detector of the packages.
        shape: (H, W) of the images.
        features: backbone and neck alone.

    Raises:
        NotImplementedError: a detector whose parts after the neck cannot be exported.
        ValueError: an image smaller than a patch.
    """
    backbone = getattr(model, 'backbone', None)
    patch = getattr(backbone, 'patch_size', 1)
    if min(shape) < patch:
        raise ValueError(f'--shape {shape[0]} {shape[1]} is smaller than a patch of {patch}x{patch} pixels')
    if features:
        with torch.no_grad():
            return Features(model, len(model.extract_feat(torch.zeros(1, 3, *shape)))).eval()
    if hasattr(model, 'decode_head'):
        return Segmentor(model).eval()
    if hasattr(model, 'rpn_head') and hasattr(getattr(model, 'roi_head', None), 'bbox_roi_extractor') \
            and not isinstance(model.roi_head.bbox_head, nn.ModuleList):
        return TwoStageDetector(model).eval()
    if hasattr(model, 'head') and not hasattr(model, 'bbox_head'):
        return Classifier(model).eval()
    raise NotImplementedError(f'{type(model).__name__} cannot be exported as a whole, only Faster R-CNN and Mask R-CNN '
                              'among the detectors: --features exports its backbone and neck')


def metadata(cfg: Config, graph: Graph, shape: tuple[int, int], classes: Sequence[str] | None) -> dict[str, Any]:
    """What a program must know to use the file: task, input, preprocessing, classes."""
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    return dict(task=graph.task, outputs=list(graph.outputs), input='images', layout='NCHW',
                height=shape[0], width=shape[1],
                # Of the channels in the order that the model takes them.
                channels='RGB' if preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb') else 'BGR',
                mean=list(preprocessor.get('mean') or (0., 0., 0.)), std=list(preprocessor.get('std') or (1., 1., 1.)),
                classes=None if classes is None else list(classes))
