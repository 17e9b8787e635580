"""Count parameters and FLOPs of a configuration's model, for any of the three tasks.

    python tools/get_flops.py CONFIG [--shape H W] [--convention exact|paper] [--modules [DEPTH]] [--json]

A multiply-add counts once, as in the papers' tables. The default of --shape is the paper's: 224x224 for classification,
1280x800 for detection, 512x2048 for segmentation.

exact   count the operations that run, by MMEngine's analyzer: each direction's projections, and 9*L*D*N + L*D for each
        scan of L steps (with the pads of windows), D channels and N states. Element-wise operations outside the scans
        are not counted.
paper   count blocks of LocalVim and Vim as the authors' counters do (mmlocalmamba.ops.flops), all else as above.

Detectors are counted without post-processing, with as many proposals as the RPN keeps in tests. As in MMDetection's
forward, Mask R-CNN's mask head gets the first 100 proposals, and Cascade Mask R-CNN's gets all. The auxiliary head of a
segmentor has parameters but does not run.
"""
import argparse
import json
import os
from collections import Counter
from typing import NamedTuple

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData

from mmlocalmamba.deployment.graphs import image_channels
from mmlocalmamba.directions import scan_index
from mmlocalmamba.layers import LocalVimMixer
from mmlocalmamba.layers.mixers import DirectionalSSM
from mmlocalmamba.ops import BACKEND_VARIABLE
from mmlocalmamba.ops.flops import HANDLES, SCAN, authors_mixer_flops, check_all_known

CONVENTIONS = ('exact', 'paper')
SHAPES = {'mmpretrain': (224, 224), 'mmdet': (1280, 800), 'mmseg': (512, 2048)}


class Count(NamedTuple):
    """FLOPs and parameters by module. The name of the whole model is ''."""
    flops: Counter
    params: Counter


def build(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    if cfg.default_scope == 'mmdet':
        model.forward = detector_forward(model)
    return model


def detector_forward(model):
    """Return a forward function that computes what a two-stage detector computes for an image.

    The proposals are random boxes, because untrained weights do not propose what a trained detector would.
    """
    from mmdet.structures import DetDataSample
    count = model.test_cfg.rpn.max_per_img

    def forward(images):
        height, width = (int(side) for side in images.shape[-2:])
        corners = torch.rand(2, count, 2) * torch.tensor([width, height])
        boxes = torch.cat([corners.amin(0), corners.amax(0)], dim=1)
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        features = model.extract_feat(images)
        return [*model.rpn_head(features), model.roi_head.forward(features, [InstanceData(bboxes=boxes)], [sample])]

    return forward


@torch.no_grad()
def count_flops(model, shape):
    """Return exact FLOPs and parameters of a model of :func:`build` for one image of ``shape`` (H, W).

    Raises:
        NotImplementedError: an operator of this package has no handle.
        RuntimeError: a scan was not counted.
    """
    # The reference backend has no operator to count. The other backends give the same number.
    chosen = os.environ.pop(BACKEND_VARIABLE, None)
    try:
        analyzer = FlopAnalyzer(model, torch.zeros(1, image_channels(model), *shape)).set_op_handle(**HANDLES)
        analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        operators = analyzer.by_module_and_operator()
    finally:
        if chosen is not None:
            os.environ[BACKEND_VARIABLE] = chosen
    check_all_known(analyzer.unsupported_ops())
    for name, module in model.named_modules():
        if isinstance(module, DirectionalSSM) and not operators[name].get(SCAN):
            raise RuntimeError(f'the scans of {name} were not counted: mmlocalmamba.ops.flops.HANDLES lacks the '
                               'operator that runs them')
    flops = Counter({name: int(value) for name, value in analyzer.by_module().items()})
    params = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split('.')
        for depth in range(len(parts)):
            params['.'.join(parts[:depth])] += parameter.numel()
    return Count(flops, params)


def as_in_the_paper(count, model, shape):
    """Return a count in which the mixers of LocalVim are counted as the authors do."""
    flops = count.flops.copy()
    dense = getattr(model.backbone, 'out_type', None) == 'featmap'
    for name, mixer in model.named_modules():
        if isinstance(mixer, LocalVimMixer):
            size = model.backbone.token_grid(*shape)
            token = model.backbone.num_cls_tokens
            inner, channels = mixer.out_proj.in_features, mixer.out_proj.out_features
            rank, state = mixer.ssm.dt_proj_weight.shape[-1], mixer.ssm.A_log.shape[-1]
            pad = model.backbone.window_pad == 'zero'
            steps = [len(scan_index(direction, *size, pad=pad)) + token for direction in mixer.directions]
            value = authors_mixer_flops(
                size[0] * size[1] + token, steps, channels, inner, len(mixer.directions), state, rank,
                mixer.conv_weight.shape[-1], mixer.scattn.global_reduce.out_features if mixer.scattn else 0, dense)
            difference = value - flops[name]
            for part in count.flops:
                if part == '' or f'{name}.'.startswith(f'{part}.'):
                    flops[part] += difference
                elif part.startswith(f'{name}.'):
                    del flops[part]  # the authors' formulas do not have these parts
    return Count(flops, count.params)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='configuration file')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='image size')
    parser.add_argument('--convention', choices=CONVENTIONS, default='exact')
    parser.add_argument('--modules', type=int, nargs='?', const=2, default=0, metavar='DEPTH',
                        help='print each module down to DEPTH (default: 2), too')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    shape = tuple(args.shape or SHAPES[cfg.default_scope])
    model = build(cfg)
    count = count_flops(model, shape)
    flops, params = count if args.convention == 'exact' else as_in_the_paper(count, model, shape)
    modules = [name for name in flops if name and name.count('.') < args.modules and (flops[name] or params[name])]
    if args.json:
        print(json.dumps(dict(
            config=args.config, shape=shape, convention=args.convention, flops=flops[''], params=params[''],
            modules={name: dict(flops=flops[name], params=params[name]) for name in modules}), indent=1))
        return
    for name in modules:
        print(f'{name:40} {params[name] / 1e6:10.3f} M params {flops[name] / 1e9:10.3f} GFLOPs')
    print(f'{shape[0]}x{shape[1]}, {args.convention}: {params[""] / 1e6:.3f} M params, {flops[""] / 1e9:.3f} GFLOPs')


if __name__ == '__main__':
    main()
