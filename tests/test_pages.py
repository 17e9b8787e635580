"""Pages that a reader follows word for word: their commands and files, in order, in one folder. And the notebook."""
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
# Page: what must exist at the end.
PAGES = {
    'own_classification': ['found_classes/*.png', 'work_dirs/my_classes/epoch_2.pth'],
    'own_boxes': ['found/boxes/vis/*.png', 'data/converted/from_yolo.json', 'data/converted/from_voc.json'],
    'own_masks': ['found/masks/vis/*.png'],
    'own_segmentation': ['found/pixels/vis/*.png'],
    'finetune': ['work_dirs/my_finetuning/epoch_2.pth', 'work_dirs/decay/epoch_2.pth'],
}


def steps(page):
    """(kind, text) of the blocks: commands, Python, or a file of the reader's, which begins with its name."""
    for language, text in re.findall(r'^```(bash|python)\n(.*?)^```', page.read_text(), flags=re.S | re.M):
        name = re.match(r'# ([\w/]+\.py)\n', text)
        yield ('file', name[1], text) if name else (language, None, text)


def is_onedl():
    try:
        version('onedl-mmengine')
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture
def run(tmp_path):
    """Runs a block as a reader would, in a folder with what a clone has."""
    for name in ('configs', 'tools', 'docs'):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
                       PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')

    def block(kind, name, text):
        if kind == 'file':
            (tmp_path / name).write_text(text)
            Config.fromfile(tmp_path / name)
            return
        if is_onedl():
            text = re.sub(r'\b(mim \w+) mmdet\b', r'\1 mmdetection', text)
        text = re.sub(r'^pip install .*\n', '', text, flags=re.M)  # the environment of the tests has it
        command = ['bash', '-euc', text] if kind == 'bash' else [sys.executable, '-c', text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, timeout=600,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f'{text}\n{done.stdout[-4000:]}'

    return block


@pytest.mark.parametrize('name', PAGES)
def test_a_reader_gets_to_the_end(name, run, tmp_path):
    if name == 'own_boxes':
        pytest.importorskip('globox')
    for step in steps(ROOT / 'docs' / f'{name}.md'):
        run(*step)
    for pattern in PAGES[name]:
        assert any(tmp_path.glob(pattern)), pattern


def test_the_notebook_runs(run, tmp_path):
    """Its cells in one process; a line that begins with ! is a command, as in IPython."""
    cells = json.loads((ROOT / 'docs/quickstart.ipynb').read_text())['cells']
    code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    assert all(not cell.get('outputs') for cell in cells), 'outputs belong to who runs it'
    script = 'import subprocess\n' + '\n'.join(
        re.sub(r'^!(.+)$', r'subprocess.run(f"""\1""", shell=True, check=True)', cell, flags=re.M) for cell in code)
    run('python', None, script + "\nfigure.savefig('orders.png')\nassert len(infer(digits)) == len(digits) == 10")
    assert (tmp_path / 'orders.png').is_file() and (tmp_path / 'work_dirs/quickstart/epoch_4.pth').is_file()
