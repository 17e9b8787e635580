"""Convert checkpoints of LocalMamba, Vim or VMamba to ours, or ours to LocalMamba's.

The script reads checkpoints of the authors' implementation (hunto/LocalMamba), of Vim (hustvl/Vim, the released models
with a class token in the middle) and of VMamba, versions 0 and 2 (MzeroMiko/VMamba). It converts detectors and
segmentors, too. Weights outside the backbone keep their names.

    python tools/model_converters/official_to_mmlocalmamba.py SRC DST
    python tools/model_converters/official_to_mmlocalmamba.py --to-official SRC DST

SRC holds a state dict at its top level or under one of several names. The script takes the first one; --key names
another, e.g. model_ema. DST loads with strict=True into the configuration's model. If weights of the backbone are
unknown, missing or have a wrong shape, the script lists them, writes nothing and exits with 1. Configurations and mim
test also take the authors' files directly. A converted file is for sharing and for inferencers.
"""
import argparse
import math
import sys
from collections import OrderedDict
from functools import partial

import torch

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.files import load_checkpoint, write_whole
from mmlocalmamba.weights import STATE_DICT_KEYS, architecture, find_state_dict, from_official, to_official
from mmlocalmamba.weights.loading import read


def expected_shapes(weights):
    """Return {name: shape} of the model whose size the weights show."""
    names = list(weights)
    scattn = any('.scattn.' in name for name in names)
    spatial = any('.spatial_select.' in name for name in names)
    search = any(name.endswith('mixed_scan.alphas') for name in names)
    found = architecture({name[len('backbone.'):]: weights[name] for name in names if name.startswith('backbone.')})
    if found is None:
        raise ValueError('it has no blocks')
    arch, depths, channels = found
    prefix = 'layers' if arch == 'LocalVim' else 'stages.{}.blocks'
    blocks = [f'backbone.{prefix.format(stage)}.{block}.mixer.'
              for stage, depth in enumerate(depths) for block in range(depth)]

    def directions(block):
        K = len(weights[f'{block}ssm.D'])
        return [f'w{index + 1}' for index in range(K)]  # the names do not change the shapes

    inner = weights[f'{blocks[0]}out_proj.weight'].shape[1]
    dt_rank = weights[f'{blocks[0]}ssm.dt_proj_weight'].shape[-1]
    sizes = dict(d_state=weights[f'{blocks[0]}ssm.A_log'].shape[-1], expand=inner / channels[0],
                 dt_rank='auto' if dt_rank == math.ceil(channels[0] / 16) else dt_rank)
    patch = weights['backbone.patch_embed.projection.weight'].shape
    convolutions = 'backbone.patch_embed.projection2.weight' in weights
    if arch == 'LocalVMamba':
        mlp = weights.get('backbone.stages.0.blocks.0.mlp.fc1.weight')
        sizes.update(gate=len(weights[f'{blocks[0]}in_proj.weight']) == 2 * inner,
                     conv_bias=f'{blocks[0]}conv2d.bias' in weights,
                     mlp_ratio=0. if mlp is None else len(mlp) / channels[0],
                     patch_embed='conv' if convolutions else 'patch',
                     downsample='conv' if 'backbone.stages.0.downsample.conv.weight' in weights else 'merge')
    kwargs = dict(scattn=dict(spatial=spatial) if scattn else False, in_channels=patch[1],
                  patch_size=4 if convolutions else patch[2],  # strides of convolutions do not change the shapes
                  directions='search' if search else [directions(block) for block in blocks])
    with torch.device('meta'):
        if arch == 'LocalVim':
            cls_token = 'backbone.cls_token' in weights
            taps = sum(name.startswith('backbone.out_norms.') and name.endswith('weight') for name in names)
            tokens = weights['backbone.pos_embed'].shape[1] - int(cls_token)
            backbone = LocalVim(
                dict(embed_dims=channels[0], num_layers=depths[0], **sizes), img_size=patch[2] * round(tokens ** 0.5),
                cls_token='middle' if cls_token else 'none', rope=False,
                out_indices=tuple(range(taps)) if taps else -1,
                out_type='featmap' if taps else 'cls_token' if cls_token else 'avg_featmap', **kwargs)
        else:
            backbone = LocalVMamba(
                dict(embed_dims=channels, depths=depths, **sizes),
                out_indices=[stage for stage in range(len(depths)) if f'backbone.norm{stage}.weight' in weights] or -1,
                **kwargs)
    shapes = {f'backbone.{name}': value.shape for name, value in backbone.state_dict().items()}
    if 'head.fc.weight' in weights:
        classes, width = weights['head.fc.weight'].shape
        shapes.update({'head.fc.weight': (classes, width), 'head.fc.bias': (classes, )})
    return shapes


def problems(weights):
    """Return a line for each weight under our names that is missing, unknown or has a wrong shape."""
    try:
        shapes = expected_shapes(weights)
    except KeyError as error:
        return [f'missing: {error.args[0]}, which determines the size of the model']
    except (ValueError, IndexError) as error:
        return [f'the size of the model is unknown: {error}']
    lines = [f'missing: {name} {tuple(shape)}' for name, shape in shapes.items() if name not in weights]
    lines += [f'unknown: {name}' for name in weights if name.startswith('backbone.') and name not in shapes]
    lines += [f'shape: {name} is {tuple(weights[name].shape)}, expected {tuple(shape)}'
              for name, shape in shapes.items() if name in weights and tuple(weights[name].shape) != tuple(shape)]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='checkpoint to read')
    parser.add_argument('dst', metavar='DST', help='checkpoint to write')
    parser.add_argument('--to-official', action='store_true', help="write the format of LocalMamba's authors from ours")
    parser.add_argument('--key', help=f'entry of SRC that holds the state dict (default: first of '
                        f'{", ".join(STATE_DICT_KEYS)}, or the top)')
    args = parser.parse_args()
    notes = []
    try:
        checkpoint = load_checkpoint(args.src)
        weights = find_state_dict(checkpoint, args.key)
        if args.to_official:
            converted, unmatched = to_official(weights)
            check = weights if any(name.startswith('backbone.') for name in weights) else \
                {f'backbone.{name}': value for name, value in weights.items()}
        else:
            converted, unmatched = from_official(weights)
            contents = read(checkpoint, args.key)
            check, notes = converted, contents.remarks
            converted = OrderedDict(converted)
            converted._metadata = OrderedDict(backbone=contents.requirements)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f'{args.src}: {error}')
    lines = [f'not understood: {name}' for name in unmatched] + problems(check)
    if lines:
        sys.exit('\n  '.join([f'{args.src} was not converted:', *lines]))
    write_whole(args.dst, partial(torch.save, dict(state_dict=converted)))
    print('\n  '.join([f'{len(converted)} weights written to {args.dst}', *notes]))


if __name__ == '__main__':
    main()
