"""Test the browser demo without a browser. `make web-demo-test` tests it in one."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import web_demo

from mmlocalmamba.directions import scan_index

DEMO = Path(__file__).resolve().parents[2] / 'docs/demo'
GRIDS = [(1, 1), (8, 8), (14, 14), (5, 7), (7, 5), (1, 6), (9, 2)]
NAMES = ['h', 'v', *(f'w{K}' for K in (*range(1, 10), 14, 20, 256)), 'diag', 'zigzag', 'hilbert']


def node(code, given):
    """Return the value of a JavaScript expression over the page's module `demo` and `given`."""
    if shutil.which('node') is None:
        pytest.skip('Node.js is not installed')
    program = (f"import * as demo from {json.dumps((DEMO / 'demo.js').as_uri())};\n"
               "import {readFileSync} from 'node:fs';\n"
               "const given = JSON.parse(readFileSync(0));\n"
               f'console.log(JSON.stringify({code}));')
    done = subprocess.run(['node', '--input-type=module', '-e', program], input=json.dumps(given), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_scan_orders_are_those_of_python():
    scans = [(name + flip, H, W) for name in NAMES for flip in ('', '_flip') for H, W in GRIDS]
    found = node('given.scans.map(([name, H, W]) => demo.scanSteps(name, H, W, given.tables))',
                 dict(scans=scans, tables=web_demo.tables(GRIDS)))
    for (name, H, W), steps in zip(scans, found, strict=True):
        assert [step['token'] for step in steps] == scan_index(name, H, W).tolist(), (name, H, W)
        # Each step has its own place. The place is inside the grid if and only if the step is not a pad.
        assert len({(step['row'], step['col']) for step in steps}) == len(steps)
        assert all(step['token'] == (step['row'] * W + step['col'] if step['row'] < H and step['col'] < W else -1)
                   for step in steps)


@pytest.mark.parametrize('name', ['w0', 'w257', 'x', 'w', 'h_flip_flip', 'w-1', 'hilbert'])
def test_unknown_scans_are_errors(name):
    """One of them is known elsewhere but has no table here."""
    code = '(() => { try { return demo.scanSteps(given, 5, 7).length } catch (error) { return error.message } })()'
    assert node(code, name) == f'no scan {name} of 5x7 tokens'


@pytest.mark.parametrize('channels', ['RGB', 'BGR'])
def test_pixels_are_normalised_as_in_python(channels, tmp_path):
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'picture.png')
    metadata = dict(height=3, width=4, mean=[1., 20., 30.], std=[40., 5., 60.], channels=channels)
    expected = web_demo.normalised(tmp_path / 'picture.png', metadata)
    rgba = np.dstack([pixels, np.full((3, 4, 1), 255)]).ravel().tolist()
    found = node('Array.from(demo.normalise(given.pixels, given.metadata))', dict(pixels=rgba, metadata=metadata))
    assert expected.shape == (1, 3, 3, 4)
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-6)
    with pytest.raises(SystemExit, match='has 3x4 pixels, the model takes 3x5'):
        web_demo.normalised(tmp_path / 'picture.png', dict(metadata, width=5))


def test_shares_of_large_logits():
    assert node('demo.softmax(given)', [1000, 1000, -1000]) == pytest.approx([0.5, 0.5, 0])


def test_the_page_takes_nothing_from_elsewhere():
    sources = {path.name: path.read_text() for path in DEMO.iterdir() if path.name in web_demo.PAGE}
    assert sorted(sources) == sorted(web_demo.PAGE)
    loaded = re.findall(r'(?:src|<link[^>]* href)="([^"]+)"', sources['index.html'])
    assert sorted(loaded) == ['data:,', 'demo.js', 'style.css']
    for name in ('demo.js', 'style.css'):
        assert not re.search(r'https?://|@import|url\(', sources[name])
    # The page has the elements that the script looks up.
    ids = set(re.findall(r'\bid="([\w-]+)"', sources['index.html']))
    used = set(re.findall(r"\$\('([\w-]+)'\)", sources['demo.js']))
    assert used and used <= ids


def test_the_runtime_is_pinned_with_its_checksum():
    package = json.loads((DEMO / 'package.json').read_text())
    lock = json.loads((DEMO / 'package-lock.json').read_text())['packages']
    for name, version in {**package['dependencies'], **package['devDependencies']}.items():
        assert lock[f'node_modules/{name}']['version'] == version
    assert all(entry['integrity'].startswith('sha512-') for name, entry in lock.items() if name)


@pytest.mark.parametrize('program, message', [
    ('chromium', 'Chromium is not installed: apt-get install chromium'),
    ('node', 'Node.js is not installed: apt-get install nodejs npm'),
])
def test_the_test_says_what_is_missing(program, message, monkeypatch):
    monkeypatch.setattr(web_demo.shutil, 'which', lambda name: None if program in name else f'/usr/bin/{name}')
    monkeypatch.setattr(sys, 'argv', ['web_demo.py', 'test'])
    if program == 'chromium':
        monkeypatch.setattr(web_demo.shutil, 'which', lambda name: None)
    with pytest.raises(SystemExit, match=re.escape(message)):
        web_demo.main()


@pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')
def test_the_build_trains_nothing():
    done = subprocess.run(['make', '-n', 'web-demo'], cwd=DEMO.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'web_demo.py build' in done.stdout and 'train' not in done.stdout


@pytest.mark.slow
def test_the_build_takes_the_weights_of_the_package(monkeypatch, tmp_path, tiny_digits):
    """It needs no other checkpoint. The page names the model that it has."""
    import onnx

    from mmlocalmamba.files import SCHEME, packaged_names
    monkeypatch.setattr(web_demo, 'RUNTIME', tmp_path)
    for name in web_demo.RUNTIME_FILES:
        (tmp_path / name).touch()
    monkeypatch.setattr(web_demo, 'DIGITS', tiny_digits / 'imagenet/val')
    monkeypatch.setattr(web_demo, 'BUILT', tmp_path / '_build')
    monkeypatch.setattr(sys, 'argv', ['web_demo.py', 'build'])
    web_demo.main()
    demo = json.loads((tmp_path / '_build/demo.json').read_text())
    assert demo['name'] in packaged_names() and web_demo.CHECKPOINT == SCHEME + demo['name']
    right = re.match(rf'{demo["name"]}, .* classifies ([\d.]+) % of \d+ validation digits', demo['about'])
    assert float(right[1]) > 80
    assert demo['model']['classes'] == list('0123456789') and len(demo['examples']) == 10
    onnx.checker.check_model(str(tmp_path / '_build/model.onnx'))


def test_the_page_names_no_model_by_itself():
    """demo.json has the name."""
    sources = ''.join((DEMO / name).read_text() for name in web_demo.PAGE)
    assert not re.search('LocalVim|LocalVMamba', sources)


def test_the_build_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(web_demo, 'RUNTIME', tmp_path / 'runtime')
    monkeypatch.setattr(sys, 'argv', ['web_demo.py', 'build', 'a.py', 'a.pth'])
    with pytest.raises(SystemExit, match='npm ci'):
        web_demo.main()
    (tmp_path / 'runtime').mkdir()
    for name in web_demo.RUNTIME_FILES:
        (tmp_path / 'runtime' / name).touch()
    monkeypatch.setattr(web_demo, 'DIGITS', tmp_path / 'digits')
    with pytest.raises(SystemExit, match='tools/dataset_converters/digits.py'):
        web_demo.main()
