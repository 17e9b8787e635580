"""Mutate a part of the package (a room) and run the tests that reach each mutant.

    python tests/stress/mutants.py layers --sample 200
    python tests/stress/mutants.py weights --only 'mmlocalmamba.weights.official.*' --jobs 2

mutmut makes the mutants. This script writes its configuration, because mutmut reads only one and each room has its own
tests. The script takes all mutants of the room, or a sample with a fixed seed. It does not repeat mutants that an
earlier call has killed, unless --only names them. It works in a copy, work_dirs/mutants/ROOM; remove the copy to start
again. It prints the mutants that survive as diffs, and the score.

Tests with "compile", "export" or "mim_test" in their names are left out, because torch.compile cannot trace mutmut's
wrappers and whole `mim test` runs take too long.
"""
import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# {room: (files to mutate, tests that see the mutants)}. The tests are fast, and know most about the files.
ROOMS = dict(
    directions=(['directions.py', 'table_cache.py'], [
        'test_directions.py', 'test_table_cache.py']),
    layers=(['layers'], [
        'layers/test_layers.py', 'backbones/test_backbones.py', 'backbones/test_contract.py', 'ops/test_mixer_ops.py',
        'weights/test_loading.py']),
    backbones=(['backbones'], [
        'backbones/test_backbones.py', 'backbones/test_contract.py', 'openmmlab/test_layer_decay.py',
        'weights/test_loading.py']),
    necks=(['openmmlab/necks.py'], ['openmmlab/test_necks.py']),
    replace_backbone=(['openmmlab/replace_backbone.py'], ['openmmlab/test_replace_backbone.py']),
    weights=(['weights', 'openmmlab/checkpoint_hook.py'], [
        'weights/test_official.py', 'weights/test_loading.py', 'openmmlab/test_checkpoint_hook.py']),
    search=(['search', 'openmmlab/search_hook.py'], ['search/test_search.py', 'openmmlab/test_search_hook.py']),
    engine=(['openmmlab/engine'], [
        'openmmlab/test_guard.py', 'openmmlab/test_layer_decay.py', 'openmmlab/test_broken_files.py',
        'openmmlab/test_jobs.py', 'openmmlab/test_loops.py']),
)
LEFT_OUT = 'not compile and not export and not mim_test'
# These tests train in other processes, where mutmut does not see what they reach, and take minutes.
for name in ('two_processes_have', 'sigkill', 'derive', 'stop_alike', 'bfloat16', 'at_a_random', 'process_group',
             'sample_of_the', 'sees_what', 'launcher', 'before_the_training', 'windows', 'soak', 'killed_while'):
    LEFT_OUT += f' and not {name}'
# This test starts a process in a folder without mutmut's configuration.
LEFT_OUT += ' and not (names_its_annotations and val)'
SEED = 13
# Exit codes of killed mutants: tests fail or break, take many times as long as usual (mutmut stops them), or the
# process is killed.
NOTICED = {1, 3, 24, 36, 152, -24, -9, -11}
# mutmut calls this a timeout, but the tests did not run, for example because pytest did not find one of them again.
NOT_RUN = 255


def prepare(folder, files, tests, left_out):
    """Copy the files that git tracks and the native kernel, and write mutmut's configuration."""
    # Make the folder first, because Python checks PYTHONPATH once at its start and then ignores folders that were
    # missing.
    (folder / 'mutants').mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.splitlines()
    native = [str(path.relative_to(ROOT)) for path in (ROOT / 'mmlocalmamba/ops').glob('*.so')]
    for name in listed + native:
        if (ROOT / name).is_file():
            copy = folder / name
            text = (ROOT / name).read_bytes()
            # Keep the times of unchanged files, because mutmut makes mutants again after a change.
            if not copy.is_file() or copy.read_bytes() != text:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(text)
    options = dict(
        source_paths=[f'mmlocalmamba/{name}' for name in files],
        also_copy=sorted({name.split('/')[0] for name in listed} - {'pyproject.toml'}),
        pytest_add_cli_args_test_selection=[f'tests/{name}' for name in tests],
        pytest_add_cli_args=['-k', left_out, '-p', 'no:cacheprovider'],
        # A process that ran the tests before has warm caches of tables, so mutants of the code that fills them would
        # not run.
        process_isolation='forkserver',
        use_git_change_detection=False,
        on_dependency_change='ignore',
    )
    text = (ROOT / 'pyproject.toml').read_text()
    lines = ''.join(f'{key} = {json.dumps(value)}\n' for key, value in options.items())
    (folder / 'pyproject.toml').write_text(f'{text}\n[tool.mutmut]\n{lines}')


def mutants_of(files):
    """Return the names of all mutants that mutmut makes of files in the working directory."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name
    names = []
    for name in files:
        path = Path('mmlocalmamba', name)
        for source in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
            made = mutate_file_contents(str(source), source.read_text()).mutant_names
            names += [get_mutant_name(source, mutant) for mutant in made]
    return names


def decided():
    """Return the exit code of the tests for each mutant that mutmut has run."""
    codes = {}
    for path in Path('mutants/mmlocalmamba').rglob('*.meta'):
        codes.update(json.loads(path.read_text())['exit_code_by_key'])
    return {name: code for name, code in codes.items() if code is not None}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('room', choices=ROOMS)
    parser.add_argument('--sample', type=int, help=f'number of mutants, drawn with seed {SEED}')
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME',
                        help='run these mutants again; * is a wildcard')
    parser.add_argument('--tests', nargs='+', help="files of tests/ instead of the room's")
    parser.add_argument('-k', default='', help="further selection of tests, as pytest's -k")
    parser.add_argument('--jobs', type=int, default=1, help='mutants at a time (default: 1)')
    parser.add_argument('--count', action='store_true', help='print the number of mutants and exit')
    args = parser.parse_args(arguments)
    files, tests = ROOMS[args.room]
    folder = ROOT / 'work_dirs/mutants' / args.room
    prepare(folder, files, args.tests or tests, f'({LEFT_OUT}) and ({args.k})' if args.k else LEFT_OUT)
    os.chdir(folder)  # mutmut reads its configuration from the working directory
    every = mutants_of(files)
    print(f'{args.room}: {len(every)} mutants')
    if args.count:
        return 0
    chosen = sorted(every)
    if args.sample and args.sample < len(every):
        chosen = random.Random(SEED).sample(chosen, args.sample)
    codes = decided()
    to_show = args.only or [name for name in chosen if codes.get(name) not in NOTICED]
    os.environ.update(PYTHONPATH=str(folder / 'mutants'), OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    mutmut = [sys.executable, '-m', 'mutmut']
    if to_show:
        done = subprocess.run([*mutmut, 'run', '--max-children', str(args.jobs), *to_show])
        if done.returncode:
            return done.returncode
    codes = decided()
    shown = [name for name in chosen if name in codes]
    not_run = [name for name in shown if codes[name] == NOT_RUN]
    if not_run:
        print(f'{len(not_run)} mutants could not run, because the tests that reach them did not start, e.g. '
              f'{not_run[0]}')
        return 1
    unnoticed = [name for name in shown if codes[name] not in NOTICED]
    for name in unnoticed:
        subprocess.run([*mutmut, 'show', name])
    noticed = len(shown) - len(unnoticed)
    print(f'{args.room}: {noticed} of {len(shown)} mutants killed ({noticed / max(len(shown), 1):.1%}), '
          f'of {len(every)} in total')
    return 0


if __name__ == '__main__':
    sys.exit(main())
