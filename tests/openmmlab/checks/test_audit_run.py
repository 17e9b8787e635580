"""Trainings, tests and ``check`` with the audit: data that must not be learnt stop before the first iteration."""
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from mmlocalmamba.openmmlab import checks
from mmlocalmamba.openmmlab.checks import trial

NAMES = ['localvmamba-nano_digits', 'faster-rcnn_localvmamba-nano_digits', 'mask-rcnn_localvmamba-nano_digits',
         'upernet_localvmamba-nano_digits']


@pytest.fixture
def messages(monkeypatch):
    """Logged messages."""
    said = []
    monkeypatch.setattr('mmlocalmamba.openmmlab.checks.hook.print_log',
                        lambda text, logger, level=0: said.append(text))
    return said


def runner(cfg, **options):
    """Return the runner of a training without iterations."""
    cfg = Config(copy.deepcopy(cfg.to_dict()))
    key = next(key for key in ('max_epochs', 'max_iters') if key in cfg.train_cfg)
    cfg.train_cfg[key] = 0
    if 'param_scheduler' not in options:
        cfg.param_scheduler = None  # a schedule over no iterations at all cannot be built
    cfg.merge_from_dict(options)
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize('name', NAMES)
def test_the_digits_are_right(name, configuration, messages):
    """No problem and no note, and a table for the training and for the validation."""
    cfg = configuration(name)
    runner(cfg).train()
    tables = [text for text in messages if 'in the files' in text]
    assert len(tables) == 2 and tables[0].count('training: ') and 'validation: ' in tables[1]
    assert not [text for text in messages if 'note: ' in text]
    audit = checks.audit_run(cfg, dict(test=test_of(cfg)._test_loop), None)
    assert not audit.findings and len(audit.tallies) == 1


def test_of(cfg):
    testing = Runner.from_cfg(cfg)
    testing._test_loop = testing.build_test_loop(testing._test_loop)
    return testing


test_of.__test__ = False


def test_one_switch_turns_it_off(configuration, messages, monkeypatch):
    monkeypatch.setattr('mmlocalmamba.openmmlab.checks.hook.audit_data', None)
    runner(configuration(NAMES[0], **{'default_hooks.checks.audit': False})).train()
    assert not [text for text in messages if 'in the files' in text]


def test_an_audit_that_fails_stops_nothing(configuration, messages, monkeypatch):
    def fail(*args):
        raise IndexError('of the audit')

    monkeypatch.setattr('mmlocalmamba.openmmlab.checks.hook.audit_data', fail)
    runner(configuration(NAMES[0])).train()
    assert 'the data were not read: IndexError: of the audit' in messages[0]


def spoil_coco(cfg, tmp_path, change, key='train', evaluator=False):
    """Change the annotation file of a data set, and of the evaluator."""
    dataset = cfg[f'{key}_dataloader'].dataset
    content = json.loads(Path(dataset.data_root, dataset.ann_file).read_text())
    change(content)
    path = tmp_path / f'{key}.json'
    path.write_text(json.dumps(content))
    dataset.ann_file = str(path)
    if evaluator:
        cfg[f'{key}_evaluator'].ann_file = str(path)


def areas(content):
    for entry in content['annotations']:
        entry['area'] = 0 if entry['id'] % 2 else entry['area']


def first_id(content):
    content['annotations'][0]['id'] = 0


def test_a_training_stops(configuration, tmp_path):
    cfg = configuration(NAMES[1])
    spoil_coco(cfg, tmp_path, areas)
    with pytest.raises(ValueError, match=r"training data: .*train\.json: .* annotations .*'area' is 0"):
        runner(cfg).train()


def test_a_training_is_warned(configuration, tmp_path, messages):
    cfg = configuration(NAMES[1], **{'default_hooks.checks.strict': False})
    spoil_coco(cfg, tmp_path, areas)
    runner(cfg).train()
    assert any("'area' is 0" in text for text in messages)


def test_a_validation_stops_before_the_training(configuration, tmp_path):
    cfg = configuration(NAMES[1])
    spoil_coco(cfg, tmp_path, first_id, 'val', evaluator=True)
    with pytest.raises(ValueError, match='validation data: .*takes the id 0'):
        runner(cfg).train()


def test_a_file_that_cannot_be_read_is_explained(configuration, tmp_path):
    cfg = configuration(NAMES[1])
    spoil_coco(cfg, tmp_path, lambda content: content['annotations'][5].pop('area'))
    with pytest.raises(RuntimeError, match=r"KeyError: 'area'\)\n.*1 annotation \(id 6\): it has no 'area'"):
        runner(cfg).train()


# ---- tests and checkpoints ----


@pytest.fixture
def trained(configuration, tmp_path):
    """Return (configuration, path of a checkpoint) of a training without iterations."""

    def save(name, **options):
        cfg = configuration(name)
        training = runner(cfg, **options)
        training.train()
        training.save_checkpoint(training.work_dir, 'last.pth')
        return cfg, str(Path(training.work_dir, 'last.pth'))

    return save


