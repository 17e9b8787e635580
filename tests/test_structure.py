"""Imports flow downward only, and the ops need torch alone."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'mmlocalmamba'
# A room may import rooms of lower floors (and its own parts). The first prefix that fits counts.
FLOORS = {
    'mmlocalmamba.compat': 0,
    'mmlocalmamba.files': -2,
    'mmlocalmamba.methods': 1,
    'mmlocalmamba.recipes': 0,
    'mmlocalmamba.registry': 0,
    'mmlocalmamba.sizes': 0,
    'mmlocalmamba.zoo': -1,
    'mmlocalmamba.scans': 1,
    'mmlocalmamba.ops': 2,
    'mmlocalmamba.layers': 3,
    'mmlocalmamba.backbones': 4,
    'mmlocalmamba.necks': 5,
    'mmlocalmamba.weights': 5,
    'mmlocalmamba.engine': 1,
    'mmlocalmamba.visualization': 6,
    'mmlocalmamba.search': 7,
    'mmlocalmamba.checks': 6,
    'mmlocalmamba.trial': 7,
    'mmlocalmamba.deployment': 7,
    'mmlocalmamba.__main__': 8,
}
FORBIDDEN = {'mmdet', 'mmseg', 'mmpretrain'}


def room(module):
    return next((name for name in FLOORS if module == name or module.startswith(f'{name}.')), None)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


MODULES = sorted(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_downward(path):
    module = '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts).removesuffix('.__init__')
    own = room(module)
    assert own is not None or module == 'mmlocalmamba', f'{module} has no floor'
    for name in imports(path):
        top = name.split('.')[0]
        assert top not in FORBIDDEN, f'{module} imports {name}'
        if own == 'mmlocalmamba.ops':
            assert not top.startswith('mm') or top == 'mmlocalmamba', f'{module} imports {name}'
        if own == 'mmlocalmamba.registry':
            assert top == 'mmengine', f'{module} imports {name}'
        if top == 'mmlocalmamba' and own is not None:
            other = room(name)
            if other is None:
                assert name == 'mmlocalmamba.__version__' or own == 'mmlocalmamba.__main__', f'{module} imports {name}'
            else:
                assert other == own or FLOORS[other] < FLOORS[own], f'{module} imports {name}: upwards'


def test_ops_and_scans_import_with_torch_alone():
    code = ('import sys\n'
            'class Block:\n'
            '    def find_spec(self, name, path=None, target=None):\n'
            '        if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"):\n'
            '            raise ModuleNotFoundError(name)\n'
            'sys.meta_path.insert(0, Block())\n'
            'import mmlocalmamba.ops, mmlocalmamba.scans\n')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=PACKAGE.parent)
