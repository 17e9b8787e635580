"""The ablations of the paper's Table 5 and of SCAttn's branches, or of the size of the windows, on the handwritten
digits with LocalVim-nano.

    python tools/search/ablation_digits.py --out work_dirs/ablation
    python tools/search/ablation_digits.py windows --out work_dirs/windows

For every seed each model is trained from scratch, as long as the others; the searched directions cost their search
besides. Finished trainings in --out are not repeated. The same on ImageNet: README.md names the configurations.
"""
import argparse
from pathlib import Path

from compare_digits import print_results, train

STUDIES = {
    # In the order of the paper's table; the last but one adds the branch of Fig. 3b that the authors' code leaves out.
    'paper': {
        'global scans': 'localvim-nano_ablation-global_digits',
        'local scans': 'localvim-nano_ablation-local_digits',
        'global and local': 'localvim-nano_ablation-noscattn_digits',
        'global and local, SCAttn (channel)': 'localvim-nano_digits',
        'global and local, SCAttn (channel and spatial)': 'localvim-nano_ablation-spatial_digits',
        'searched, SCAttn (channel)': 'localvim-nano_digits',
    },
    # 16x16 tokens; h, h_flip and one window with its flip.
    'windows': {f'w{size}': f'localvim-nano_windows-w{size}_digits' for size in (2, 3, 7, 14)},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', nargs='?', choices=STUDIES, default='paper')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/ablation'))
    parser.add_argument('--epochs', type=int, default=15)
    parser.add_argument('--search-epochs', type=int, default=6)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--models', nargs='+', metavar='NAME', help='only these rows')
    args = parser.parse_args()
    models = STUDIES[args.study]
    unknown = set(args.models or ()) - set(models)
    if unknown:
        parser.error(f'unknown: {"; ".join(unknown)}. The rows are: {"; ".join(models)}')
    results = {}
    for seed in args.seeds:
        for name in args.models or models:
            options = []
            if name.startswith('searched'):
                search = args.out / f'search-{seed}'
                train('localvim-nano_search_digits', search, args.search_epochs, seed)
                options = [f'model.backbone.directions={search / "directions.json"}']
            folder = ''.join(c if c.isalnum() else '-' for c in name)
            accuracy = train(models[name], args.out / f'{folder}-{seed}', args.epochs, seed, options)
            results.setdefault(name, []).append(accuracy)
            print(f'seed {seed}, {name}: {accuracy:.2f}', flush=True)
    print_results('model', args.seeds, results)


if __name__ == '__main__':
    main()
