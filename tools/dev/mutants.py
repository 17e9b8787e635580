"""Mutates a room of the package, and shows each mutant to the tests that reach it.

    python tools/dev/mutants.py layers --sample 200
    python tools/dev/mutants.py weights --only 'mmlocalmamba.weights.names.*' --jobs 2

mutmut makes the mutants. What it needs stands here, since it reads one configuration and rooms have tests of their own.
All mutants of the room, or a sample of a fixed seed; those that tests have noticed in an earlier call are not shown
again, unless --only names them. It works in a copy, work_dirs/mutants/ROOM: remove that to begin anew. Prints what
nothing notices, each as a diff, and the score.

Tests with "compile", "export" or "mim_test" in their names are left out: torch.compile cannot trace mutmut's wrappers,
and whole `mim test` runs take too long.
"""
import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What is mutated, and the tests that it is shown to: fast ones, and those that know most about it.
ROOMS = dict(
    scans=(['scans.py', 'sizes.py'], ['test_scans.py', 'test_scans_more.py', 'test_sizes.py']),
    layers=(['layers'], ['test_layers.py', 'test_backbones.py', 'test_contract.py', 'test_ops_mixer.py',
                         'test_weights_loading.py']),
    backbones=(['backbones'], ['test_backbones.py', 'test_contract.py', 'test_layer_decay.py',
                               'test_weights_loading.py']),
    necks=(['necks.py'], ['test_necks.py']),
    methods=(['methods.py'], ['test_methods.py']),
    weights=(['weights'], ['test_weights.py', 'test_weights_loading.py', 'test_weights_hook.py']),
    search=(['search'], ['test_search.py', 'test_search_hook.py']),
    engine=(['engine'], ['test_guard.py', 'test_layer_decay.py', 'test_broken_files.py', 'test_jobs.py',
                         'test_loops.py']),
)
LEFT_OUT = 'not compile and not export and not mim_test'
# Trainings in processes of their own, of which mutmut does not see what they reach, and which take minutes.
for name in ('two_processes_have', 'sigkill', 'derive', 'stop_alike', 'bfloat16', 'at_a_random', 'process_group',
             'sample_of_the', 'sees_what', 'launcher', 'before_the_training', 'windows', 'soak', 'killed_while'):
    LEFT_OUT += f' and not {name}'
# A process that begins elsewhere and finds no configuration of mutmut there.
LEFT_OUT += ' and not (names_its_annotations and val)'
SEED = 13
# Exit codes: tests fail or break, take many times as long as usual (mutmut stops them), or the process is killed.
NOTICED = {1, 3, 24, 36, 152, -24, -9, -11}
# mutmut calls it a timeout, but the tests were not run at all: pytest did not find one of them again, for instance.
NOT_RUN = 255


def prepare(folder, files, tests, left_out):
    """A copy of what git tracks and of the native kernel, and mutmut's configuration."""
    # Python, which looks into PYTHONPATH as it starts, believes for good that a folder is not there.
    (folder / 'mutants').mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.splitlines()
    native = [str(path.relative_to(ROOT)) for path in (ROOT / 'mmlocalmamba/ops').glob('*.so')]
    for name in listed + native:
        if (ROOT / name).is_file():
            copy = folder / name
            text = (ROOT / name).read_bytes()
            # Times decide what mutmut makes anew.
            if not copy.is_file() or copy.read_bytes() != text:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(text)
    options = dict(
        source_paths=[f'mmlocalmamba/{name}' for name in files],
        also_copy=sorted({name.split('/')[0] for name in listed} - {'pyproject.toml'}),
        pytest_add_cli_args_test_selection=[f'tests/{name}' for name in tests],
        pytest_add_cli_args=['-k', left_out, '-p', 'no:cacheprovider'],
        # A process that has run the tests before has warm caches of tables: mutants of what fills them would not run.
        process_isolation='forkserver',
        use_git_change_detection=False,
        on_dependency_change='ignore',
    )
    text = (ROOT / 'pyproject.toml').read_text()
    lines = ''.join(f'{key} = {json.dumps(value)}\n' for key, value in options.items())
    (folder / 'pyproject.toml').write_text(f'{text}\n[tool.mutmut]\n{lines}')


def mutants_of(files):
    """Names of all mutants that mutmut makes of files in the folder at hand."""
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
    """Exit code of the tests for each mutant that mutmut has shown them."""
    codes = {}
    for path in Path('mutants/mmlocalmamba').rglob('*.meta'):
        codes.update(json.loads(path.read_text())['exit_code_by_key'])
    return {name: code for name, code in codes.items() if code is not None}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('room', choices=ROOMS)
    parser.add_argument('--sample', type=int, help=f'this many mutants, drawn with seed {SEED}')
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help='mutants, also with *; shown again')
    parser.add_argument('--tests', nargs='+', help='other files of tests/ than the usual ones')
    parser.add_argument('-k', default='', help='a further choice of tests, as of pytest')
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--count', action='store_true', help='say how many mutants there are, and end')
    args = parser.parse_args(arguments)
    files, tests = ROOMS[args.room]
    folder = ROOT / 'work_dirs/mutants' / args.room
    prepare(folder, files, args.tests or tests, f'({LEFT_OUT}) and ({args.k})' if args.k else LEFT_OUT)
    os.chdir(folder)  # mutmut looks for its configuration where it is
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
        print(f'{len(not_run)} mutants could not be shown, since the tests that reach them did not start, e.g. '
              f'{not_run[0]}')
        return 1
    unnoticed = [name for name in shown if codes[name] not in NOTICED]
    for name in unnoticed:
        subprocess.run([*mutmut, 'show', name])
    noticed = len(shown) - len(unnoticed)
    print(f'{args.room}: {noticed} of {len(shown)} mutants noticed ({noticed / max(len(shown), 1):.1%}), '
          f'of {len(every)} in all')
    return 0


if __name__ == '__main__':
    sys.exit(main())
