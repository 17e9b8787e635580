"""research/tables.md has the rows of the script, and a row that differs needs a note."""
from collections import Counter
from pathlib import Path

import get_flops
import reproduce_tables

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row for table in reproduce_tables.TABLES for row in table.rows]


def test_the_page_has_every_row():
    written = (ROOT / 'docs' / 'tables.md').read_text()
    lines = [line.split(' | ') for line in written.splitlines() if line.startswith('| ')]
    assert all(f'## {table.title}\n' in written for table in reproduce_tables.TABLES)
    for row in ROWS:
        line, = (cells for cells in lines if cells[0] == f'| {row.model}' and row.accuracy in cells[-1])
        assert line[2] == f'{row.params} M' and line[4] == f'{row.flops:g}' and line[7] in ('exact', "authors'")
        assert row.config in line[1]


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
