"""Measure how much each part of a model adds to its accuracy: trainings from scratch by one recipe, over several seeds.

    python research/evidence.py components --jobs 2     # train the rows that the table lacks, print the study
    python research/evidence.py components --report     # only print
    python research/evidence.py components windows --report --plot docs/images/evidence.png   # draw a picture too

The table is research/results/evidence.csv. The script does not repeat trainings that are in the table, and it keeps all
trainings in --out.

Data of classifiers: `python tools/dataset_converters/fashion_mnist.py /usr/share/datasets/fashion-mnist
data/fashion_mnist --per-class 400`. Data of detectors and segmentors: `python research/stamps.py
/usr/share/tuxpaint/stamps data/stamps`. `--data digits` takes the digits instead. The rows of a study differ only in
their models; the search of a searched row is an additional training.

The script prints the metric of the last epoch (accuracy, box AP, mIoU, in percent), the mean over seeds with its 95 %
interval (Student's t), and the mean difference to the study's reference. The interval of a difference is computed from
the differences seed by seed, because equal seeds have the same order of images and the same augmentation.
"""
import argparse
import copy
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from mmengine.config import Config

from mmlocalmamba.backbones.archs import LOCAL_VIM, LOCAL_VMAMBA, WITHOUT_SEARCH
from mmlocalmamba.files import write_whole
from mmlocalmamba.search import CANDIDATES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))
from records import interval, plus_minus, processor, read_rows, write_rows

RESEARCH = Path(__file__).resolve().parent
ROOT = RESEARCH.parent
FIELDS = ('study', 'row', 'data', 'seed', 'metric', 'value', 'images', 'epochs', 'parameters', 'processor',
          'torch', 'work_dir')


def searched(**sampling):
    """Return directions that a search with these settings finds."""
    return dict(search=dict(candidates=list(CANDIDATES), **sampling))


def windows(size, **backbone):
    return dict(directions=['h', 'h_flip', f'w{size}', f'w{size}_flip'], **backbone)


def blocks(local):
    """Return LocalVim with local scans in the given blocks and all four global scans in the others."""
    return dict(directions=[WITHOUT_SEARCH if i in local else GLOBAL for i in range(LOCAL_VIM['nano']['num_layers'])])


def peer(in_channels, **backbone):
    """Return a backbone of mmpretrain instead of the configuration's. The neck or head above it takes in_channels."""
    return dict(_delete_=True, in_channels=in_channels, init_cfg=None, **backbone)


SWIN = dict(type='mmpretrain.SwinTransformer', arch=dict(
    embed_dims=28, depths=[2, 2, 2, 1], num_heads=[1, 2, 4, 8]), drop_path_rate=0.0, pad_small_map=True)
RESNET = dict(type='mmpretrain.ResNet', depth=18, base_channels=20, stem_channels=20)
# Backbones with all four stages, for a neck or a head.
PYRAMIDS = {
    'LocalVMamba': {},
    'Swin': peer([28, 56, 112, 224], out_indices=(0, 1, 2, 3), **SWIN),
    'ResNet': peer([20, 40, 80, 160], out_indices=(0, 1, 2, 3), **RESNET),
}
SIDE = dict(fashion=28, digits=32)  # image size of classifiers; detectors and segmentors take 128
PATCH = 4  # 7x7 or 8x8 tokens; rows may set another size
GLOBAL = ['h', 'h_flip', 'v', 'v_flip']
# 7 blocks of two scans replace 6 blocks of four, as the paper replaces 20 blocks of four scans by 24 of two.
TWO_SCANS = dict(arch=dict(_delete_=True, embed_dims=64, num_layers=7, d_state=4), scattn=False)

