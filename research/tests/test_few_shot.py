"""The measures on data with a known answer, and the whole command on a tiny classifier."""
import csv

import few_shot
import numpy as np
import pytest
import torch


def clusters(spread, classes=6, of_each=60, width=8, seed=0):
    chance = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), of_each)
    images = np.eye(width)[labels] + spread * chance.standard_normal((len(labels), width))
    return (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32), labels


def test_classes_that_lie_apart_are_told_apart():
    known, others = clusters(0.05), clusters(0.05, seed=1)
    assert few_shot.neighbours(known, others) == few_shot.probe(known, others) == 100
    assert few_shot.episodes(*others, ways=5, shots=1, queries=15, count=20) == (100, 0)


@pytest.mark.parametrize('ways', [2, 5])
def test_chance_is_chance(ways):
    chance = np.random.default_rng(0)
    images, labels = chance.standard_normal((300, 16)), np.arange(300) % 6
    mean, half = few_shot.episodes(images, labels, ways, shots=5, queries=15, count=200)
    assert 0 < half < 2 and abs(mean - 100 / ways) < 2 * half
    assert few_shot.episodes(images, labels, ways, 5, 15, 200) == (mean, half)


def test_more_shots_help():
    data = clusters(0.5)
    means = [few_shot.episodes(*data, ways=5, shots=shots, queries=15, count=100)[0] for shots in (1, 5, 20)]
    assert means == sorted(means) and means[0] < means[2] - 5


def test_near_neighbours_weigh_more():
    """Two near neighbours outweigh eighteen far ones."""
    angles = np.r_[np.full(2, 0.1), np.full(18, 1.2)]
    known = np.stack([np.cos(angles), np.sin(angles)], 1), np.r_[np.zeros(2), np.ones(18)].astype(int)
    assert few_shot.neighbours(known, (np.array([[1., 0.]]), np.array([0]))) == 100


def test_the_first_of_each_class():
    labels = np.array([1, 0, 1, 0, 1])
    images, kept = few_shot.first_of_each((np.arange(5), labels), 2)
    assert images.tolist() == [0, 1, 2, 3] and kept.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize('options,says', [(dict(ways=7), '--ways 7: there are only 6'),
                                          (dict(shots=50), 'class 0 has only 60 images')])
def test_too_few_to_draw_from(options, says):
    with pytest.raises(SystemExit, match=says):
        few_shot.episodes(*clusters(0.1), **{**dict(ways=5, shots=5, queries=15, count=2), **options})


@pytest.fixture
def classifier(configuration, tmp_path):
    from mmengine.registry import MODELS, DefaultScope
    cfg = configuration('localvmamba-nano_digits')
    cfg.dump(tmp_path / 'config.py')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    return tmp_path / 'config.py', tmp_path / 'model.pth'


@pytest.mark.slow
def test_the_command(classifier, tiny_digits, tmp_path, capsys):
    table = tmp_path / 'table.csv'
    arguments = [*map(str, classifier), '--csv', str(table), '--ways', '2', '--shots', '1', '--queries', '1',
                 '--episodes', '3']
    few_shot.main(arguments)
    few_shot.main(arguments)  # it replaces its rows
    rows = list(csv.DictReader(table.open()))
    data = tiny_digits / 'imagenet'
    assert [row['protocol'] for row in rows] == ['20 nearest neighbours', 'linear probe, all images',
                                                 'linear probe, 1 of each class', '2-way 1-shot']
    assert all(0 <= float(row['accuracy']) <= 100 for row in rows)
    assert rows[3]['interval'] and int(rows[3]['images']) == len(list(data.glob('val/*/*.png')))
    assert '2-way 1-shot' in capsys.readouterr().out


def test_features_are_the_heads_own(classifier, tmp_path):
    """The features are the inputs of the head's last layer, at unit length."""
    import argparse
    args = argparse.Namespace(config=str(classifier[0]), checkpoint=str(classifier[1]), cfg_options=None)
    runner = few_shot.build(args, str(tmp_path / 'work'))
    loader = runner.build_dataloader(runner.cfg.test_dataloader)
    found, labels = few_shot.features(runner.model, loader)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    expected, truth = [], []
    with torch.no_grad():
        for batch in loader:
            data = runner.model.data_preprocessor(batch, training=False)
            expected.append(runner.model.extract_feat(data['inputs'], stage='neck')[-1].flatten(1))
            truth += [int(sample.gt_label) for sample in data['data_samples']]
    torch.testing.assert_close(torch.from_numpy(found), torch.nn.functional.normalize(torch.cat(expected)))
    assert labels.tolist() == truth


@pytest.mark.parametrize('arguments,says', [(['--novel', '77'], r'--novel \[77\]'), (['--episodes', '1'], None)])
def test_bad_arguments(classifier, tmp_path, arguments, says):
    with pytest.raises(SystemExit, match=says):
        few_shot.main([*map(str, classifier), '--csv', str(tmp_path / 'table.csv'), '--shots', '1', *arguments])
