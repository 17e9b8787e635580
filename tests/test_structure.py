"""Imports flow downward only; the core needs torch, numpy and safetensors; each door can be left out."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

PACKAGE = ROOT / 'mmlocalmamba'
DOOR = 'mmlocalmamba.openmmlab'
# A room may import rooms of lower floors, and its own parts. The first prefix that fits counts.
FLOORS = {
    'mmlocalmamba.moved': 0,
    'mmlocalmamba.files': 0,
    'mmlocalmamba.table_cache': 0,
    'mmlocalmamba.registry': 0,
    'mmlocalmamba.directions': 1,
    'mmlocalmamba.ops': 2,
    'mmlocalmamba.layers': 3,
    'mmlocalmamba.weights': 4,
    'mmlocalmamba.search.results': 7,
    'mmlocalmamba.search': 4,
    'mmlocalmamba.backbones.archs': 1,  # data
    'mmlocalmamba.backbones': 5,
    'mmlocalmamba.models': 6,
    'mmlocalmamba.visualization': 6,
    'mmlocalmamba.timm': 7,
    'mmlocalmamba.deployment': 7,
    'mmlocalmamba.predict': 7,
    DOOR: 8,
    'mmlocalmamba.__main__': 9,
}
CORE = {'torch', 'numpy', 'safetensors', 'mmlocalmamba', *sys.stdlib_module_names}
# Packages that a function imports for the user who asks for it, and where.
OPTIONAL = {'matplotlib': 'mmlocalmamba.visualization', 'triton': 'mmlocalmamba.ops', 'mamba_ssm': 'mmlocalmamba.ops',
            'onnx_ir': ('mmlocalmamba.ops', 'mmlocalmamba.deployment'), 'onnxscript': 'mmlocalmamba.deployment',
            'torchvision': ('mmlocalmamba.deployment', 'mmlocalmamba.predict'), 'PIL': 'mmlocalmamba.predict',
            'rich': 'mmlocalmamba.predict', 'timm': 'mmlocalmamba.timm'}


def room(module):
    return next((name for name in FLOORS if module == name or module.startswith(f'{name}.')), None)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module') and node.args:
            if isinstance(node.args[0], ast.Constant):  # an import as well
                yield node.args[0].value


MODULES = sorted(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)


def name_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_imports_flow_downward(path):
    module = name_of(path)
    own = room(module)
    if module == 'mmlocalmamba':  # its names are imported when they are used
        return
    assert own is not None, f'{module} has no floor'
    for name in imports(path):
        if name.split('.')[0] != 'mmlocalmamba':
            continue
        other = room(name)
        if other is None:
            assert name == 'mmlocalmamba.__version__' or FLOORS[own] >= FLOORS[DOOR], f'{module} imports {name}'
        else:
            assert other == own or FLOORS[other] < FLOORS[own], f'{module} imports {name}: upwards'


CORE_MODULES = [path for path in MODULES if room(name_of(path)) not in (DOOR, 'mmlocalmamba.registry')]


@pytest.mark.parametrize('path', CORE_MODULES, ids=name_of)
def test_the_core_needs_torch_numpy_and_safetensors(path):
    module = name_of(path)
    for name in imports(path):
        top = name.split('.')[0]
        if top in OPTIONAL:
            assert module.startswith(OPTIONAL[top]), f'{module} imports {name}'
        else:
            assert top in CORE, f'{module} imports {name}'


@pytest.mark.parametrize('path', [path for path in MODULES if room(name_of(path)) == DOOR], ids=name_of)
def test_the_openmmlab_door_imports_no_task_package(path):
    packages = {'mmdet', 'mmseg', 'mmpretrain', 'timm'}
    if name_of(path) == 'mmlocalmamba.openmmlab.multimodal':  # it repairs the import of mmpretrain
        packages.remove('mmpretrain')
    assert not {name.split('.')[0] for name in imports(path)} & packages


def test_research_is_imported_by_nobody():
    scripts = {path.stem for path in (ROOT / 'research').glob('*.py')}
    for folder in ('mmlocalmamba', 'tools', 'tests', 'configs'):
        for path in (ROOT / folder).rglob('*.py'):
            if '.mim' not in path.parts:
                assert not {name.split('.')[0] for name in imports(path)} & scripts, path


# ---- copies of the tree without a door ----

# folder -> folders of tests that are about it
DOORS = {'mmlocalmamba/openmmlab': ['tests/openmmlab', 'tests/tools', 'research/tests', 'tests/test_packaging.py'],
         'mmlocalmamba/search': ['tests/search', 'tests/openmmlab', 'tests/tools', 'research/tests'],
         'mmlocalmamba/deployment': ['tests/deployment', 'tests/tools', 'research/tests'],
         'research': []}
SAMPLE = ['tests/layers/test_layers.py', 'tests/search/test_search.py', 'tests/weights/test_packaged.py',
          'tests/test_models.py', 'tests/test_table_cache.py', 'tests/openmmlab/test_necks.py']


@pytest.mark.slow
@pytest.mark.parametrize('door', DOORS)
def test_the_rest_passes_without(door, tmp_path):
    """All tests of the rest are collected, and a sample of them runs."""
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, text=True, capture_output=True)
    if files.returncode:
        pytest.skip('no git here')
    gone = [door, *DOORS[door]]
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(tuple(gone)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for path in (PACKAGE / 'ops').glob('_cpu*'):  # the compiled kernel
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    assert not (tmp_path / door).exists() and (tmp_path / 'mmlocalmamba').is_dir()
    python = [sys.executable, '-W', 'ignore', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist']
    collected = subprocess.run([*python, '--collect-only', '.'], cwd=tmp_path, text=True, capture_output=True)
    assert collected.returncode == 0, collected.stdout[-3000:]
    sample = [name for name in SAMPLE if (tmp_path / name).exists()]
    done = subprocess.run([*python, '-x', '-m', 'not slow', *sample], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert ' passed' in done.stdout


# What Windows and macOS lack, after the packages that we need are loaded.
_ELSEWHERE = """
import importlib, os, signal, sys
import torch
for name in ('torch._dynamo', 'mmengine.runner', 'mmengine.model', 'mmcv.cnn', 'mmcv.transforms', 'pycocotools.coco',
             'matplotlib', 'rich.progress'):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for name in ('fcntl', 'grp', 'pwd', 'resource', 'termios', 'tty', 'pty', 'syslog'):
    sys.modules[name] = None
for name in ('SIGUSR1', 'SIGUSR2', 'SIGHUP', 'SIGKILL', 'SIGQUIT', 'pthread_sigmask', 'sigwaitinfo', 'SIG_BLOCK'):
    delattr(signal, name)
for name in ('fork', 'getuid', 'geteuid', 'sched_getaffinity', 'register_at_fork', 'sync', 'O_DIRECTORY', 'O_NOFOLLOW'):
    if hasattr(os, name):
        delattr(os, name)
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name)
"""


@pytest.mark.slow
def test_every_module_imports_where_posix_is_missing():
    pytest.importorskip('mmengine')
    names = [name_of(path) for path in MODULES if 'mmlocalmamba.ops.backends.triton.' not in name_of(path)]
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', _ELSEWHERE, *names], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.stdout.split() == names, done.stderr[-2000:]


def test_every_folder_of_tests_is_on_the_path():
    """Tests of one folder import helpers of another."""
    text = (ROOT / 'pyproject.toml').read_text()
    assert all(f'"{Path(name)}"' in text for name in ('tools', 'tests/helpers', 'tests/ops', 'tests/weights'))
