"""Run the commands and files of pages in order, in one folder, as a reader does, and run the notebook.

A block that a test cannot run has a comment before it that names what it needs. Tests name these blocks in a warning.
"""
import importlib.util
import json
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmlocalmamba.backbones import LocalVim
from mmlocalmamba.weights import to_official

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests' / 'systems'))
from smoke import command, is_onedl  # noqa: E402

# {pages that a reader follows one after the other: files that must exist at the end}. PAGE#TAB is one tab of a page,
# with what stands before and after the tabs.
PAGES = {
    'data#Classes': ['found_classes/*.png', 'work_dirs/my_classes/epoch_2.pth'],
    'data#Boxes': ['found/boxes/vis/*.png', 'data/small/coco/annotations/repaired.json', 'my_photo_boxes.py'],
    'data#Masks': ['found/masks/vis/*.png'],
    'data#Segmentation': ['found/pixels/vis/*.png'],
    'training': [
        'work_dirs/my_finetuning/epoch_2.pth', 'work_dirs/localvmamba-nano_digits/epoch_3.pth',
        'work_dirs/localvmamba-nano_digits/*/vis_data/events.*', 'found_classes.png', 'confusion/*.png',
        'work_dirs/two/epoch_1.pth', 'work_dirs/robustness.png', 'work_dirs/few_shot.csv',
        'work_dirs/new_style/epoch_2.pth'],
    'inference': ['found/digits/*.jpg', 'found/objects/*.jpg', 'found/labels/*_labels.png', 'found_classes/*.png',
                  'found/boxes/vis/*.png', 'found/pixels/vis/*.png', 'attention.png'],
    'weights': ['localvim-t.pth', 'under_their_names.ckpt'],
    'deployment': ['digits.onnx', 'detector.onnx', 'labels.png', 'digits.pt2'],
}
# Things that a test does not have.
NEEDS = ('ImageNet', 'COCO', 'ADE20K', 'GPU', 'network', 'machines', 'Slurm', 'compiling', 'own pictures')


def tabs(text):
    """Return {title: text} of the tabs of a page."""
    return dict(re.findall(r'^:::{tab-item} ([^\n]+)\n(.*?)^:::$', text, flags=re.S | re.M))


def steps(page, tab=None):
    """Yield (kind, name, text, need) of the blocks of a page, or of one tab and of what stands around the tabs.

    A block holds commands, Python, or a file of the reader, which begins with its name. ``need`` is what a test lacks,
    or empty.
    """
    text = page.read_text()
    # tests/test_timm.py runs this section, where timm and what is built on it are installed.
    text = re.sub(r'^## Outside of OpenMMLab\n.*?(?=^## )', '', text, flags=re.S | re.M)
    if tab:
        text = re.sub(r'^::::{tab-set}$.*^::::$', lambda found: tabs(found[0])[tab], text, flags=re.S | re.M)
    blocks = re.findall(r'(?:^ *<!-- not run: ([^\n]+) -->\n)?^( *)```(bash|python)\n(.*?)^\2```', text,
                        flags=re.S | re.M)
    assert len(blocks) == len(re.findall('```(?:bash|python)', text)), 'the pattern misses a block'
    for need, _, language, text in blocks:
        text = textwrap.dedent(text)
        name = re.match(r'# ([\w/]+\.py)\n', text)
        yield ('file', name[1], text, need) if name else (language, None, text, need)


