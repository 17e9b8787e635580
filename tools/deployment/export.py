"""Export a trained model to a file that other programs run: ONNX, or PyTorch's .pt2.

    python tools/deployment/export.py CONFIG CHECKPOINT OUT.onnx [--shape H W] [--batch 1|dynamic]
    python tools/deployment/export.py CONFIG CHECKPOINT OUT.pt2 [--aoti] [--plain]

Classifiers, segmentors, Faster R-CNN and Mask R-CNN are exported as a whole. --features exports the backbone and the
neck of any model. The file takes normalised images of one size. Its metadata hold mean, std, the order of channels and
the class names. The script runs the file and compares it with PyTorch before it gives the file its name, and removes a
file that disagrees. CHECKPOINT 'none' exports random weights, to measure speed.
"""
import argparse
import os
import sys
import time

import numpy as np
import torch
from mmengine.config import Config, DictAction

from mmlocalmamba.deployment import exporting, graphs, runtimes
from mmlocalmamba.openmmlab.deployment import load_model, tested_size
from mmlocalmamba.openmmlab.deployment import metadata as make_metadata

# The largest allowed error, relative to the largest value.
TOLERANCES = {'float32': 1e-4, 'float16': 1e-2, 'int8': 0.3}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='configuration file')
    parser.add_argument('checkpoint', help="file or URL, ours or the authors'; 'none' for random weights")
    parser.add_argument('out', help='file to write: .onnx or .pt2')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'),
                        help='image size (default: that of the test; if its images differ, 800 1344 for detectors, 512 '
                             '512 for segmentors)')
    parser.add_argument('--batch', choices=['1', 'dynamic'], default='1', help='number of images')
    parser.add_argument('--features', action='store_true', help='export only the backbone and the neck')
    parser.add_argument('--aoti', action='store_true', help='.pt2: compile for this processor with AOTInductor')
    parser.add_argument('--plain', action='store_true',
                        help=".pt2: use only PyTorch's operators, so that the file runs without this package; slower")
    parser.add_argument('--weights', choices=list(TOLERANCES), default='float32',
                        help='.onnx: float16 halves the file; int8 also computes linear layers in 8 bits')
    parser.add_argument('--check', metavar='IMAGE', help='image for the comparison (default: noise)')
    parser.add_argument('--no-check', action='store_true', help='do not run the file')
    parser.add_argument('--runtimes', nargs='+', choices=['onnxruntime', 'openvino'], default=['onnxruntime'],
                        help='.onnx: runtimes to compare with PyTorch')
    parser.add_argument('--tolerance', type=float,
                        help='largest relative error (default: 1e-4, float16 1e-2, int8 0.3)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings')
    args = parser.parse_args()
    kind = os.path.splitext(args.out)[1]
    if kind not in exporting.FORMATS:
        parser.error(f'{args.out}: the name must end in {" or ".join(exporting.FORMATS)}')
    if kind == '.onnx' and (args.aoti or args.plain):
        parser.error('--aoti and --plain are for .pt2 files')
    if kind == '.pt2' and args.weights != 'float32':
        parser.error('--weights is for .onnx files')
    return args


def read_picture(path, metadata):
    """Return an image as the file's input."""
    from PIL import Image
    mode = {'RGB': 'RGB', 'BGR': 'RGB', 'GREY': 'L'}.get(metadata['channels'])
    try:
        picture = Image.open(path)
        picture = picture.convert(mode) if mode else picture
    except OSError as error:
        sys.exit(f'--check {path}: the image cannot be read ({error})')
    if mode is None and len(picture.getbands()) != int(metadata['channels']):
        sys.exit(f'--check {path}: the image has {len(picture.getbands())} channels, the model {metadata["channels"]}')
    pixels = np.asarray(picture.resize((metadata['width'], metadata['height']), Image.BILINEAR))
    return runtimes.normalised(pixels, metadata)


def main():
    args = parse_args()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    try:
        export(args, cfg)
    except (RuntimeError, ValueError, NotImplementedError, FileNotFoundError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


def export(args, cfg):
    shape = tuple(args.shape or tested_size(cfg))
    model, classes = load_model(cfg, None if args.checkpoint == 'none' else args.checkpoint)
    graph = graphs.graph_of(model, shape, args.features)
    metadata = make_metadata(cfg, graph, shape, classes)
    any_batch = args.batch == 'dynamic'
    onnx = args.out.endswith('.onnx')
    tolerance = TOLERANCES[args.weights] if args.tolerance is None else args.tolerance

    def write(path):
        start = time.perf_counter()
        if onnx:
            nodes = exporting.to_onnx(graph, shape, path, metadata, any_batch, args.weights)
        elif args.aoti:
            nodes = exporting.to_aoti(graph, shape, path, metadata, any_batch, args.plain)
        else:
            nodes = exporting.to_pt2(graph, shape, path, metadata, any_batch, args.plain)
        print(f'images of {shape[0]}x{shape[1]}, {nodes} nodes, {os.path.getsize(path) / 1e6:.1f} MB (weights: '
              f'{4e-6 * sum(value.numel() for value in model.parameters()):.1f} MB in float32), '
              f'{time.perf_counter() - start:.0f} s')

    def check(path):
        if args.no_check:
            return
        images = (np.random.default_rng(0).standard_normal((1, graph.channels, *shape), dtype=np.float32)
                  if args.check is None else read_picture(args.check, metadata))
        if any_batch:
            images = np.concatenate([images, images[..., ::-1], images[..., ::-1, :]])
        expected = [value.numpy() for value in exporting.run_eager(graph, torch.from_numpy(images))]
        for runtime in args.runtimes if onnx else [None]:
            found = runtimes.open_file(path, runtime).run(images)
            for line, error in exporting.errors(graph, expected, found):
                print(f'{runtime or "torch"}: {line}')
                if not error <= tolerance:  # NaN is not
                    raise RuntimeError(f'{args.out} was not written: it differs from PyTorch by {error:.1e} on '
                                       f'{args.check or "noise"}, more than --tolerance {tolerance:g} allows')

    exporting.write_checked(args.out, write, check)
    print(args.out)


if __name__ == '__main__':
    main()
