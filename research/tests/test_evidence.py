"""Rows of a study differ only in their models, an interrupted table continues, and the statistics are right."""
import csv
import json

import evidence
import pytest
from evidence import STUDIES

ROWS = [(study, row) for study, (_, rows) in STUDIES.items() for row in rows]


def config_of(study, row, seed=0, data=None):
    model, rows = STUDIES[study]
    data = data or evidence.TASKS[model][0]
    wanted = rows[row].get('directions')
    known = not isinstance(wanted, dict) and wanted != 'random'
    directions = None if known else evidence.random_four(evidence.DEPTHS[model], seed)
    return evidence.make_config(model, data, rows[row], seed, epochs=2, directions=directions)


@pytest.mark.parametrize('data', [None, 'digits'])
@pytest.mark.parametrize('study,row', ROWS)
def test_rows_differ_in_their_models_only(study, row, data):
    def recipe(cfg):
        cfg = cfg.to_dict()
        model = cfg.pop('model')
        del model['backbone']
        for part in ('head', 'neck', 'decode_head'):
            model.get(part, {}).pop('in_channels', None)
        return cfg, model

    own, first = config_of(study, row, data=data), config_of(study, next(iter(STUDIES[study][1])), data=data)
    assert recipe(own) == recipe(first)


@pytest.mark.parametrize('study,row', ROWS)
def test_peers_have_the_models_parameters(study, row):
    model = STUDIES[study][0]
    whole = evidence.parameters(evidence.make_config(model, evidence.TASKS[model][0], {}, 0, 1))
    assert 0.85 < evidence.parameters(config_of(study, row)) / whole < 1.07


def test_a_search_is_set_as_the_digits_is():
    search = STUDIES['samplings'][1]['single_path, 1 direction']['directions']['search']
    cfg = evidence.make_config('localvim', 'fashion', dict(directions=search), 0, 3)
    assert cfg.model.backbone.directions.sampling == 'single_path'
    assert [hook.type for hook in cfg.custom_hooks].count('mmlocalmamba.ScanSearchHook') == 1
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.alphas.lr_mult == 10


