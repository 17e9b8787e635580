"""The configurations of the studies build, and their settings fit their data."""
from pathlib import Path

import pytest
import stamps
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
PARAMETERS = {
    'localvmamba-nano_fashion': 1093634,
    'mask-rcnn_localvmamba-nano_stamps': 2279815,
    'upernet_localvmamba-nano_stamps': 1726465,
}


def test_names():
    assert {path.stem for path in CONFIGS.glob('*.py')} == set(PARAMETERS)


@pytest.mark.parametrize('name', PARAMETERS)
def test_builds(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize('name', PARAMETERS)
def test_every_split_is_of_the_same_data(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    root = 'data/fashion_mnist/' if name.endswith('fashion') else 'data/stamps/'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root.startswith(root)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.get('ann_file', root).startswith(root)


@pytest.mark.parametrize('name', [name for name in PARAMETERS if name.endswith('stamps')])
def test_stamps_have_the_converters_classes(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert [c for c in loader.dataset.metainfo.classes if c != 'background'] == list(stamps.CLASSES)
    heads = [cfg.model.decode_head] if 'decode_head' in cfg.model else [
        cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head]
    assert {head.num_classes for head in heads} == {len(cfg.train_dataloader.dataset.metainfo.classes)}
    assert 'RandomFlip' in [step.type for step in cfg.train_dataloader.dataset.pipeline]
