"""Corruptions are the same every time and follow the loading of an image; the script runs the configuration's test."""
import csv
import sys

import numpy as np
import pytest
import robustness
import torch
from PIL import Image

imagecorruptions = pytest.importorskip('imagecorruptions')


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.mark.parametrize('name', imagecorruptions.get_corruption_names('all'))
def test_the_same_corruption_every_time_and_nobody_elses_numbers(image, name):
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    once, again = (robustness.corrupted(image, name, 4, seed=7) for _ in range(2))
    assert np.random.random() == expected
    np.testing.assert_array_equal(once, again)
    assert once.shape == image.shape and once.dtype == np.uint8 and (once != image).mean() > 0.05


def test_severity_grows(image):
    smooth = np.full_like(image, 128)
    distances = [np.abs(robustness.corrupted(smooth, 'gaussian_noise', severity, 0).astype(int) - smooth).mean()
                 for severity in robustness.SEVERITIES]
    assert distances == sorted(distances) and distances[0] > 1


def test_images_smaller_than_the_library_takes():
    image = np.random.default_rng(0).integers(0, 256, (28, 20, 3), np.uint8)
    assert robustness.corrupted(image, 'fog', 1, 0).shape == image.shape


def test_the_cache_gives_what_was_computed(image, tmp_path, monkeypatch):
    step = robustness.CorruptImage(tmp_path)
    assert step(dict(img=image))['img'] is image  # clean
    step.case = 'shot_noise', 2
    first = step(dict(img=image))['img']
    monkeypatch.setattr(robustness, 'corrupted', None)  # a call fails
    np.testing.assert_array_equal(step(dict(img=image))['img'], first)
    step.case = 'shot_noise', 3
    with pytest.raises(TypeError):
        step(dict(img=image))
    assert [path.suffix for path in tmp_path.rglob('*') if path.is_file()] == ['.npy']


def run(*arguments):
    robustness.main([str(argument) for argument in arguments])


@pytest.fixture
def model(configuration, tmp_path):
    """Return a function that writes a configuration with tiny data, and a checkpoint of random weights."""

    def write(name):
        from mmengine.registry import MODELS, DefaultScope
        cfg = configuration(name)
        path = tmp_path / 'config.py'
        cfg.dump(path)
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
        return path, tmp_path / 'model.pth'

    return write


@pytest.mark.parametrize('name,metric', [
    ('localvmamba-nano_digits', 'accuracy/top1'),
    ('upernet_localvmamba-nano_digits', 'aAcc'),
    ('mask-rcnn_localvmamba-nano_digits', 'coco/bbox_mAP'),
])
@pytest.mark.slow
def test_each_task_meets_each_case_once(model, tmp_path, capsys, monkeypatch, name, metric):
    config, checkpoint = model(name)
    table, seen = tmp_path / 'table.csv', []
    corrupt = robustness.corrupted

    def count(image, *case):
        seen.append(case[:2])
        return corrupt(image, *case)

    monkeypatch.setattr(robustness, 'corrupted', count)
    arguments = [config, checkpoint, '--csv', table, '--corruptions', 'contrast', 'pixelate']
    run(*arguments, '--severities', 1)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    cases = [(row['corruption'], row['severity']) for row in rows]
    assert cases == [('none', '0'), ('contrast', '1'), ('pixelate', '1')]
    assert {row['metric'] for row in rows} == {metric}
    images = int(rows[0]['images'])
    assert sorted(seen) == [('contrast', 1)] * images + [('pixelate', 1)] * images
    # More severities: only what is missing.
    seen.clear()
    run(*arguments, '--severities', 1, 5, '--plot', tmp_path / 'plot.png')
    assert sorted(seen) == [('contrast', 5)] * images + [('pixelate', 5)] * images
    with Image.open(tmp_path / 'plot.png') as picture:
        assert picture.width > 300
    out = capsys.readouterr().out
    values = {(row['corruption'], int(row['severity'])): float(row['value']) for row in robustness.read_rows(table)}
    clean = values.pop(('none', 0))
    assert len(values) == 4
    assert f'{metric}: clean {clean:.4g}, mean over corruptions {np.mean(list(values.values())):.4g}' in out


@pytest.mark.slow
def test_models_of_two_tasks_in_one_second(model, tmp_path, monkeypatch):
    import time
    monkeypatch.setattr(time, 'time', lambda: 1e9)  # MMEngine names its experiments by the time
    for name in ('localvmamba-nano_digits', 'upernet_localvmamba-nano_digits'):
        run(*model(name), '--csv', tmp_path / f'{name}.csv', '--corruptions', 'fog', '--severities', 1)
        assert len(robustness.read_rows(tmp_path / f'{name}.csv')) == 2


@pytest.mark.slow
def test_the_clean_score_is_that_of_the_test(model, tmp_path):
    from mmengine.config import Config
    from mmengine.runner import Runner
    config, checkpoint = model('localvmamba-nano_digits')
    run(config, checkpoint, '--csv', tmp_path / 'table.csv', '--corruptions', 'fog', '--severities', 1)
    cfg = Config.fromfile(config)
    cfg.load_from = str(checkpoint)
    expected = Runner.from_cfg(cfg).test()['accuracy/top1']
    assert float(robustness.read_rows(tmp_path / 'table.csv')[0]['value']) == pytest.approx(expected)


