"""Graphs to export: modules that map a batch of normalised images to named tensors.

They hold models of this package, or classifiers, segmentors and detectors of mmpretrain, mmsegmentation and mmdet.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmlocalmamba.backbones.base import LocalMambaBackbone


def image_channels(model: nn.Module) -> int:
    """Return the number of channels of a model's images: those of its first convolution; 3 without one."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


class Graph(nn.Module):
    """Base class of the graphs.

    Attributes:
        task: 'classification', 'detection', 'segmentation' or 'features'.
        outputs: names of the tensors that ``forward`` returns, in order.
        any_batch: False if the graph takes one image at a time.
        channels: of the images.
    """
    task: str
    outputs: tuple[str, ...]
    any_batch = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.channels = image_channels(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map normalised images (B, channels, H, W), float32, to the outputs."""
        raise NotImplementedError


class Classifier(Graph):
    """A classifier: ``logits`` (B, classes)."""
    task, outputs = 'classification', ('logits', )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.model(images), )


class Segmentor(Graph):
    """A segmentor: ``logits`` (B, classes, H, W) of the whole image, also if the configuration tests by windows."""
    task, outputs = 'segmentation', ('logits', )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(images.shape[-2:])
        meta = dict(ori_shape=shape, img_shape=shape, pad_shape=shape)
        return (self.model.encode_decode(images, [meta] * images.shape[0]), )


class Features(Graph):
    """Maps of backbone and neck: ``features_0`` (B, C, H/4, W/4), ..."""
    task = 'features'

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__(model)
        self.outputs = tuple(f'features_{index}' for index in range(count))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        extract = getattr(self.model, 'extract_feat', self.model)  # a backbone alone is called
        return tuple(extract(images))


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor]:
    """Return indices (most,) of the boxes that stay, best first, and a mask (most,) of the valid ones.

    Boxes of different groups do not suppress each other.
    """
    from torchvision.ops import nms
    apart = boxes + (groups.to(boxes.dtype) * (boxes.max() + 1))[:, None]
    kept = nms(apart, scores, threshold)
    valid = torch.arange(most, device=kept.device) < kept.shape[0]
    return torch.cat([kept, kept.new_zeros(most)])[:most], valid


class TwoStageDetector(Graph):
    """Faster R-CNN or Mask R-CNN of MMDetection: its ``predict`` for one image, with a fixed number of rows.

    ``boxes`` (N, 5): x1, y1, x2, y2 in pixels of the input, score, best first; ``labels`` (N,), -1 in unused rows;
    ``masks`` (N, h, w): probabilities within each box, to be resized to it.
    """
    task, any_batch = 'detection', False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        head = model.roi_head
        self.outputs = ('boxes', 'labels', 'masks') if head.with_mask else ('boxes', 'labels')
        for name, cfg in (('rpn', model.test_cfg.rpn), ('rcnn', model.test_cfg.rcnn)):
            if cfg.nms.type != 'nms':
                raise NotImplementedError(f'test_cfg.{name}.nms is {cfg.nms.type!r}: only \'nms\' can be exported. '
                                          'Set this type, or export with --features')

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(images.shape[-2:])
        maps = self.model.extract_feat(images)
        proposals, valid = self._propose(maps, shape)
        head, cfg = self.model.roi_head, self.model.test_cfg.rcnn
        pooled = self._pool(head.bbox_roi_extractor, maps, proposals)
        scores, deltas = head.bbox_head(pooled)
        classes = head.bbox_head.num_classes
        scores = scores.softmax(-1)[:, :classes] * valid[:, None].to(scores.dtype)
        agnostic = head.bbox_head.reg_class_agnostic
        each = proposals if agnostic else proposals.repeat_interleave(classes, dim=0)
        boxes = head.bbox_head.bbox_coder.decode(each, deltas.reshape(-1, 4), max_shape=shape)
        row, label = (scores > cfg.score_thr).nonzero().unbind(1)
        scores, boxes = scores[row, label], boxes[row if agnostic else row * classes + label]
        # One row without effect, so that there is a largest box.
        scores, boxes = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (scores, boxes))
        label = torch.cat([label, label.new_zeros(1)])
        kept, valid = _nms(boxes, scores, label, cfg.nms.iou_threshold, cfg.max_per_img)
        scores, boxes, label = scores[kept], boxes[kept], label[kept]
        valid = valid & (scores > cfg.score_thr)
        scores, boxes = scores * valid, boxes * valid[:, None]
        found = torch.cat([boxes, scores[:, None]], dim=1)
        labels = torch.where(valid, label, -1)
        if not head.with_mask:
            return found, labels
        masks = head.mask_head(self._pool(head.mask_roi_extractor, maps, boxes))
        if not head.mask_head.class_agnostic:
            masks = masks[torch.arange(len(masks), device=masks.device), label]
        return found, labels, masks.reshape(-1, *masks.shape[-2:]).sigmoid()

    def _propose(self, maps: Sequence[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return proposals (N, 4) and a mask (N,) of the valid ones."""
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
        if least >= 0:  # too small boxes come last and are not valid
            scores = scores * ((boxes[:, 2:] - boxes[:, :2]) > least).all(1).to(scores.dtype)
        kept, valid = _nms(boxes, scores, torch.cat(levels), cfg.nms.iou_threshold, cfg.max_per_img)
        return boxes[kept], valid & (scores[kept] > 0)

    @staticmethod
    def _pool(extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Return features (N, C, h, w) of boxes (N, 4), each read from its level."""
        from torchvision.ops import roi_align
        rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
        levels = extractor.map_roi_levels(rois, extractor.num_inputs)
        # Boxes of other levels are replaced by a small one, which is cheap, and its result is dropped. So are empty
        # boxes, for which OpenVINO gives NaN.
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
    """Return the graph of a model.

    Args:
        model: a classifier or backbone of this package, or a classifier, segmentor or detector of OpenMMLab's.
        shape: (H, W) of the images.
        features: export backbone and neck alone.

    Raises:
        NotImplementedError: the parts of a detector after its neck cannot be exported.
        ValueError: the image is smaller than a patch.
    """
    backbone = model if isinstance(model, LocalMambaBackbone) else getattr(model, 'backbone', None)
    patch = getattr(backbone, 'patch_size', 1)
    if min(shape) < patch:
        raise ValueError(f'--shape {shape[0]} {shape[1]} is smaller than a patch of {patch}x{patch} pixels')
    if features or model is backbone:
        owner: Any = model if model is backbone or hasattr(model, 'extract_feat') else backbone
        with torch.no_grad():
            maps = getattr(owner, 'extract_feat', owner)(torch.zeros(1, image_channels(owner), *shape))
        return Features(owner, len(maps)).eval()
    if hasattr(model, 'decode_head'):
        return Segmentor(model).eval()
    if hasattr(model, 'rpn_head') and hasattr(getattr(model, 'roi_head', None), 'bbox_roi_extractor') \
            and not isinstance(model.roi_head.bbox_head, nn.ModuleList):
        return TwoStageDetector(model).eval()
    if hasattr(model, 'head') and not hasattr(model, 'bbox_head'):
        return Classifier(model).eval()
    raise NotImplementedError(f'{type(model).__name__} cannot be exported as a whole, only Faster R-CNN and Mask R-CNN '
                              'among the detectors: --features exports its backbone and neck')


def metadata(graph: Graph, shape: tuple[int, int], classes: Sequence[str] | None, mean: Sequence[float] = (0., 0., 0.),
             std: Sequence[float] = (1., 1., 1.), channels: str = 'RGB') -> dict[str, Any]:
    """Return what a program must know to use an exported file.

    Args:
        graph: see :func:`graph_of`.
        shape: (H, W) of the images.
        classes: their names, or None.
        mean, std: of the pixels (0 to 255), for the channels in the order of ``channels``.
        channels: 'RGB' or 'BGR'. Only images of three channels have an order; the file of another model says 'GREY' or
            the number of its channels.
    """
    if graph.channels != 3:
        channels = 'GREY' if graph.channels == 1 else str(graph.channels)
        mean, std = ([values[0]] * graph.channels if len(set(values)) == 1 else values for values in (mean, std))
    return dict(task=graph.task, outputs=list(graph.outputs), input='images', layout='NCHW', height=shape[0],
                width=shape[1], channels=channels, mean=list(mean), std=list(std),
                classes=None if classes is None else list(classes))
