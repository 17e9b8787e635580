"""Upstream's methods train and predict with our backbones; the page has the table."""
import multiprocessing
from pathlib import Path

import compatibility
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def upstream():
    """Return {package/method: path of its configuration}."""
    for package in compatibility.PACKAGES:
        pytest.importorskip(package)
    return {f'{package}/{method}': path for package in compatibility.PACKAGES
            for method, path in compatibility.methods(package).items()}


@pytest.mark.parametrize('backbone', compatibility.OURS)
@pytest.mark.parametrize('method', compatibility.SAMPLE)
@pytest.mark.slow
def test_methods_train_and_predict(upstream, method, backbone):
    """Each parameter of the backbone gets a gradient, too."""
    torch.set_num_threads(1)
    outcome = compatibility.in_process(upstream[method], method.split('/')[0], backbone, timeout=240)
    assert outcome[:3] == ('ok', '', '')
    assert not [name for name in outcome[3].split() if name.startswith('backbone')]


def test_the_page_has_the_table():
    rows = compatibility.read(compatibility.TABLE).values()
    assert {row['result'] for row in rows} == {'ok', 'failed'}
    assert compatibility.markdown(rows) in (ROOT / 'research' / 'compatibility.md').read_text()


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='the case runs in a fork')
def test_a_process_that_hangs_or_dies_is_reported(monkeypatch, tmp_path):
    def stuck(path, package, backbone, report):
        report('training')
        if package == 'dies':
            import os
            os._exit(9)
        import time
        time.sleep(60)

    monkeypatch.setattr(compatibility, 'attempt', stuck)
    context = multiprocessing.get_context('fork')  # with what is replaced here
    run = compatibility.in_process
    assert run('', 'hangs', '', 0.5, context) == ('failed', 'training', 'not done after 0.5 s', '')
    assert run('', 'dies', '', 60, context) == ('failed', 'training', 'the process ended with 9', '')
