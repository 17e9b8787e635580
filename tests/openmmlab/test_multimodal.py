"""mmpretrain's models for images and texts are left out where transformers has moved what they import."""
import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest
from processes import ROOT

from mmlocalmamba import __main__ as main
from mmlocalmamba.openmmlab import multimodal

MMPRETRAIN = {
    'mmpretrain/__init__.py': '',
    'mmpretrain/utils/__init__.py': '',
    'mmpretrain/utils/dependency.py': 'from importlib.util import find_spec\n'
                                      "WITH_MULTIMODAL = find_spec('transformers') is not None\n",
    # As in mmpretrain 1.2, in short.
    'mmpretrain/models/__init__.py': '''
from mmpretrain.utils.dependency import WITH_MULTIMODAL
if WITH_MULTIMODAL:
    from .blip import *
''',
    'mmpretrain/models/blip.py': '''
try:
    from transformers.modeling_utils import (PreTrainedModel,
                                             apply_chunking_to_forward,
                                             prune_linear_layer)
except:
    PreTrainedModel = None


class BertPreTrainedModel(PreTrainedModel):
    pass
''',
}
PYTORCH_UTILS = 'def apply_chunking_to_forward(): pass\n\n\ndef prune_linear_layer(): pass\n'
# Where the names are in each version.
TRANSFORMERS = {
    '4.49.0': {'transformers/pytorch_utils.py': PYTORCH_UTILS,
               'transformers/modeling_utils.py': 'from .pytorch_utils import (  # noqa: F401\n'
                                                 '    apply_chunking_to_forward,\n    prune_linear_layer,\n)\n\n\n'
                                                 'class PreTrainedModel: pass\n'},
    '4.57.6': {'transformers/pytorch_utils.py': PYTORCH_UTILS,
               'transformers/modeling_utils.py': 'class PreTrainedModel: pass\n'},
    '5.24.0': {'transformers/pytorch_utils.py': 'def apply_chunking_to_forward(): pass\n',
               'transformers/modeling_utils.py': 'class PreTrainedModel: pass\n'},
    None: {},
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(params=TRANSFORMERS)
def layout(request, tmp_path):
    """Write both packages, with the metadata of transformers. Return its version."""
    write(tmp_path, MMPRETRAIN)
    if request.param:
        write(tmp_path, {'transformers/__init__.py': '', **TRANSFORMERS[request.param],
                         f'transformers-{request.param}.dist-info/METADATA':
                         f'Metadata-Version: 2.1\nName: transformers\nVersion: {request.param}\n'})
    return request.param


def python(folder, code):
    path = f'import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n'
    return subprocess.run([sys.executable, '-c', path + code], capture_output=True, text=True)


STOPS = ('4.57.6', '5.24.0')


def test_the_door_lets_mmpretrain_be_imported(layout, tmp_path):
    alone = python(tmp_path, 'import mmpretrain.models')
    assert (alone.returncode != 0) == (layout in STOPS)
    if layout in STOPS:
        assert 'TypeError: NoneType takes no arguments' in alone.stderr
    done = python(tmp_path, 'import mmlocalmamba.openmmlab, mmpretrain.models as models\n'
                            'print(hasattr(models, "BertPreTrainedModel"))')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(layout == '4.49.0')]
    assert ('They are left out' in done.stderr) == (layout in STOPS)
    if layout in STOPS:
        assert f'with transformers {layout}' in done.stderr and multimodal.REMEDY in done.stderr


def test_what_is_imported_already_is_left_as_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'mmpretrain.models', object())
    monkeypatch.setattr(multimodal, 'missing_names', lambda: ['a_name'])
    with caplog.at_level(logging.WARNING):
        multimodal.leave_out()
    assert not caplog.records


def test_doctor_names_it(monkeypatch, capsys):
    monkeypatch.setattr(main, 'self_test', lambda backend, device: (0., 0.))
    monkeypatch.setattr(main, 'find_spec', lambda name: object() if name == 'transformers' else find_spec(name))
    for missing in ([], ['a_name']):
        monkeypatch.setattr(multimodal, 'missing_names', lambda missing=missing: missing)
        assert main.doctor()
        assert (multimodal.REMEDY in capsys.readouterr().out) == bool(missing)
