"""tools/gpu_session.sh calls the tools with options that they have."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/usr/bin/env bash
echo "$@" >> {calls}
"""


@pytest.fixture(scope='module')
def calls(tmp_path_factory):
    """Return the commands that the script runs, with stubs that accept all arguments and do nothing."""
    folder = tmp_path_factory.mktemp('stubs')
    for name in ('python', 'nvidia-smi'):
        folder.joinpath(name).write_text(STUB.format(calls=folder / f'{name}.txt'))
        folder.joinpath(name).chmod(0o755)
    done = subprocess.run(['bash', 'tools/gpu_session.sh', folder / 'out', folder / 'python'], cwd=ROOT, text=True,
                          capture_output=True, env=dict(PATH=f'{folder}:/usr/bin:/bin'))
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in (folder / 'python.txt').read_text().splitlines()]


def test_it_tests_before_it_measures(calls):
    kinds = [' '.join(call[:3]) for call in calls]
    assert kinds.index('-m pytest -q') < kinds.index('-m mmlocalmamba tune') < min(
        place for place, kind in enumerate(kinds) if kind.startswith('tools/benchmark_'))
    files = next(call for call in calls if call[:2] == ['-m', 'pytest'])[3:]
    assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize('tool', ['benchmark_scan', 'benchmark_model'])
def test_tools_know_the_options(calls, tool):
    text = subprocess.run([sys.executable, ROOT / f'tools/{tool}.py', '--help'], text=True, capture_output=True,
                          check=True).stdout
    known = set(re.findall(r'--[\w-]+', text))
    used = {option for call in calls if call[0] == f'tools/{tool}.py' for option in call if option.startswith('--')}
    assert used and used <= known, used - known
