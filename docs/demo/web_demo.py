"""Build and test the browser demo. `make web-demo` and `make web-demo-test` call this script.

    python docs/demo/web_demo.py build [CONFIG CHECKPOINT]
    python docs/demo/web_demo.py test [--only WORD] [--screenshots FOLDER]

`build` exports a classifier of digits, by default the one that comes with the package, and writes it to
docs/demo/_build, with the page of docs/demo, ONNX Runtime Web, examples and tables of scans. Any file server can serve
that folder. `test` serves it, opens the page in a headless Chromium and
compares its results with those of onnxruntime and mmlocalmamba.directions in Python.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / 'docs/demo'
BUILT = SOURCE / '_build'
PAGE = ('index.html', 'style.css', 'demo.js')
RUNTIME = SOURCE / 'node_modules/onnxruntime-web/dist'
# {file: name that the page loads}. A file server may not know the type of .mjs files.
RUNTIME_FILES = {'ort.wasm.bundle.min.mjs': 'ort.js', 'ort-wasm-simd-threaded.wasm': 'ort-wasm-simd-threaded.wasm'}
DIGITS = ROOT / 'data/digits/imagenet/val'
PHOTO = ROOT / 'data/digits/coco/val/0000_astronaut.png'
SHAPE = ('32', '32')
# Packaged weights, so that the demo needs no training.
CONFIG = ROOT / 'configs/localvim-nano_digits.py'
CHECKPOINT = 'mmlocalmamba://localvim-nano_digits'
# Token grids in addition to the model's.
OTHER_GRIDS = {(14, 14): '14x14 (224 pixels, patches of 16)'}
# The page computes these scans itself. tests/tools/test_web_demo.py compares them with Python's.
COMPUTED = ('h', 'v', 'w<K>')


def tables(grids):
    """Return {'8x8': {name: tokens}} of the directions that the page does not compute."""
    from mmlocalmamba import directions
    names = [name for name in directions._SCANS if name not in COMPUTED and '<K>' not in name]
    return {f'{H}x{W}': {name: directions.scan_index(name, H, W).tolist() for name in names} for H, W in grids}


def normalised(path, metadata):
    """Return an image of the model's size as the file's input."""
    from mmlocalmamba.deployment import runtimes
    pixels = np.asarray(Image.open(path).convert('RGB'))
    if pixels.shape[:2] != (metadata['height'], metadata['width']):
        sys.exit(f'{path} has {pixels.shape[0]}x{pixels.shape[1]} pixels, the model takes '
                 f'{metadata["height"]}x{metadata["width"]}')
    return runtimes.normalised(pixels, metadata)


def grids_of(config, metadata):
    """Return {(H, W): label} of the model's stages and of other grids, and the model's directions."""
    from mmengine.config import Config

    from mmlocalmamba.openmmlab.deployment import load_model
    model, _ = load_model(Config.fromfile(config), None)
    backbone, found = model.backbone, {}
    side = metadata['height'] // backbone.patch_size, metadata['width'] // backbone.patch_size
    stages = len(getattr(backbone, 'stages', [None]))
    for stage in range(stages):
        grid = side[0] >> stage, side[1] >> stage
        if min(grid) > 1:  # a single token has only one order
            name = f'this model, stage {stage + 1}' if stages > 1 else 'this model'
            found[grid] = f'{grid[0]}x{grid[1]} ({name})'
    return {**found, **OTHER_GRIDS}, list(dict.fromkeys(name for block in backbone.directions for name in block))


def build(args):
    from mmlocalmamba.deployment import runtimes
    if not all((RUNTIME / name).is_file() for name in RUNTIME_FILES):
        sys.exit(f'{RUNTIME} is missing. Install it: npm ci --prefix {SOURCE}')
    if not DIGITS.is_dir():
        sys.exit(f'{DIGITS} is missing. Write it: python tools/dataset_converters/digits.py data/digits')
    with tempfile.TemporaryDirectory(dir=BUILT.parent, prefix='_build.') as folder:
        out = Path(folder) / 'page'
        for name in ('ort', 'examples'):
            (out / name).mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, ROOT / 'tools/deployment/export.py', args.config, args.checkpoint, out / 'model.onnx',
             '--shape', *SHAPE, '--weights', 'float16'], stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)  # the exporter has printed the reason
        opened = runtimes.open_file(str(out / 'model.onnx'), 'onnxruntime', threads=1)
        metadata = opened.metadata
        grids, directions = grids_of(args.config, metadata)
        pictures = sorted(DIGITS.glob('*/*.png'))
        right = np.mean([metadata['classes'][opened.run(normalised(path, metadata))[0].argmax()] == path.parent.name
                         for path in pictures])
        examples = []
        for label in metadata['classes']:
            shutil.copy(min((DIGITS / label).glob('*.png')), out / 'examples' / f'{label}.png')
            examples.append(dict(file=f'examples/{label}.png', label=f'validation digit {label}'))
        megabytes = (out / 'model.onnx').stat().st_size / 1e6
        name = Path(args.config).stem
        about = (f'{name}, {megabytes:.1f} MB with weights in 16 bits, classifies {100 * right:.1f} % of '
                 f'{len(pictures)} validation digits correctly. It knows only digits, white on black, and takes '
                 'any other picture for a digit.')
        (out / 'demo.json').write_text(json.dumps(dict(
            name=name, model=metadata, directions=directions, about=about, examples=examples, tables=tables(grids),
            grids=[dict(height=H, width=W, label=label) for (H, W), label in grids.items()])))
        for name in PAGE:
            shutil.copy(SOURCE / name, out)
        for name, short in RUNTIME_FILES.items():
            shutil.copy(RUNTIME / name, out / 'ort' / short)
        shutil.rmtree(BUILT, ignore_errors=True)
        out.rename(BUILT)
    size = sum(path.stat().st_size for path in BUILT.rglob('*') if path.is_file())
    place = os.path.relpath(BUILT)
    print(f'{about}\n{place}: {size / 1e6:.1f} MB. To see it: python -m http.server --directory {place}')


def expected():
    """Return the results that the page must show: logits of validation digits, tables of scans."""
    from mmlocalmamba.deployment import runtimes
    from mmlocalmamba.directions import scan_index
    opened = runtimes.open_file(str(BUILT / 'model.onnx'), 'onnxruntime', threads=1)
    files = [path for folder in sorted(DIGITS.iterdir()) for path in sorted(folder.glob('*.png'))[1:4]]
    names = ['h', 'v_flip', 'w2', 'w7', 'w3_flip', 'w20', 'diag', 'zigzag_flip', 'hilbert']
    demo = json.loads((BUILT / 'demo.json').read_text())
    return dict(
        name=demo['name'], classes=opened.metadata['classes'],
        images=[dict(file=str(path), logits=opened.run(normalised(path, opened.metadata))[0][0].tolist())
                for path in files],
        scans=[dict(name=name, grid=index, height=grid['height'], width=grid['width'],
                    table=scan_index(name, grid['height'], grid['width']).tolist())
               for index, grid in enumerate(demo['grids']) for name in names])


def test(args):
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None:
        sys.exit('Chromium is not installed: apt-get install chromium')
    if shutil.which('node') is None:
        sys.exit('Node.js is not installed: apt-get install nodejs npm')
    if not (BUILT / 'model.onnx').is_file():
        sys.exit('The demo is not built. Build it: make web-demo')
    with ThreadingHTTPServer(('127.0.0.1', 0), Quiet) as server, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given = Path(folder) / 'expected.json'
        given.write_text(json.dumps(dict(
            expected(), url=f'http://127.0.0.1:{server.server_port}/', chromium=chromium,
            only=args.only, screenshots=str(Path(args.screenshots).resolve()), photo=str(PHOTO))))
        done = subprocess.run(['node', SOURCE / 'test.js', given])
        server.shutdown()
    sys.exit(done.returncode)


class Quiet(SimpleHTTPRequestHandler):
    """Serve docs/demo/_build as `python -m http.server` does, but do not print each request."""

    def __init__(self, *args):
        super().__init__(*args, directory=str(BUILT))

    def log_message(self, *args):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('build', help='build docs/demo/_build from a trained classifier of digits')
    command.add_argument('config', nargs='?', help="configuration file (default: the package's classifier of digits)")
    command.add_argument('checkpoint', nargs='?', help='its checkpoint')
    command.set_defaults(run=build)
    command = commands.add_parser('test', help='test the page in a headless Chromium')
    command.add_argument('--screenshots', default='work_dirs/web_demo', metavar='FOLDER',
                         help='folder for screenshots of the page (default: work_dirs/web_demo)')
    command.add_argument('--only', default='', metavar='WORD', help='run only checks whose names contain WORD')
    command.set_defaults(run=test)
    args = parser.parse_args()
    if args.run is build:
        if args.config is None:
            args.config, args.checkpoint = CONFIG, CHECKPOINT
        elif args.checkpoint is None:
            parser.error(f'{args.config} needs a CHECKPOINT')
    args.run(args)


if __name__ == '__main__':
    main()
