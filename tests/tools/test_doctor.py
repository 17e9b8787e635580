import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

import pytest
import torch
from processes import ROOT

from mmlocalmamba import __main__ as main
from mmlocalmamba import ops
from mmlocalmamba.ops import stand_ins
from mmlocalmamba.ops.backends.triton import tuning


def test_report():
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    result = subprocess.run([sys.executable, '-m', 'mmlocalmamba', 'doctor'], capture_output=True, text=True,
                            env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert torch.__version__.split('+')[0] in result.stdout and 'mamba_ssm' in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    for name, reason in ops.available_backends(torch.empty(0)).items():
        line = next(line for line in lines if line[:1] == [name] and line[1] in ('no:', 'yes:'))
        if name != 'triton':  # this process may interpret it
            assert line[1] == ('yes:' if reason is None else 'no:')
    for name, state in stand_ins.status().items():
        assert [name, *state.split()] in lines


@pytest.mark.slow
def test_a_wrong_backend_is_called_so(monkeypatch, capsys):
    backend = ops.BACKENDS['chunked']
    right = backend.scan

    def scaled(inputs):
        y, last_states = right(inputs)
        return 1.01 * y, last_states

    monkeypatch.setattr(backend, 'scan', scaled)
    assert not main.doctor()
    assert 'chunked     WRONG: relative error' in capsys.readouterr().out

    def fails(inputs):
        raise RuntimeError('no such kernel')

    monkeypatch.setattr(backend, 'scan', fails)
    assert not main.doctor()
    assert 'chunked     FAILS: RuntimeError: no such kernel' in capsys.readouterr().out


@pytest.mark.parametrize('wrong', [False, True])
def test_wrong_convolutions_are_told(monkeypatch, capsys, wrong):
    """oneDNN has this bug on processors with AMX. Here, one value of an output is not written."""
    def convolution(x, *args, **kwargs):
        out = right(x.float(), *(arg.float() for arg in args), **kwargs).to(x.dtype)
        if wrong and x.dtype == torch.bfloat16 and x.shape[1] == 3:
            out[0, 0, -1, -1] = float('nan')
        return out

    right = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, 'conv2d', convolution)
    monkeypatch.setattr(main, 'self_test', lambda backend, device: (0., 0.))
    assert main.doctor()  # it is not ours
    assert ('ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16' in capsys.readouterr().out) == wrong


def test_block_sizes_and_their_origin(monkeypatch, capsys, tuning_file):
    pytest.importorskip('triton')
    # The self tests of the backends would take too long.
    monkeypatch.setattr(main, 'self_test', lambda backend, device: (0., 0.))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    forward, backward = (tuning.CANDIDATES[kernel][0] for kernel in ('forward', 'backward'))
    assert main.doctor()
    assert f'Block sizes of the Triton scan kernels:\n  forward: {forward} (built in)' in capsys.readouterr().out
    tuning.save({tuning.Key(tuning.gpu(device), 'backward', 16, 'float32'): backward})
    assert main.doctor()
    assert f'  backward, d_state 16, float32: {backward} ({tuning_file})' in capsys.readouterr().out


# ---- mmcv ----

def test_it_says_where_the_ops_of_mmcv_come_from(monkeypatch, tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text("raise ImportError('the doctor need not import it')\n")
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, 'mmcv', raising=False)
    assert main._mmcv_ops().startswith('none: ') and 'MMCV=compiled tools/install.sh' in main._mmcv_ops()

    stand_in = tmp_path / 'mmcv/_ext.py'
    shutil.copy(ROOT / 'requirements/mmcv_torchvision/mmcv/_ext.py', stand_in)
    if find_spec('torchvision'):
        assert 'torchvision stands in for nms, softnms, roi_align (avg)' in main._mmcv_ops()
        assert 'the others refuse' in main._mmcv_ops()
    stand_in.write_text("import torch\nraise RuntimeError('operator torchvision::nms does not exist')\n")
    assert main._mmcv_ops().startswith('FAIL: ') and 'nms does not exist' in main._mmcv_ops()

    # A compiled module goes before a file of the same name.
    (tmp_path / f'mmcv/_ext{EXTENSION_SUFFIXES[0]}').touch()
    assert main._mmcv_ops() == 'compiled'


def test_there_may_be_no_mmcv(monkeypatch):
    monkeypatch.setattr(main, 'find_spec', lambda name: None)
    assert main._mmcv_ops() is None


def test_unknown_command():
    with pytest.raises(SystemExit):
        sys.argv, before = ['mmlocalmamba', 'cure'], sys.argv
        try:
            main.main()
        finally:
            sys.argv = before