# {study: (model, {row: settings of the backbone})}. The first row is the reference. The number of parameters of a peer
# is within a tenth of the model's.
STUDIES = {
    # Table 5 of the paper, its branches of SCAttn (Fig. 3b), and a transformer.
    'components': ('localvim', {
        'Vim: global scans': dict(TWO_SCANS, directions=['h', 'h_flip']),
        'local scans': dict(TWO_SCANS, directions=['w2', 'w2_flip']),
        'global and local': dict(scattn=False),
        'global and local, SCAttn (channel)': {},
        'global and local, SCAttn (channel and spatial)': dict(scattn=dict(spatial=True)),
        'searched, SCAttn (channel)': dict(directions=searched()),
        'random four, SCAttn (channel)': dict(directions='random'),
        'DeiT': peer(64, type='mmpretrain.VisionTransformer', arch=dict(
            embed_dims=64, num_layers=5, num_heads=4, feedforward_channels=256), out_type='cls_token'),
    }),
    'windows': ('localvim', {
        'w2': {}, 'w3': windows(3), 'w5': windows(5), 'w7': windows(7),
    }),
    # An image of 224x224 pixels in patches of 16 has as many tokens.
    'windows_of_14x14': ('localvim', {f'w{size}': windows(size, patch_size=2) for size in (2, 7, 14)}),
    'depth': ('localvim', {
        'global scans in all blocks': blocks(()),
        'local scans in blocks 1 and 2': blocks((0, 1)),
        'local scans in blocks 3 and 4': blocks((2, 3)),
        'local scans in blocks 5 and 6': blocks((4, 5)),
        'local scans in all blocks': {},
    }),
    'hierarchies': ('localvmamba', {
        'VMamba': dict(directions=GLOBAL, scattn=False),
        'LocalVMamba without search': {},
        'LocalVMamba, searched': dict(directions=searched()),
        'VMamba v2': dict(arch='nano_v2', directions=GLOBAL, scattn=False),
        'LocalVMamba v2 without search': dict(arch='nano_v2'),
        'Swin': peer(224, **SWIN),
        'ResNet': peer(160, **RESNET),
    }),
    'samplings': ('localvim', {
        'full': dict(directions=searched()),
        'single_path, 4 directions': dict(directions=searched(sampling='single_path', samples=4)),
        'single_path, 1 direction': dict(directions=searched(sampling='single_path', samples=1)),
        'partial_channel, 1/4': dict(directions=searched(sampling='partial_channel', reduction=4)),
        'random four': dict(directions='random'),
    }),
    'detection': ('mask-rcnn_localvmamba', PYRAMIDS),
    'segmentation': ('upernet_localvmamba', PYRAMIDS),
}
# {model: (data, epochs, metric, factor to percent)}. A segmentor's epochs follow from its iterations.
CLASSIFIER = ('fashion', 4, 'accuracy/top1', 1)
TASKS = {
    'localvim': CLASSIFIER,
    'localvmamba': CLASSIFIER,
    'mask-rcnn_localvmamba': ('stamps', 12, 'coco/bbox_mAP', 100),
    'upernet_localvmamba': ('stamps', 12, 'mIoU', 1),
}
DEPTHS = dict(localvim=LOCAL_VIM['nano']['num_layers'], localvmamba=sum(LOCAL_VMAMBA['nano']['depths']))


def random_four(blocks, seed):
    chance = random.Random(seed)
    return [[name for name in CANDIDATES if name in four]
            for four in (chance.sample(CANDIDATES, 4) for _ in range(blocks))]


def make_config(model, data, settings, seed, epochs, directions=None):
    """Return the configuration of one training."""
    path = RESEARCH / 'configs' / f'{model}-nano_{data}.py'
    cfg = Config.fromfile(path if path.is_file() else ROOT / 'configs' / path.name)
    settings = dict(patch_size=PATCH) | copy.deepcopy(settings)
    if settings.get('_delete_'):
        above = dict(mmpretrain='head', mmdet='neck', mmseg='decode_head')[cfg.default_scope]
        cfg.model[above].in_channels = settings.pop('in_channels')
        if settings['type'] == 'mmpretrain.ResNet':
            del settings['patch_size']
        else:
            settings['img_size'] = SIDE[data] if cfg.default_scope == 'mmpretrain' else 128
    else:
        if model == 'localvim':
            settings['window_pad'] = 'none'
        if directions is not None:
            settings['directions'] = directions
    cfg.merge_from_dict(dict(model=dict(backbone=settings)))
    if isinstance(cfg.model.backbone.get('directions'), dict):
        # The search trains logits and weights together, with the settings of the digits' search.
        search = Config.fromfile(ROOT / 'configs' / 'localvim-nano_search_digits.py')
        cfg.custom_hooks = search.custom_hooks
        cfg.optim_wrapper.paramwise_cfg = search.optim_wrapper.paramwise_cfg
    if 'max_iters' in cfg.train_cfg:
        length = cfg.train_cfg.max_iters
    else:
        length = cfg.train_cfg.max_epochs = epochs
    cfg.train_cfg.val_interval = length
    cfg.randomness = dict(seed=seed)
    cfg.default_hooks.checkpoint.update(save_best=None, interval=length)
    cfg.log_level = 'WARNING'
    return cfg


