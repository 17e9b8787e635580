"""README and docs: what they name exists, what they show in Python runs."""
import itertools
import re
from pathlib import Path

import pytest

from mmlocalmamba import scans

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
CONFIGS = {path.stem for path in (ROOT / 'configs').glob('*.py')}
CONFIG = r'[\w{},*-]+_(?:in1k|coco|ade20k-512x512|digits)\b'


def expand(pattern):
    """Names of a pattern with braces: a{b,c} -> ab, ac."""
    parts = [part.split(',') if index % 2 else [part] for index, part in enumerate(re.split(r'{(.+?)}', pattern))]
    return [''.join(choice) for choice in itertools.product(*parts)]


def without_examples(text):
    """Files of the reader's own project begin with a comment that names them."""
    return re.sub(r'```python\n# my_project/.*?```', '', text, flags=re.S)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = without_examples(page.read_text())
    for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', text):
        assert (page.parent / target).exists(), f'link to {target}'
    for name in re.findall(r'\b(?:tools|requirements|tests)/[\w/{},-]+\.(?:py|sh|txt)\b', text):
        for path in expand(name):
            assert (ROOT / path).is_file(), path
    for pattern in re.findall(rf'(?:`|configs/)({CONFIG})', text):
        for name in expand(pattern):
            assert name in CONFIGS or '*' in name, f'configuration {name}'


@pytest.mark.parametrize('page', ['README.md', 'docs/scans.md', 'docs/own_project.md'])
def test_python_runs(page, monkeypatch):
    monkeypatch.setattr(scans, '_SCANS', dict(scans._SCANS))  # examples register directions
    names, blocks = {}, re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), flags=re.S)
    for block in blocks:
        exec(block, names)
    assert blocks
    for name in set(scans._SCANS) - {'h', 'v', 'w<K>', 'diag', 'zigzag', 'hilbert'}:
        assert len(scans.scan_index(name.replace('<K>', '3'), 5, 7)) == 35


def test_printed_example():
    line, = (line for line in (ROOT / 'docs/scans.md').read_text().splitlines() if line.startswith('scan_index('))
    code, shown = line.split('#')
    assert eval(code, vars(scans)) == eval(shown)
