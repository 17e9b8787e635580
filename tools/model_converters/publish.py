"""A training's weights as a small file to give away, tested before and after.

    python tools/model_converters/publish.py CONFIG CHECKPOINT NAME.safetensors

Weights alone, matrices in 16 bits, with the class names and scan directions; no optimizer, no average that is not the
model. The configuration's test runs with CHECKPOINT and with the file, and both results are printed. Where a metric
loses more than --tolerance of itself, nothing is written (exit code 1).

The file is taken wherever a checkpoint is: init_cfg, load_from, mim test, inferencers. One beside
mmlocalmamba/zoo/__init__.py comes with the package as mmlocalmamba://NAME.
"""
import argparse
import json
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
from mmengine.fileio import dump

from mmlocalmamba import zoo
from mmlocalmamba.compat import load_checkpoint
from mmlocalmamba.files import write_whole
from mmlocalmamba.weights.contents import read

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analysis_tools.robustness import build, make_parser, parse, test_of, tested


def contents(checkpoint):
    """(state dict, meta)"""
    loaded = load_checkpoint(checkpoint)
    found = read(loaded)
    weights = OrderedDict(found.weights)
    weights._metadata = found.metadata or {found.prefix.rstrip('.'): found.facts}
    meta = {key: value for key, value in loaded.get('meta', {}).items()
            if key in ('dataset_meta', 'epoch', 'iter', 'seed')}
    return weights, json.loads(dump(meta, file_format='json'))  # sets and arrays, too


def results(config, checkpoint, options, folder):
    """{metric: value} of the configuration's test."""
    runner = build(argparse.Namespace(config=config, checkpoint=str(checkpoint), cfg_options=options), folder)
    found = tested(runner.model, *test_of(runner))
    return {name: float(value) for name, value in found.items() if np.isscalar(value)}


def main(arguments=None):
    parser = make_parser(__doc__, table=False)
    parser.add_argument('out', type=Path, metavar='NAME.safetensors')
    parser.add_argument('--tolerance', type=float, default=0.003, help='share of a metric (default: %(default)s)')
    args = parse(parser, arguments)
    if args.out.suffix != zoo.SUFFIX:
        parser.error(f'{args.out}: the name must end in {zoo.SUFFIX}')
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, args.out.name)
        try:
            zoo.save(str(small), *contents(args.checkpoint))
        except (RuntimeError, ValueError) as error:
            sys.exit(f'{args.checkpoint}: {error}')
        before, after = (results(args.config, path, args.cfg_options, str(Path(folder, name)))
                         for name, path in (('before', args.checkpoint), ('after', small)))
        worse = {name: (value, after[name]) for name, value in before.items()
                 if after[name] < value - args.tolerance * abs(value)}  # COCO says -1 of sizes that do not occur
        if worse:
            sys.exit('\n  '.join([f'{args.out} was not written: 16 bits cost more than {args.tolerance:.2%}',
                                  *(f'{name}: {old:.4g}, then {new:.4g}' for name, (old, new) in worse.items())]))
        write_whole(str(args.out), small.read_bytes())
    print(f'{args.out}: {args.out.stat().st_size / 1e6:.2f} MB')
    print(json.dumps({name: [round(value, 4), round(after[name], 4)] for name, value in before.items()}))


if __name__ == '__main__':
    main()
