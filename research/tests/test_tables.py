"""research/tables.md has the rows of the script, docs/differences.md some of them; a row that differs needs a note."""
from collections import Counter
from pathlib import Path

import get_flops
import reproduce_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'research' / 'tables.md'
ROWS = [row for table in reproduce_tables.TABLES for row in table.rows]


def test_the_page_has_every_row():
    written = PAGE.read_text()
    lines = [line.split(' | ') for line in written.splitlines() if line.startswith('| ')]
    assert written.startswith(reproduce_tables.PREFACE) and f'--out {PAGE.relative_to(ROOT)}`' in written
    assert all(f'## {table.title}\n' in written for table in reproduce_tables.TABLES)
    for row in ROWS:
        line, = (cells for cells in lines if cells[0] == f'| {row.model}' and row.accuracy in cells[-1])
        assert line[2] == f'{row.params} M' and line[4] == f'{row.flops:g}' and (
            line[7] in ('exact', "authors'") or line[7] == 'see below' and row.note)
        assert row.config in line[1] and row.note in written


def test_the_short_table_has_the_same_figures():
    """It names the task before the model. Its FLOPs are those of the column that explains the paper's."""
    def cells(line):
        return [cell.strip() for cell in line.strip('|').split('|')]

    known = [cells(line) for line in PAGE.read_text().splitlines() if line.startswith('| ')]
    short = (ROOT / 'docs/differences.md').read_text().split("## The paper's tables\n")[1]
    rows = [cells(line) for line in short.splitlines() if line.startswith('| ') and 'Local' in line]
    assert len(rows) == 10
    for name, *figures in rows:
        task, _, model = name.rpartition(', ')
        prefix = {'': 'local', 'Mask R-CNN 1x': 'mask-rcnn_', 'UperNet': 'upernet_'}[task]
        line, = (line for line in known if line[0] in (model, f'{model}, 1x') and line[1].strip('`').startswith(prefix))
        counted = line[6] if line[7] == "authors'" else line[5]
        assert figures == [*line[2:5], counted.split(' ')[0], line[8]]


def test_a_difference_needs_a_note(monkeypatch):
    params = Counter({'': 25_527_160, 'backbone': 24_758_160})
    flops = dict.fromkeys(get_flops.CONVENTIONS, 5_720_000_000)
    monkeypatch.setattr(reproduce_tables, 'measure', lambda row, known: (params, flops))
    row = next(row for row in ROWS if row.model == 'LocalVMamba-T')
    cells, wrong = reproduce_tables.compare(row, {})
    assert not wrong and cells[3:] == ['25.53 M', '5.7', '5.72 (+0.4%)', 'the same', 'exact', '82.7']
    assert reproduce_tables.compare(row._replace(params=25), {})[1] == []  # without ImageNet's classes
    assert reproduce_tables.compare(row._replace(params=24, flops=5.), {})[1] == ['parameters', 'FLOPs']
    assert reproduce_tables.compare(row._replace(flops=5., note='why'), {})[1] == []
