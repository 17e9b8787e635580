"""Triton's kernels run in its interpreter where there is no GPU, which must be said before Triton is imported."""
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
