"""The script extends the table of inferences and draws it, and finds other models to compare with."""
import sys
from types import ModuleType

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


@pytest.mark.slow
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


def test_training_steps_alone(monkeypatch, tmp_path):
    table = tmp_path / 'x.csv'
    run(monkeypatch, '--training', '--models', 'LocalVMamba-T', '--sizes', '32', '--batch', '2', '--results', table)
    row, = read_rows(table)
    assert (row['model'], row['what'], row['batch']) == ('LocalVMamba-T', 'training step', '2') and float(row['ms']) > 0


@pytest.mark.parametrize('installed', [True, False])
def test_peers_without_mmpretrain(monkeypatch, capsys, installed):
    """timm is replaced: it is not among the packages of the tests."""
    timm = ModuleType('timm')
    timm.__version__ = '1.0'
    timm.create_model = lambda name, **options: (name, options)
    monkeypatch.setitem(sys.modules, 'mmpretrain.models.backbones', None)
    monkeypatch.setitem(sys.modules, 'timm', timm if installed else None)
    found = benchmark_model.builders('cpu')
    assert ('ConvNeXt-T' in found) == installed and 'LocalVMamba-T' in found
    if installed:
        assert found['Swin-T']((224, 320)) == ('swin_tiny_patch4_window7_224',
                                               dict(features_only=True, img_size=(224, 320)))
    else:
        assert 'Only our models are measured' in capsys.readouterr().err
