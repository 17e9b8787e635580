"""The CI workflow calls existing targets, GitHub's forms are valid, and public functions have types."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / '.github'
TARGETS = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), flags=re.M))


def make_targets(text):
    return set(re.findall(r'\bmake (?:\w+=\S+ )*([a-z][a-z-]*)', text))


def test_workflow_and_ci_call_the_makefile():
    workflow = yaml.safe_load((GITHUB / 'workflows' / 'ci.yml').read_text())
    commands = [step['run'] for job in workflow['jobs'].values() for step in job['steps'] if 'run' in step]
    called = make_targets('\n'.join(commands))
    assert {'lint', 'docs', 'coverage', 'test-all', 'smoke'} <= called <= TARGETS
    assert all(command.startswith('make ') for command in commands)
    ci = make_targets(re.sub(r'(?m)^\s*#.*', '', (ROOT / '.ci' / 'run').read_text()))
    assert {'lint', 'docs', 'test-all', 'smoke'} <= ci <= TARGETS


@pytest.mark.parametrize('schema, file', [
    ('vendor.github-workflows', 'workflows/ci.yml'),
    ('vendor.github-issue-forms', 'ISSUE_TEMPLATE/bug.yml'),
    ('vendor.github-issue-forms', 'ISSUE_TEMPLATE/wish.yml'),
    ('vendor.github-issue-config', 'ISSUE_TEMPLATE/config.yml'),
])
def test_files_for_github_are_valid(schema, file):
    program = Path(sys.executable).with_name('check-jsonschema')
    if not program.exists():
        pytest.skip('check-jsonschema is not installed')
    done = subprocess.run([program, '--builtin-schema', schema, GITHUB / file], capture_output=True, text=True)
    if 'invalid choice' in done.stderr or "is not one of" in done.stderr:
        pytest.skip(f'this check-jsonschema has no {schema}')
    assert done.returncode == 0, done.stdout + done.stderr


def public_functions():
    for path in sorted((ROOT / 'mmlocalmamba').rglob('*.py')):
        if '.mim' in path.parts or path.name == 'kernels.py':
            continue
        tree = ast.parse(path.read_text())
        for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)
                              and not node.name.startswith('_'))):
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and (not node.name.startswith('_') or node.name == '__init__'):
                    yield path, node


def test_public_functions_have_types():
    """This includes modules where mypy does not ask for types, because torch or a schema dictates the signature."""
    bare = []
    for path, node in public_functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ('self', 'cls')]
        if untyped or node.returns is None:
            bare.append(f'{path.relative_to(ROOT)}:{node.lineno} {node.name}')
    assert [name for name in bare if 'ops/library.py' not in name] == []


@pytest.mark.parametrize('call,code', [("write_whole('name', 'text')", 0), ("write_whole(3, 'text')", 1)])
@pytest.mark.slow
def test_types_are_checked(tmp_path, call, code):
    """The settings of `make lint` accept a correct call and reject a wrong one."""
    program = shutil.which('mypy', path=Path(sys.executable).parent)
    if program is None:
        pytest.skip('mypy is not installed')
    (tmp_path / 'user.py').write_text(f'from mmlocalmamba.files import write_whole\n{call}\n')
    done = subprocess.run([program, '--config-file', ROOT / 'pyproject.toml', '--cache-dir', tmp_path / 'cache',
                           tmp_path / 'user.py'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and ('arg-type' in done.stdout) == bool(code), done.stdout + done.stderr
