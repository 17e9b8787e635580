"""Write a training's weights to a small file for release, and test the model before and after.

    python research/publish.py CONFIG CHECKPOINT NAME.safetensors

The file holds only the weights, with matrices in 16 bits, the class names and the scan directions. It holds neither the
optimizer nor averaged weights. The configuration's test runs with CHECKPOINT and with the file, and the script prints
both results. If a metric loses more than the share --tolerance, the script writes nothing and exits with 1.

The file works wherever a checkpoint does: init_cfg, load_from, mim test, inferencers. The package ships files in
mmlocalmamba/weights/packaged as mmlocalmamba://NAME.
"""
import argparse
import json
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
from mmengine.fileio import dump
from robustness import build, make_parser, parse, test_of, tested

from mmlocalmamba.files import SUFFIX, load_checkpoint, save_safetensors, write_whole
from mmlocalmamba.weights.loading import read


def contents(checkpoint):
    """Return the state dict and the metadata to write."""
    loaded = load_checkpoint(checkpoint)
    found = read(loaded)
    weights = OrderedDict(found.weights)
    weights._metadata = found.metadata or {found.prefix.rstrip('.'): found.requirements}
    meta = {key: value for key, value in loaded.get('meta', {}).items()
            if key in ('dataset_meta', 'epoch', 'iter', 'seed')}
    return weights, json.loads(dump(meta, file_format='json'))  # the dump converts sets and arrays


def results(config, checkpoint, options, folder):
    """Run the configuration's test and return {metric: value}."""
    runner = build(argparse.Namespace(config=config, checkpoint=str(checkpoint), cfg_options=options), folder)
    found = tested(runner.model, *test_of(runner))
    return {name: float(value) for name, value in found.items() if np.isscalar(value)}


def main(arguments=None):
    parser = make_parser(__doc__, table=False)
    parser.add_argument('out', type=Path, metavar='NAME.safetensors')
    parser.add_argument('--tolerance', type=float, default=0.003,
                        help='largest loss, as a share of a metric (default: %(default)s)')
    args = parse(parser, arguments)
    if args.out.suffix != SUFFIX:
        parser.error(f'{args.out}: the name must end in {SUFFIX}')
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, args.out.name)
        try:
            save_safetensors(str(small), *contents(args.checkpoint))
        except (RuntimeError, ValueError) as error:
            sys.exit(f'{args.checkpoint}: {error}')
        before, after = (results(args.config, path, args.cfg_options, str(Path(folder, name)))
                         for name, path in (('before', args.checkpoint), ('after', small)))
        # COCO's metric is -1 for sizes that do not occur.
        worse = {name: (value, after[name]) for name, value in before.items()
                 if after[name] < value - args.tolerance * abs(value)}
        if worse:
            sys.exit('\n  '.join([f'{args.out} was not written: 16 bits cost more than {args.tolerance:.2%}',
                                  *(f'{name}: {old:.4g} before, {new:.4g} after'
                                    for name, (old, new) in worse.items())]))
        write_whole(str(args.out), small.read_bytes())
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.2f} MB')
    print(json.dumps({name: [round(value, 4), round(after[name], 4)] for name, value in before.items()}))


if __name__ == '__main__':
    main()