def released_file(path):
    """Write a file like the authors' of LocalVim-T, with random weights."""
    torch.manual_seed(0)
    weights, unknown = to_official(LocalVim('tiny').state_dict())
    assert not unknown
    torch.save(dict(state_dict=weights), path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a block as a reader would, in a folder with the contents of a clone."""
    for name in ('configs', 'tools', 'docs', 'research'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'data/small').mkdir(parents=True)
    (tmp_path / 'data/small/SOURCES.md').touch()  # another page makes it
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONWARNINGS', 'ignore')
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')

    def block(kind, name, text, need=''):
        if need:
            assert any(word in need for word in NEEDS), need
            warnings.warn(f'not run, because it needs {need}: {text}', stacklevel=2)
        elif kind == 'file':
            (tmp_path / name).write_text(text)
            Config.fromfile(tmp_path / name)
        else:
            if is_onedl():
                text = re.sub(r'\b(mim \w+) mmdet\b', r'\1 mmdetection', text)
            text = re.sub(r'^pip install .*\n', '', text, flags=re.M)  # the environment of the tests has the package
            command(['bash', '-euc', text] if kind == 'bash' else [sys.executable, '-c', text], tmp_path)

    return block


def boxes(path):
    """Return [(file name, class, box)] of a COCO file."""
    content = json.loads(path.read_text())
    files = {row['id']: row['file_name'] for row in content['images']}
    names = {row['id']: row['name'] for row in content['categories']}
    return sorted((files[row['image_id']], names[row['category_id']], row['bbox']) for row in content['annotations'])


def check_boxes(folder):
    """The converted file has the boxes of its source."""
    annotations = folder / 'data/small/coco/annotations'
    converted, source = boxes(annotations / 'repaired.json'), boxes(annotations / 'instances_val.json')
    assert [row[:2] for row in converted] == [row[:2] for row in source]
    np.testing.assert_allclose([row[2] for row in converted], [row[2] for row in source], atol=1e-2)


def check_labels(folder):
    """The labels are ADE20K's minus one; 0 is ignored."""
    for path in (folder / 'data/small/ade/annotations').rglob('*.png'):
        source = np.asarray(Image.open(path))
        labels = np.asarray(Image.open(folder / 'data/small/labels' / path.parent.name / path.name))
        assert (labels == np.where(source == 0, 255, source - 1)).all() and labels.min() == 0


RESULTS = {'data#Boxes': check_boxes, 'data#Segmentation': check_labels}


@pytest.mark.parametrize('pages', PAGES)
@pytest.mark.slow
def test_a_reader_gets_to_the_end(pages, run, tmp_path):
    released_file(tmp_path / 'local_vim_tiny.ckpt')
    blocks = []
    for page, _, tab in (name.partition('#') for name in pages.split()):
        blocks += steps(ROOT / 'docs' / f'{page}.md', tab)
    if not (ROOT / 'research').is_dir() and any('research/' in text for _, _, text, _ in blocks):
        pytest.skip('research/ is missing')
    for step in blocks:
        run(*step)
    for pattern in PAGES[pages]:
        assert any(tmp_path.glob(pattern)), pattern
    RESULTS.get(pages, lambda folder: None)(tmp_path)


def test_every_tab_is_followed():
    """The tabs are those of the page; each of them has a configuration, a training and a test."""
    named = [name.partition('#')[2] for name in PAGES if '#' in name]
    assert named == list(tabs((ROOT / 'docs/data.md').read_text()))
    for tab in named:
        texts = ''.join(text for _, _, text, _ in steps(ROOT / 'docs/data.md', tab))
        assert all(word in texts for word in ('_base_ = ', 'mmlocalmamba check', 'mim train', 'mim test', 'infer('))


@pytest.mark.parametrize('package', ['mmdet', 'mmpretrain', 'mmseg'])
def test_there_are_no_new_style_files_to_inherit(package):
    """docs/training.md says so. When this fails, a configuration of ours can inherit them."""
    folder = Path(importlib.util.find_spec(package).origin).parent
    assert len(list(folder.rglob('*.py'))) > 100
    assert not [path for path in folder.rglob('*.py') if 'read_base()' in path.read_text(errors='replace')]


def cells_of_the_notebook():
    """Return the code of the cells. A line that begins with ! is a command, as in IPython."""
    cells = json.loads((ROOT / 'docs/quickstart.ipynb').read_text())['cells']
    assert all(not cell.get('outputs') for cell in cells), 'the notebook must not contain outputs'
    code = (''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    return [re.sub(r'^!(.+)$', r'subprocess.run(f"""\1""", shell=True, check=True)', cell, flags=re.M) for cell in code]


# Run cells in one process, and collect what notebooks show below a cell: the value of its last line.
SHOWN = """
import ast, json, os, subprocess

os.chdir('docs')
shown = []
for cell in json.loads(open(CELLS).read()):
    *body, last = ast.parse(cell).body
    if not isinstance(last, ast.Expr):
        body.append(last)
    exec(compile(ast.Module(body, []), 'cell', 'exec'))
    if isinstance(last, ast.Expr):
        shown.append(eval(compile(ast.Expression(last.value), 'cell', 'eval')))
pictures = [x for x in shown if callable(getattr(x, '_repr_png_', None)) and x._repr_png_()]
assert len(pictures) == 2 and pictures[0].width > 600, shown
assert not [x for x in shown if type(x).__name__ == 'Figure'], 'some front ends show it as text'
assert len(digits) == 10
"""


@pytest.mark.slow
def test_the_notebook_runs(run, tmp_path):
    """It is started in docs/, as notebooks are, and goes to the folder above."""
    (tmp_path / 'docs').unlink()
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'cells.json').write_text(json.dumps(cells_of_the_notebook()))
    run('python', None, SHOWN.replace('CELLS', repr(str(tmp_path / 'cells.json'))))
    assert (tmp_path / 'work_dirs/quickstart/epoch_4.pth').is_file()
    assert not list((tmp_path / 'docs').iterdir())


@pytest.mark.parametrize('start', ['.', 'docs', 'docs/demo'])
def test_the_notebook_finds_the_clone(start, monkeypatch):
    monkeypatch.chdir(ROOT / start)
    exec(cells_of_the_notebook()[0], {})
    assert Path.cwd() == ROOT