def test_random_directions_are_the_seeds():
    first, again, other = (evidence.random_four(6, seed) for seed in (0, 0, 1))
    assert first == again != other and all(len(set(block)) == 4 for block in first) and len(first) == 6


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Replace trainings by fixed accuracies. Return the list of requested configurations."""
    asked = []

    def train(cfg, out, metric='accuracy/top1'):
        work_dir = out / f'run{len(asked)}'
        work_dir.mkdir(parents=True)
        asked.append(cfg)
        if isinstance(cfg.model.backbone.get('directions'), dict):
            (work_dir / 'directions.json').write_text(json.dumps(dict(directions=[['v', 'v_flip', 'w2', 'w7']] * 6)))
        return work_dir, 80 + len(asked)

    monkeypatch.setattr(evidence, 'train', train)
    monkeypatch.setattr(evidence, 'parameters', lambda cfg: 1000)
    return asked


def call(tmp_path, *arguments):
    evidence.main([*arguments, '--csv', str(tmp_path / 'table.csv'), '--out', str(tmp_path / 'out')])
    with (tmp_path / 'table.csv').open() as file:
        return list(csv.DictReader(file))


def test_the_table_goes_on_where_it_stopped(trained, tmp_path, capsys):
    one = ('depth', '--rows', 'local scans in all blocks', '--seeds')
    assert [row['value'] for row in call(tmp_path, *one, '0')] == ['81.00']
    rows = call(tmp_path, *one, '0', '1')
    assert [(row['seed'], row['value']) for row in rows] == [('0', '81.00'), ('1', '82.00')] and len(trained) == 2
    assert [cfg.randomness.seed for cfg in trained] == [0, 1]
    rows = call(tmp_path, *one, '0', '--epochs', '9')  # another length makes another row
    assert len(rows) == 3 and trained[-1].train_cfg.max_epochs == 9


def test_a_searched_row_is_trained_with_what_its_search_found(trained, tmp_path):
    call(tmp_path, 'samplings', '--rows', 'partial_channel, 1/4', '--seeds', '0')
    search, training = trained
    assert search.model.backbone.directions.sampling == 'partial_channel'
    assert training.model.backbone.directions == [['v', 'v_flip', 'w2', 'w7']] * 6
    assert 'ScanSearchHook' not in training.pretty_text


def test_mean_interval_and_paired_difference(tmp_path, capsys):
    def rows(name, values):
        return [dict(study='windows', row=name, data='fashion', seed=seed, metric='accuracy/top1', value=value,
                     images=1, epochs=2, parameters=264746) for seed, value in enumerate(values)]

    evidence.write_rows(tmp_path / 'table.csv', evidence.FIELDS,
                        [*rows('w2', [80, 82, 87]), *rows('w7', [81, 83.5, 87.5])])
    evidence.main(['windows', '--report', '--epochs', '2', '--csv', str(tmp_path / 'table.csv')])
    lines = capsys.readouterr().out.splitlines()
    # Student's t is 4.303 for two degrees of freedom; the standard deviations are 3.606, 3.279 and 0.289.
    assert lines[4] == '| w2 | 265 k | 80.00 | 82.00 | 87.00 | 83.00 ± 8.96 |  |'
    assert lines[5] == '| w7 | 265 k | 81.00 | 83.50 | 87.50 | 84.00 ± 8.14 | +1.00 ± 1.24 |'
    evidence.main(['windows', '--report', '--epochs', '2', '--csv', str(tmp_path / 'table.csv'),
                   '--plot', str(tmp_path / 'plot.png')])
    assert (tmp_path / 'plot.png').stat().st_size > 5000


@pytest.mark.parametrize('study,metric,epochs,value', [
    ('windows', 'accuracy/top1', '4', '81.00'), ('detection', 'coco/bbox_mAP', '12', '8100.00'),
    ('segmentation', 'mIoU', '12', '81.00')])
def test_a_study_has_its_tasks_metric_and_length(trained, tmp_path, study, metric, epochs, value):
    """COCO's evaluator gives 0.81 where the others give 81."""
    row, = call(tmp_path, study, '--seeds', '0', '--rows', next(iter(STUDIES[study][1])))
    assert (row['metric'], row['epochs'], row['value']) == (metric, epochs, value)
    cfg, = trained
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval
    assert cfg.train_cfg.get('max_epochs', epochs) == cfg.train_cfg.val_interval or cfg.train_cfg.max_iters == 1200


def test_images_are_those_of_the_training(tiny_digits):
    for study, folder, count in (('windows', '', 'imagenet/train'), ('detection', 'coco/', 'coco/train'),
                                 ('segmentation', 'ade/', 'ade/images/training')):
        dataset = config_of(study, next(iter(STUDIES[study][1])), data='digits').train_dataloader.dataset
        dataset.data_root = str(tiny_digits / folder)
        assert evidence.images_in(dataset) == len(list((tiny_digits / count).rglob('*.png'))) > 0


def test_missing_data_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='data/fashion_mnist.* does not exist.*docs/data.md'):
        evidence.train(config_of('windows', 'w3'), tmp_path / 'out')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_training_that_fails_is_no_result(tmp_path):
    cfg = config_of('windows', 'w3')
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    cfg.model.backbone.directions = ['nowhere']
    with pytest.raises(SystemExit, match='see .*output.txt'):
        evidence.train(cfg, tmp_path)
    assert not list(tmp_path.rglob('result.json')) and 'nowhere' in next(tmp_path.rglob('output.txt')).read_text()


@pytest.mark.parametrize('arguments', [
    ['nothing'], [], ['windows', '--rows', 'w99'], ['windows', '--report'], ['segmentation', '--epochs', '3'],
    ['windows', 'detection', '--report', '--plot', 'x.png']])
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(SystemExit) as error:
        call(tmp_path, *arguments)
    assert error.value.code != 0