def test_pictures_of_another_kind_are_no_severity(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    row = dict(config='a', checkpoint='b', processor='c', torch='d', images=1)
    robustness.write_rows(tmp_path / 'table.csv', robustness.FIELDS, [
        dict(row, corruption='none', severity=0, metric='top1', value=90),
        dict(row, corruption='fog', severity=2, metric='top1', value=60),
        dict(row, corruption='unknown: data/others', severity=0, metric='AUROC', value=0.9)])
    robustness.draw(robustness.argparse.Namespace(csv=tmp_path / 'table.csv', plot=tmp_path / 'plot.png'))
    panel, = figures[0].axes
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[0, 90], [2, 60]]]


def test_summary(tmp_path, capsys):
    """The summary has means over severities, and means with intervals over trainings with different seeds."""
    def rows(config, clean, fogs, other):
        row = dict(config=config, checkpoint='b', processor='c', torch='d', images=1)
        return [dict(row, corruption='none', severity=0, metric='top1', value=clean),
                *(dict(row, corruption='fog', severity=i, metric='top1', value=fog) for i, fog in enumerate(fogs, 1)),
                dict(row, corruption='jpeg_compression', severity=1, metric='top1', value=other),
                dict(row, corruption='unknown: others', severity=0, metric='AUROC', value=other / 100)]

    table = tmp_path / 'table.csv'
    robustness.write_rows(table, robustness.FIELDS, [
        *rows('A, seed 0', 80, (20, 40), 60), *rows('B', 50, (10, 30), 50), *rows('A, seed 1', 60, (20, 20), 50)])
    with pytest.raises(SystemExit) as ended:
        run('--summary', table)
    assert ended.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    head, _, *lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in printed]
    assert head == ['', 'A', 'B']
    # The interval of two values is half their difference times 12.706, by Student's t.
    assert lines == [['clean', '70.00 ± 127.06', '50.00'], ['mean over corruptions', '35.00 ± 63.53', '30.00'],
                     ['share of the clean value, %', '50.00 ± 0.00', '60.00'], ['fog', '25.00 ± 63.53', '20.00'],
                     ['jpeg compression', '55.00 ± 63.53', '50.00'], ['others: AUROC', '0.55 ± 0.64', '0.50']]
    with pytest.raises(SystemExit):
        run('--summary', tmp_path / 'missing.csv')
    assert 'missing.csv: the file has no rows' in capsys.readouterr().err


def test_a_detector_that_finds_nothing_has_a_score():
    assert robustness.metric_of({}, 'coco/bbox_mAP') == ('coco/bbox_mAP', 0)
    assert robustness.metric_of({'coco/bbox_mAP': 0.5, 'coco/segm_mAP': 0.4}, None) == ('coco/bbox_mAP', 0.5)
    with pytest.raises(SystemExit, match='the model detects nothing'):
        robustness.metric_of({}, None)


def test_unknown_pictures(model, tmp_path, capsys, monkeypatch):
    config, checkpoint = model('localvmamba-nano_digits')
    folder = tmp_path / 'others'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(folder / f'{index}.png')
    table = tmp_path / 'table.csv'
    scores = iter([np.linspace(0.5, 1, 40), np.array([0.1, 0.2, 0.3, 0.7, 0.9])])
    found = []
    measure = robustness.largest_probabilities

    def replace(*args):
        found.append(measure(*args))
        return next(scores)

    monkeypatch.setattr(robustness, 'largest_probabilities', replace)
    run(config, checkpoint, '--csv', table, '--unknown', folder)
    assert [len(values) for values in found] == [40, 5]
    assert all((0.1 <= values).all() and (values <= 1).all() for values in found)  # of ten classes
    rows = {row['metric']: float(row['value']) for row in robustness.read_rows(table)}
    # In 40 * 3 + 24 + 8 of 200 pairs, the known image has the larger probability.
    assert rows['AUROC'] == pytest.approx((120 + 24 + 8) / 200)
    assert rows['FPR95'] == pytest.approx(2 / 5)
    assert '40 known images, 5 unknown images' in capsys.readouterr().out


@pytest.mark.parametrize('arguments,message', [
    (['--corruptions', 'rain'], '--corruptions rain: unknown; the names are gaussian_noise'),
    (['--corruptions', 'fog', '--metric', 'mIoU'], '--metric mIoU: the test gives accuracy/top1'),
    (['--unknown', 'missing'], '--unknown missing: the folder has no image'),
])
def test_bad_input(model, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*model('localvmamba-nano_digits'), '--csv', tmp_path / 'table.csv', *arguments)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
    with pytest.raises(SystemExit, match='pip install imagecorruptions-imaug'):
        robustness.corrupted(np.zeros((40, 40, 3), np.uint8), 'fog', 1, 0)
