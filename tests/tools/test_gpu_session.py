"""tools/gpu_session.sh, rehearsed without a GPU: a program takes the place of Python, and a clock runs fast."""
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ['doctor', 'scans', 'tests', 'tune', 'scans-tuned', 'model', 'profile']
# Writes down its arguments, takes SECONDS of the clock, and writes the table that it is asked for.
PYTHON = """#!/usr/bin/env bash
case "$1$2" in -c*is_available*) exit {gpu} ;; -c*) [[ $2 != "import {missing}" ]]; exit ;; esac
echo "$@" >> {folder}/calls
case "$*" in
*doctor*) name=doctor seconds=40 ;;
*scans.csv*) name=scans seconds=120 ;;
*"-m pytest "*) name=tests seconds=200 ;;
*scans-tuned.csv*) name=scans-tuned seconds=100 ;;
*" tune "*) name=tune seconds=100 ;;
*model.csv*) name=model seconds=120 ;;
*--once*) name=profile seconds=60 ;;
*) echo "unexpected: $*"; exit 99 ;;
esac
echo $(($(cat {folder}/time) + seconds)) > {folder}/time
while (($#)); do
    case $1 in --csv | --results) echo "some,figures" > "$2" ;; esac
    shift
done
echo "output of $name"
[[ $name != {hanging} ]] || sleep 60
[[ $name != {failing} ]]
"""
CLOCK = """#!/usr/bin/env bash
cat {folder}/time
"""
PROFILER = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    case $1 in --log-file) echo "some,counters" > "$2"; shift ;; --kernel-name | --launch-count | --set) shift ;; esac
    shift
done
"$@"
"""


@pytest.fixture
def session(tmp_path):
    """Return a function that runs the script and returns its output, and the calls of Python, by step."""

    def run(*arguments, failing='none', hanging='none', missing='none', gpu=0, profiler=True):
        folder = tmp_path / 'programs'
        folder.mkdir()
        programs = {'python': PYTHON, 'clock': CLOCK, 'nvidia-smi': '#!/bin/sh\necho name, driver\n'}
        if profiler:
            programs['ncu'] = PROFILER
        for name, text in programs.items():
            for key, value in dict(folder=folder, failing=failing, hanging=hanging, missing=missing, gpu=gpu).items():
                text = text.replace(f'{{{key}}}', str(value))
            folder.joinpath(name).write_text(text)
            folder.joinpath(name).chmod(0o755)
        (folder / 'time').write_text('1000000')
        command = ['bash', 'tools/gpu_session.sh', *arguments, tmp_path / 'out', folder / 'python']
        environment = dict(PATH=f'{folder}:/usr/bin:/bin', GPU_SESSION_CLOCK=str(folder / 'clock'))
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=environment)
        calls = folder / 'calls'
        return done, [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


def steps(output):
    return re.findall(r'^=== ([\w-]+) \(', output, flags=re.M)


def archived(tmp_path):
    with tarfile.open(tmp_path / 'out.tar.gz') as file:
        return {Path(name).name for name in file.getnames()}


def test_everything_fits_fifteen_minutes(session, tmp_path):
    done, _ = session()
    assert done.returncode == 0, done.stdout
    assert steps(done.stdout) == STEPS
    assert 'Results after 740 of 900 s' in done.stdout
    assert archived(tmp_path) >= {'gpu.csv', 'scans.csv', 'scans-tuned.csv', 'model.csv', 'profile.csv',
                                  *(f'{step}.log' for step in STEPS)}
    assert (tmp_path / 'out/doctor.log').read_text() == 'output of doctor\n'


@pytest.mark.parametrize('budget,last', [(700, 'model'), (500, 'scans-tuned'), (100, 'scans')])
def test_a_budget_leaves_out_from_the_end(session, tmp_path, budget, last):
    done, _ = session('--budget', str(budget))
    kept = STEPS[:STEPS.index(last) + 1]
    assert done.returncode == 1 and steps(done.stdout) == kept
    omitted = [step for step in STEPS if step not in kept]
    if 'tune' in omitted:
        omitted.remove('scans-tuned')
    assert f'Left out: {" ".join(omitted)}' in done.stdout
    assert f'=== {omitted[0]} is left out: it needs 60 s, and ' in done.stdout
    assert f'{kept[-1]}.log' in archived(tmp_path)


def test_a_failed_test_ends_nothing(session):
    done, _ = session(failing='tests')
    assert done.returncode == 1 and steps(done.stdout) == STEPS
    assert '=== tests failed with status 1' in done.stdout and 'Failed: tests\n' in done.stdout


def test_wrong_kernels_are_not_measured(session, tmp_path):
    done, _ = session(failing='doctor')
    assert done.returncode == 4 and steps(done.stdout) == ['doctor']
    assert f'nothing was measured: {tmp_path}/out/doctor.log' in done.stdout
    assert 'doctor.log' in archived(tmp_path)


@pytest.mark.parametrize('options,status,message', [
    (dict(gpu=1), 3, 'torch sees no GPU'),
    (dict(missing='torch'), 3, 'cannot import torch'),
    (dict(missing='pytest'), 1, 'tests are left out: pytest is not installed'),
    (dict(profiler=False), 1, 'profile is left out: ncu is not installed'),
], ids=str)
def test_what_is_missing_is_named(session, options, status, message):
    done, _ = session(**options)
    assert done.returncode == status and message in done.stdout


@pytest.mark.parametrize('arguments,message', [(['--budget', 'much'], "got 'much'"),
                                               (['--fast'], 'Unknown option --fast')])
def test_bad_arguments(session, arguments, message):
    done, calls = session(*arguments)
    assert done.returncode == 2 and message in done.stdout and not calls


def test_a_step_that_hangs_is_stopped(session, tmp_path):
    done, _ = session('--budget', '2', hanging='doctor')
    assert done.returncode == 4 and '=== doctor was stopped after its 2 s' in done.stdout
    assert 'doctor.log' in archived(tmp_path)


@pytest.mark.parametrize('rehearse', [False, True])
def test_tools_know_the_options(session, rehearse):
    _, calls = session(*['--rehearse'] * rehearse)
    for tool in ('benchmark_scan', 'benchmark_model'):
        text = (ROOT / f'tools/{tool}.py').read_text()
        used = {option for call in calls if call[0] == f'tools/{tool}.py' for option in call if option.startswith('--')}
        assert used and used <= set(re.findall(r"'(--[\w-]+)'", text)), used
    files = {word for call in calls if call[:2] == ['-m', 'pytest'] for word in call if word.endswith('.py')}
    assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Each step runs for real, on a CPU."""
    python = Path(sys.executable)
    done = subprocess.run(['bash', 'tools/gpu_session.sh', '--rehearse', tmp_path / 'out', python], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert 'Failed' not in done.stdout and 'Left out: profile' in done.stdout, done.stdout[-4000:]
    assert archived(tmp_path) >= {'scans.csv', 'scans-tuned.csv', 'model.csv', 'doctor.log', 'tests.log'}
