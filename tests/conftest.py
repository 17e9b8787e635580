"""Triton's kernels run in its interpreter where there is no GPU, which must be said before Triton is imported; what
several files of tests share."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'


@pytest.fixture(scope='session')
def tiny_digits(tmp_path_factory):
    """The demo data, a few images of each task. Read only."""
    pytest.importorskip('sklearn')
    from test_digits_dataset import digits
    folder = tmp_path_factory.mktemp('data') / 'digits'
    digits.generate(folder, scale='tiny')
    return folder


@pytest.fixture
def tuning_file(tmp_path, monkeypatch):
    """Where the choice of block sizes is kept, and not the user's own: in a folder that does not exist yet."""
    from mmlocalmamba.ops.triton import tuning
    path = tmp_path / 'cache' / 'tuning.json'
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    tuning.saved.cache_clear()
    yield path
    tuning.saved.cache_clear()