def resume(cfg, path, **options):
    runner(cfg, resume=True, load_from=path, **options).train()


def folders(tmp_path, tiny_digits, change):
    """Return a copy of the digits' folders, whose names were changed."""
    shutil.copytree(tiny_digits / 'imagenet', tmp_path / 'imagenet')
    for half in ('train', 'val'):
        change(tmp_path / 'imagenet' / half)
    return str(tmp_path)


def test_a_test_on_classes_in_another_order(trained, tiny_digits, tmp_path):
    cfg, path = trained(NAMES[0])

    def swap(folder):
        (folder / '1').rename(folder / 'x')
        (folder / '3').rename(folder / '1')
        (folder / 'x').rename(folder / '93')

    cfg.test_dataloader.dataset.data_root = folders(tmp_path, tiny_digits, swap)
    with pytest.raises(ValueError, match="this test (.|\n)*class 3 is '3' in the checkpoint and '4' in the test data"):
        runner(cfg, load_from=path).test()


@pytest.mark.slow
def test_a_test_without_a_class(trained, tiny_digits, tmp_path):
    cfg, path = trained(NAMES[0])
    cfg.test_dataloader.dataset.data_root = folders(tmp_path, tiny_digits, lambda folder: shutil.rmtree(folder / '3'))
    with pytest.raises(ValueError, match="the test data lacks '3'.*one may be empty"):
        runner(cfg, load_from=path).test()
    for half in ('train', 'val'):
        (tmp_path / 'imagenet' / half / '3').mkdir()
    runner(cfg, load_from=path).test()


@pytest.mark.slow
def test_a_test_with_other_names_for_the_classes(trained, tiny_digits, tmp_path, messages):
    cfg, path = trained(NAMES[0])
    cfg.test_dataloader.dataset.metainfo = dict(classes=tuple('abcdefghij'))
    runner(cfg, load_from=path).test()
    assert any("class 0 is '0' in the checkpoint and 'a' in the test data" in text for text in messages)


def test_a_test_is_audited(configuration, tmp_path):
    cfg = configuration(NAMES[1])
    spoil_coco(cfg, tmp_path, first_id, 'test', evaluator=True)
    with pytest.raises(ValueError, match='this test is misconfigured:\n  test data: '):
        runner(cfg).test()


def test_resumed_with_other_class_names(trained, tmp_path):
    cfg, path = trained(NAMES[1])

    def rename(content):
        content['categories'][3]['name'] = 'three'

    for key in ('train', 'val'):
        spoil_coco(cfg, tmp_path, rename, key, evaluator=key == 'val')
        cfg[f'{key}_dataloader'].dataset.metainfo.classes = (*'012', 'three', *'456789')
    with pytest.raises(ValueError, match="resumed has other classes .*class 3 is '3' in the checkpoint and 'three'"):
        resume(cfg, path)


@pytest.mark.slow
def test_resumed_with_another_number_of_classes(trained, tiny_digits, tmp_path):
    cfg, path = trained(NAMES[0])

    def join(folder):
        for path in (folder / '9').iterdir():
            path.rename(folder / '8' / path.name)
        (folder / '9').rmdir()

    root = folders(tmp_path, tiny_digits, join)
    for key in ('train_dataloader', 'val_dataloader'):
        cfg[key].dataset.data_root = root
    cfg.model.head.num_classes = cfg.data_preprocessor.num_classes = 9
    with pytest.raises(ValueError, match='other classes .10, now 9.*\n.*head.fc.weight 10x256, now 9x256'):
        resume(cfg, path)


@pytest.mark.slow
def test_resumed_with_another_schedule(trained, messages):
    schedule = dict(type='CosineAnnealingLR', by_epoch=False, T_max=10, end=10)
    cfg, path = trained(NAMES[0], param_scheduler=[schedule])
    resume(cfg, path, param_scheduler=[schedule])
    assert not any('goes on' in text for text in messages)
    resume(cfg, path, param_scheduler=[dict(schedule, T_max=20)])
    assert any('CosineAnnealingLR T_max 10 (configuration: 20)' in text for text in messages)
    resume(cfg, path, param_scheduler=[schedule], **{'optim_wrapper.optimizer.weight_decay': 0.3})
    assert any('weight_decay 0.05 (configuration: 0.3)' in text for text in messages)


@pytest.mark.slow
def test_a_start_from_weights_takes_any_classes(trained, tiny_digits, tmp_path):
    cfg, path = trained(NAMES[0])
    cfg.train_dataloader.dataset.metainfo = cfg.val_dataloader.dataset.metainfo = dict(classes=tuple('abcdefghij'))
    runner(cfg, load_from=path).train()


# ---- dataloaders and BatchNorm ----


@pytest.mark.parametrize('scope, onedl, package', [
    ('mmseg', False, 'mmsegmentation'), ('mmdet', False, 'mmdet'), ('mmdet', True, 'mmdetection'),
    ('mmpretrain', False, None)])
