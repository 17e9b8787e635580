"""Triton's kernels run in its interpreter where there is no GPU, which must be said before Triton is imported; what
several files of tests share."""
import os
import zlib
from collections import OrderedDict

import pytest
import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'


def pytest_collection_modifyitems(config, items):
    """Put the longest tests first, so that no process is left alone with them at the end.

    TEST_SHARE=K/N keeps the K-th of N parts of the slow tests, and all others.
    """
    if share := os.environ.get('TEST_SHARE'):
        part, parts = map(int, share.split('/'))
        left = {item for item in items
                if 'slow' in item.keywords and zlib.crc32(item.nodeid.encode()) % parts != part % parts}
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]
    items.sort(key=lambda item: 'test_pages.py' not in item.nodeid)


@pytest.fixture(scope='session')
def tiny_digits(tmp_path_factory):
    """The demo data, a few images of each task. Read only."""
    pytest.importorskip('sklearn')
    from test_digits_dataset import digits
    folder = tmp_path_factory.mktemp('data') / 'digits'
    digits.generate(folder, scale='tiny')
    return folder


@pytest.fixture
def configuration(tiny_digits, tmp_path):
    """Writes and reads a child of a shipped configuration, as a user would, with tiny data and no workers."""

    from mmengine.config import Config

    def write(name, text='', **options):
        path = tmp_path / 'mine.py'
        path.write_text(f"_base_ = __import__('mmlocalmamba').config_path('configs/{name}.py')\n{text}\n")
        cfg = Config.fromfile(path)
        root = tiny_digits / dict(mmpretrain='', mmdet='coco/', mmseg='ade/')[cfg.default_scope]
        for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            cfg[key].update(num_workers=0, persistent_workers=False, batch_size=2)
            cfg[key].dataset.data_root = str(root)
        for key in ('val_evaluator', 'test_evaluator'):
            if 'ann_file' in cfg[key]:
                cfg[key].ann_file = str(root / 'annotations/instances_val.json')
        # MMEngine takes runners of one name and second for one, with the scope of the first.
        own = dict(work_dir=str(tmp_path / 'work'), experiment_name=f'{tmp_path.name}_{name}')
        cfg.merge_from_dict(own | options)
        return cfg

    return write


@pytest.fixture
def tuning_file(tmp_path, monkeypatch):
    """Where the choice of block sizes is kept, and not the user's own: in a folder that does not exist yet."""
    from mmlocalmamba.ops.backends.triton import tuning
    path = tmp_path / 'cache' / 'tuning.json'
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    tuning.saved.cache_clear()
    yield path
    tuning.saved.cache_clear()


@pytest.fixture
def no_scope(monkeypatch):
    """As in a new process: inferencers keep the default scope that an earlier test has left."""
    from mmengine.registry import DefaultScope
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())
