"""A user's own project inherits a shipped configuration, from any folder."""
import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

CONFIG = '''
_base_ = __import__('mmlocalmamba').config_path('mask-rcnn_localvmamba-t_1x_coco')

classes = ('cat', 'dog', 'tree')
model = dict(
    backbone=dict(arch='nano'),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(
        bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))))
train_dataloader = dict(
    dataset=dict(data_root='data/mine/', metainfo=dict(classes=classes)))
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'mine.py').write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_inherit(project):
    cfg = Config.fromfile('configs/mine.py')
    assert cfg.train_dataloader.dataset.data_root == 'data/mine/'
    # the rest is ours
    assert cfg.train_dataloader.dataset.type == 'CocoDataset'
    assert cfg.param_scheduler[1].milestones == [8, 11]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    assert model.roi_head.bbox_head.fc_cls.out_features == 4  # and background
    assert model.roi_head.mask_head.conv_logits.out_channels == 3
    assert type(model.backbone).__name__ == 'LocalVMamba'


def test_dumped_config_is_complete(project):
    """What a training run stores beside its checkpoints loads without our files."""
    cfg = Config.fromfile('configs/mine.py')
    cfg.dump('dumped.py')
    assert '_base_' not in (project / 'dumped.py').read_text()
    assert Config.fromfile('dumped.py')._cfg_dict == cfg._cfg_dict


def test_unknown_config_names_similar_ones(project):
    (project / 'configs' / 'mine.py').write_text(CONFIG.replace('1x_coco', '1x_cocoo'))
    with pytest.raises(ValueError, match='mask-rcnn_localvmamba-t_1x_coco'):
        Config.fromfile('configs/mine.py')
