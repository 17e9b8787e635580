"""The script extends the table of inferences and draws it."""
import sys

import benchmark_model
import pytest
from records import read_rows


@pytest.mark.parametrize('power', [0.5, 1, 2])
def test_slope_is_the_power(power):
    pixels = [50_176, 262_144, 1_048_576]
    assert benchmark_model.slope(pixels, [3 * count ** power for count in pixels]) == pytest.approx(power)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['benchmark_model.py', '--rounds', '1', '--seconds', '0.01', *map(str, arguments)])
    benchmark_model.main()


def test_a_table_goes_on(monkeypatch, tmp_path):
    """Sizes need not be square, and a new measurement replaces the old one."""
    table, picture = tmp_path / 'x.csv', tmp_path / 'x.png'
    for sizes in (('32', '32x72'), ('72x32', '32x72')):
        run(monkeypatch, '--inference', '--models', 'LocalVMamba-T', '--sizes', *sizes, '--csv', table,
            '--plot', picture)
    rows = read_rows(table)
    assert sorted((row['height'], row['width']) for row in rows) == [('32', '32'), ('32', '72'), ('72', '32')]
    assert all(float(row['ms']) > 0 and row['model'] == 'LocalVMamba-T' for row in rows)
    assert picture.stat().st_size > 5_000


def test_a_picture_needs_a_table(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, '--plot', tmp_path / 'x.png')
    assert '--csv' in capsys.readouterr().err