def test_the_script_of_another_package(scope, onedl, package, monkeypatch):
    """mmpretrain's train.py gives every loader a collate_fn, which stops in the first step of a segmentor."""
    monkeypatch.setattr('mmlocalmamba.openmmlab.compat.distributions', lambda name: [name] * onedl)
    loader = dict(collate_fn=dict(type='default_collate'), num_workers=1)
    found = checks.configuration_problems(dict(default_scope=scope, train_dataloader=loader, val_dataloader=loader))
    assert len(found) == bool(package) and (not found or f'write mim train {package} or' in found[0])
    assert not checks.configuration_problems(dict(default_scope=scope, train_dataloader=dict(num_workers=1)))
    built = torch.utils.data.DataLoader([1])  # as a runner takes it, too
    assert not checks.configuration_problems(dict(default_scope=scope, train_dataloader=built))


@pytest.mark.parametrize('key, option', [('train', dict(persistent_workers=True)), ('val', dict(prefetch_factor=2)),
                                         ('test', dict(multiprocessing_context='fork'))])
def test_options_of_workers_without_workers(key, option):
    cfg = dict(train_dataloader={}, **{f'{key}_dataloader': dict(num_workers=0, **option)}) if key != 'train' else \
        dict(train_dataloader=dict(num_workers=0, **option))
    problem, = checks.configuration_problems(cfg)
    assert f'{key}_dataloader has {next(iter(option))}=' in problem and 'num_workers=1' in problem
    with pytest.raises(ValueError):
        torch.utils.data.DataLoader([1], num_workers=0, **option)
    assert not checks.configuration_problems({f'{key}_dataloader': dict(num_workers=1, **option)})


class Pooled(nn.Module):
    """A pooling to 1x1 as in UperNet and ASPP."""

    def __init__(self, norm):
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Conv2d(3, 3, 1), norm))])

    def forward(self, x):
        return self.parts[0](x)


class Linear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(48, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize('model, fails', [
    (Pooled(nn.BatchNorm2d(3)), True), (Linear(), True), (Pooled(nn.GroupNorm(1, 3)), False),
    (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), False),
    (nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1)), False),
    (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(3)), False)])
@pytest.mark.parametrize('size, samples, drop_last', [(1, 4, False), (4, 9, False), (4, 9, True), (4, 10, False)])
def test_a_batch_of_one(model, fails, size, samples, drop_last):
    """The rule says of each model what torch does."""
    loader = torch.utils.data.DataLoader([torch.rand(3, 4, 4)] * samples, size, drop_last=drop_last)
    found = checks.batch_problems(model, loader)
    single = min(map(len, loader)) == 1
    assert bool(found) == (fails and single)
    assert ('batch_size is 1' in ''.join(found)) == (bool(found) and size == 1)
    try:
        for batch in loader:
            model.train()(batch)
        failed = False
    except ValueError:
        failed = True
    assert failed == bool(found)


def test_batches_of_upernet(configuration):
    cfg = configuration(NAMES[3])
    cfg.train_dataloader.batch_size = 1
    with pytest.raises(ValueError, match='batch_size is 1, but the BatchNorm decode_head.psp_modules'):
        runner(cfg).train()


# ---- check ----


def test_check_says_what_it_reads(configuration, capsys, tiny_digits, tmp_path):
    """Labels of no class, a missing picture among many and options of workers at once, and no bare error."""
    cfg = configuration(NAMES[3])
    cfg.train_dataloader.update(num_workers=0, persistent_workers=True)
    for number in range(12):
        for folder, array in (('images', np.zeros((128, 128, 3), np.uint8)),
                              ('labels', np.full((128, 128), 40, np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f'{number}.png')
    (tmp_path / 'labels/7.png').unlink()
    cfg.train_dataloader.dataset.update(data_root=str(tmp_path),
                                        data_prefix=dict(img_path='images', seg_map_path='labels'))
    assert not trial.check(cfg)
    output = capsys.readouterr().out
    assert 'has the label 40' in output and 'persistent_workers=True' in output
    assert f'{tmp_path}/labels: 1 label image (7.png): ' in output
    assert output.rstrip().splitlines()[-1].endswith('problems found, see above.')


@pytest.mark.slow
def test_check_looks_at_the_test_data(configuration, capsys, tmp_path):
    cfg = configuration(NAMES[1])
    spoil_coco(cfg, tmp_path, first_id, 'test', evaluator=True)
    assert not trial.check(cfg)
    assert 'problem test data: ' in capsys.readouterr().out
    cfg.test_dataloader.dataset.ann_file = str(tmp_path / 'nowhere.json')
    assert trial.check(cfg)
    assert 'note    the test data cannot be read' in capsys.readouterr().out


def test_check_is_silent_about_empty_results(configuration, capfd):
    """A network that finds nothing yet is right, and upstream's logger has nothing to say."""
    assert trial.check(configuration(NAMES[1], **{'model.test_cfg.rcnn.score_thr': 0.9999}))
    streams = capfd.readouterr()
    assert 'empty' not in streams.out + streams.err
