"""Searched directions against fixed ones on the handwritten digits, at the same budget.

    python tools/search/compare_digits.py --out work_dirs/compare

For every seed: a search, then a training from scratch with the directions that it found, and with each of the others.
Finished trainings in --out are not repeated.
"""
import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from mmlocalmamba.backbones.archs import LOCAL_VIM, LOCAL_VMAMBA
from mmlocalmamba.search import CANDIDATES

ROOT = Path(__file__).resolve().parents[2]
DEPTHS = {'localvim': LOCAL_VIM['nano']['num_layers'], 'localvmamba': sum(LOCAL_VMAMBA['nano']['depths'])}


def train(config, work_dir, epochs, seed, options=()):
    """Accuracy at the end."""
    done = work_dir / 'accuracy.json'
    if not done.exists():
        subprocess.run([
            sys.executable, str(ROOT / 'tools' / 'train.py'), str(ROOT / 'configs' / f'{config}.py'),
            '--work-dir', str(work_dir), '--cfg-options', f'train_cfg.max_epochs={epochs}',
            f'train_cfg.val_interval={epochs}', f'randomness.seed={seed}', 'default_hooks.checkpoint.save_best=None',
            'log_level=WARNING', *options
        ], check=True, stdout=subprocess.DEVNULL)
        log = max(work_dir.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
        found = [json.loads(line)['accuracy/top1'] for line in log.read_text().splitlines() if 'accuracy/top1' in line]
        done.write_text(json.dumps(found[-1]))
    return json.loads(done.read_text())


def print_results(title, seeds, results):
    """A Markdown table of {name: accuracy of every seed}."""
    print(f'| {title} | ' + ' | '.join(f'seed {seed}' for seed in seeds) + ' | mean | standard deviation |')
    print('|---' * (len(seeds) + 3) + '|')
    for name, values in results.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.
        print(f'| {name} | ' + ' | '.join(f'{value:.2f}' for value in values)
              + f' | {statistics.mean(values):.2f} | {spread:.2f} |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/compare'))
    parser.add_argument('--model', choices=DEPTHS, default='localvmamba')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--search-epochs', type=int, default=40)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    args = parser.parse_args()
    results = {}
    for seed in args.seeds:
        found = args.out / f'search-{seed}'
        train(f'{args.model}-nano_search_digits', found, args.search_epochs, seed)
        chance = random.Random(seed)
        some = [[name for name in CANDIDATES if name in four] for four in
                (chance.sample(CANDIDATES, 4) for _ in range(DEPTHS[args.model]))]
        args.out.joinpath(f'random-{seed}.json').write_text(json.dumps(some))
        for name, value in (('searched', found / 'directions.json'), ('h, h_flip, w2, w2_flip', 'h,h_flip,w2,w2_flip'),
                            ('h, h_flip, v, v_flip', 'h,h_flip,v,v_flip'),
                            ('random four in every block', args.out / f'random-{seed}.json')):
            work_dir = args.out / f'{name.replace(", ", "-").replace(" ", "-")}-{seed}'
            accuracy = train(f'{args.model}-nano_digits', work_dir, args.epochs, seed,
                             [f'model.backbone.directions={value}'])
            results.setdefault(name, []).append(accuracy)
            print(f'seed {seed}, {name}: {accuracy:.2f}', flush=True)
    print_results('directions', args.seeds, results)


if __name__ == '__main__':
    main()