def train(cfg, out, metric='accuracy/top1'):
    """Train a configuration and return its work directory and its final metric.

    A finished training is not repeated, and an interrupted one continues. A configuration has one directory, even if it
    belongs to several studies.
    """
    work_dir = out / hashlib.sha256(cfg.pretty_text.encode()).hexdigest()[:12]
    done = work_dir / 'result.json'
    if not done.exists():
        data = cfg.train_dataloader.dataset.data_root
        if not Path(data).is_dir():
            raise SystemExit(f'{data} does not exist: docs/data.md names the command that writes it')
        work_dir.mkdir(parents=True, exist_ok=True)
        path = work_dir / 'config.py'
        cfg.dump(str(path))
        with (work_dir / 'output.txt').open('w') as output:
            code = subprocess.run([sys.executable, str(ROOT / 'tools' / 'train.py'), str(path), '--work-dir',
                                   str(work_dir), '--resume'], stdout=output, stderr=output).returncode
        if code:
            raise SystemExit(f'{path}: the training exited with {code}, see {output.name}')
        logs = sorted(work_dir.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
        found = [json.loads(line) for log in logs for line in log.read_text().splitlines() if f'"{metric}"' in line]
        write_whole(str(done), json.dumps(dict(accuracy=found[-1][metric])))
    return work_dir, json.loads(done.read_text())['accuracy']


def parameters(cfg):
    from mmengine.registry import MODELS, DefaultScope
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return sum(parameter.numel() for parameter in MODELS.build(cfg.model).parameters())


def task(study, args):
    """Return (model, data, epochs, metric, factor to percent) of a study; arguments may set data and epochs."""
    model = STUDIES[study][0]
    data, epochs, *metric = TASKS[model]
    return model, args.data or data, args.epochs or epochs, *metric


def images_in(dataset):
    prefix = dataset.data_prefix
    prefix = prefix if isinstance(prefix, str) else prefix.get('img') or prefix['img_path']
    return sum(1 for _ in Path(dataset.data_root, prefix).rglob('*.png'))


def run(study, row, seed, args):
    """Train a row of a study with one seed and return its row of the table."""
    rows = STUDIES[study][1]
    model, data, epochs, metric, scale = task(study, args)
    settings, directions = rows[row], None
    wanted = settings.get('directions')
    if isinstance(wanted, dict):
        cfg = make_config(model, data, dict(settings, directions=wanted['search']), seed, epochs)
        found, _ = train(cfg, args.out)
        directions = json.loads((found / 'directions.json').read_text())['directions']
    elif wanted == 'random':
        directions = random_four(DEPTHS[model], seed)
    cfg = make_config(model, data, settings, seed, epochs, directions=directions)
    work_dir, value = train(cfg, args.out, metric)
    return dict(study=study, row=row, data=data, seed=seed, metric=metric, value=f'{scale * value:.2f}',
                images=images_in(cfg.train_dataloader.dataset), epochs=epochs, parameters=parameters(cfg),
                processor=processor(), torch=version('torch'), work_dir=work_dir.name)


def known(rows, study, row, seed, args):
    _, data, epochs, *_ = task(study, args)
    return any((found['study'], found['row'], found['data'], int(found['seed']), int(found['epochs']))
               == (study, row, data, seed, epochs) for found in rows)


def measure(study, args):
    rows = read_rows(args.csv)
    missing = [(study, row, seed) for seed in args.seeds for row in args.rows or STUDIES[study][1]
               if not known(rows, study, row, seed, args)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda job: run(*job, args), missing):
            write_rows(args.csv, FIELDS, [*read_rows(args.csv), result])  # read again: another call may have added rows
            print('{study}: {row}, seed {seed}: {value}'.format(**result), flush=True)


# ---- the report ----

def by_row(rows, study, args):
    """Return {name: {seed: row of the table}} in the study's order."""
    _, data, epochs, *_ = task(study, args)
    table = defaultdict(dict)
    for row in rows:
        if (row['study'], row['data'], int(row['epochs'])) == (study, data, epochs):
            table[row['row']][int(row['seed'])] = row
    return {name: table[name] for name in STUDIES[study][1] if name in table}


def report(study, rows, args):
    table = by_row(rows, study, args)
    if not table:
        _, data, epochs, *_ = task(study, args)
        raise SystemExit(f'{study}: the table has no rows of {data} with {epochs} epochs yet')
    seeds = sorted({seed for found in table.values() for seed in found})
    reference = next(iter(STUDIES[study][1]))
    base = {seed: float(row['value']) for seed, row in table.get(reference, {}).items()}
    one = next(iter(next(iter(table.values())).values()))
    print('{study}, {data}: {metric}, {images} images, {epochs} epochs; {processor}, torch {torch}\n'.format(**one))
    print(f'| | parameters | {" | ".join(f"seed {seed}" for seed in seeds)} | mean | difference to the first |')
    print('|---' * (len(seeds) + 4) + '|')
    for name, found in table.items():
        values = {seed: float(row['value']) for seed, row in found.items()}
        pairs = [values[seed] - base[seed] for seed in values if seed in base and name != reference]
        print(f'| {name} | {int(next(iter(found.values()))["parameters"]) / 1e3:.0f} k | '
              + ' | '.join(f'{values[seed]:.2f}' if seed in values else '' for seed in seeds)
              + f' | {plus_minus(list(values.values()))} | {plus_minus(pairs, "+") if pairs else ""} |')


def draw(rows, args):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    tables = {study: by_row(rows, study, args) for study in args.study}
    metric, = {task(study, args)[3] for study in args.study}
    figure, axes = plt.subplots(len(tables), 1, figsize=(8, 0.6 + 0.34 * sum(len(table) + 2 for table in
                                                                             tables.values())),
                                sharex=True, squeeze=False,
                                gridspec_kw=dict(height_ratios=[len(table) for table in tables.values()]))
    for panel, (study, table) in zip(axes[:, 0], tables.items(), strict=True):
        for place, found in enumerate(table.values()):
            values = [float(row['value']) for row in found.values()]
            panel.plot(values, [place] * len(values), 'o', color='C0', alpha=0.45, markersize=4)
            panel.errorbar(statistics.mean(values), place, xerr=interval(values), fmt='|', color='C3', capsize=4,
                           markersize=10)
        panel.set_yticks(range(len(table)), table)
        panel.set_ylim(len(table) - 0.4, -0.6)
        panel.set_title(study, loc='left', fontsize=10)
        panel.grid(axis='x', alpha=0.3)
    axes[-1, 0].set_xlabel(f'{metric}, %; dots: seeds, bar: 95 % interval of the mean')
    figure.tight_layout()
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', nargs='+', metavar='STUDY', help=f'one or more of {", ".join(STUDIES)}')
    parser.add_argument('--data', choices=('fashion', 'digits', 'stamps'), help="data (default: the study's own)")
    parser.add_argument('--csv', type=Path, default=RESEARCH / 'results' / 'evidence.csv',
                        help='table to read and extend (default: research/results/evidence.csv)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/evidence'), help='folder of the trainings')
    parser.add_argument('--epochs', type=int, help="length of a training (default: the study's own)")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--rows', nargs='+', metavar='ROW', help='train only these rows')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at a time, with one thread each')
    parser.add_argument('--report', action='store_true', help='only print the table, do not train')
    parser.add_argument('--plot', metavar='FILE', help='draw the studies, which must have the same metric')
    args = parser.parse_args(arguments)
    for study in args.study:
        if study not in STUDIES:
            parser.error(f'unknown study {study!r}: the studies are {", ".join(STUDIES)}')
    if args.epochs and 'segmentation' in args.study:
        parser.error("--epochs: the segmentor's training counts iterations, and its configuration sets their number")
    if args.plot and len({task(study, args)[3] for study in args.study}) > 1:
        parser.error('--plot: these studies have different metrics; draw one at a time')
    unknown = set(args.rows or ()) - {row for study in args.study for row in STUDIES[study][1]}
    if unknown:
        parser.error(f'--rows: unknown {"; ".join(sorted(unknown))}')
    os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    for study in args.study:
        if not args.report:
            measure(study, args)
        report(study, read_rows(args.csv), args)
        print()
    if args.plot:
        draw(read_rows(args.csv), args)


if __name__ == '__main__':
    main()
