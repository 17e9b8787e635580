"""Measure a model's accuracy on corrupted images, and how well it recognises images of unknown classes.

    python research/robustness.py CONFIG CHECKPOINT --csv FILE.csv [--plot FILE.png]
    python research/robustness.py CONFIG CHECKPOINT --csv FILE.csv --unknown FOLDER
    python research/robustness.py --summary FILE.csv

The first command runs the configuration's test (classification, detection or segmentation) on its images and on the
same images with the 15 corruptions of ImageNet-C (noise, blur, weather, digital) at 5 severities each. The package
imagecorruptions makes them (Hendrycks and Dietterich, arXiv 1903.12261; Michaelis et al., arXiv 1907.07484). The
command prints the test's first metric on clean images, its mean over all corruptions and severities, and the mean
relative to the clean value. Corrupted images are the same every time, and --cache keeps them for the next model. A case
that is in the table is not run again.

The second command is for classifiers. The images in FOLDER and its subfolders must belong to none of the classes. The
command prints how well the largest softmax probability separates them from the test's own images: the area under the
ROC curve (AUROC), and the share of unknown images above the threshold that 95 % of the known images exceed (FPR95).

The third command prints a table with a column for each model and the mean over severities of each corruption. Rows
whose --name ends in ", seed N" are trainings of one model; the table has their mean with its 95 % interval (Student's
t).
"""
import argparse
import hashlib
import inspect
import os
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.runner import Runner, load_checkpoint

from mmlocalmamba.files import SCHEME

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))
from latency import PICTURES
from records import plus_minus, processor, read_rows, write_rows

FIELDS = ('config', 'checkpoint', 'corruption', 'severity', 'metric', 'value', 'images', 'processor', 'torch')
SEVERITIES = (1, 2, 3, 4, 5)
UNKNOWN = 'unknown: '  # the column `corruption` of unknown images: this and the folder
SMALLEST = 32  # the library takes no smaller images


def imagecorruptions():
    try:
        import imagecorruptions
    except ImportError as error:
        raise SystemExit(f'imagecorruptions is missing ({error}): pip install imagecorruptions-imaug') from error
    return imagecorruptions


def corrupted(image, name, severity, seed):
    """Return a corrupted copy of an image (H, W, 3) in uint8. The same seed gives the same copy."""
    library = imagecorruptions()
    height, width = image.shape[:2]
    pads = [(0, max(0, SMALLEST - length)) for length in (height, width)]
    # Two corruptions have generators of their own and take a seed.
    takes = inspect.signature(getattr(library.corruptions, name)).parameters
    own = dict(seed=seed) if 'seed' in takes else {}
    state = np.random.get_state()
    np.random.seed(seed)  # the other corruptions use NumPy's global generator
    try:
        result = library.corrupt(np.pad(image, [*pads, (0, 0)], mode='symmetric'), severity, name, **own)
    finally:
        np.random.set_state(state)
    return np.ascontiguousarray(result[:height, :width].round().clip(0, 255).astype(np.uint8))


class CorruptImage:
    """Corrupt results['img'] after an image is loaded, or read it from the cache."""

    def __init__(self, cache):
        self.cache, self.case = Path(cache), None

    def __call__(self, results):
        if self.case is None:
            return results
        name, severity = self.case
        key = hashlib.sha256(results['img'].tobytes() + repr(results['img'].shape).encode()).hexdigest()[:24]
        path = self.cache / f'{name}-{severity}' / f'{key}.npy'
        if path.is_file():
            results['img'] = np.load(path)
            return results
        results['img'] = corrupted(results['img'], name, severity, int(key[:8], 16))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'.{key}.{os.getpid()}.npy')
        np.save(partial, results['img'])
        partial.rename(path)
        return results


def with_corruption(pipeline, step):
    """Insert a step into a built pipeline, after the image is loaded."""
    at = [i for i, transform in enumerate(pipeline.transforms) if type(transform).__name__ == 'LoadImageFromFile']
    if len(at) != 1:
        raise SystemExit(f'the test pipeline must have exactly one LoadImageFromFile; its steps are '
                         f'{[type(transform).__name__ for transform in pipeline.transforms]}')
    pipeline.transforms.insert(at[0] + 1, step)


def make_parser(description, table=True):
    """Return a parser with the arguments of build(), and those of a table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='configuration file')
    parser.add_argument('checkpoint', help=f'a checkpoint of that configuration, or {SCHEME}NAME for packaged weights')
    if table:
        parser.add_argument('--csv', type=Path, required=True, help='table to read and extend')
        parser.add_argument('--name', help="name of the model in the table (default: the configuration's)")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings')
    return parser


def model_columns(args):
    """Return the columns that identify the model of a row."""
    return dict(config=args.name or Path(args.config).stem, checkpoint=Path(args.checkpoint).name)


def parse(parser, arguments):
    args = parser.parse_args(arguments)
    for path in (args.config, args.checkpoint):
        if not path.startswith(SCHEME) and not Path(path).is_file():
            parser.error(f'{path}: no such file')
    return args


def innermost(dataset):
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset


def build(args, folder):
    """Return a runner with the checkpoint's weights whose test runs in this process and logs nothing."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.update(work_dir=folder, load_from=None, resume=False, log_level='ERROR')
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.visualizer = None
    # If two runners of the same name start within a second, MMEngine gives the second one the scope and the visualizer
    # of the first.
    cfg.experiment_name = Path(folder).name
    cfg.default_hooks.pop('visualization', None)
    runner = Runner.from_cfg(cfg)
    load_checkpoint(runner.model, args.checkpoint, map_location='cpu')
    return runner


def test_of(runner):
    """Return the dataloader and the evaluator of the configuration's test."""
    loader, evaluator = (runner.build_dataloader(runner.cfg.test_dataloader),
                         runner.build_evaluator(runner.cfg.test_evaluator))
    evaluator.dataset_meta = loader.dataset.metainfo
    return loader, evaluator


@torch.no_grad()
def tested(model, loader, evaluator):
    """Test a model and return {metric: value}."""
    model.eval()
    for batch in loader:
        evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
    return evaluator.evaluate(len(loader.dataset))


def metric_of(results, wanted):
    """Return the name and the value of the metric to compare."""
    names = [name for name, value in results.items() if np.isscalar(value)]
    if not names and wanted:
        return wanted, 0.  # mmdet's CocoMetric returns nothing if the model detects nothing
    if wanted is None and names:
        return names[0], float(results[names[0]])
    if wanted not in names:
        raise SystemExit(f'--metric {wanted}: the test gives '
                         f'{", ".join(names) or "no metric, because the model detects nothing"}')
    return wanted, float(results[wanted])


def corruptions(args):
    rows = read_rows(args.csv)
    own = model_columns(args)
    names = args.corruptions or imagecorruptions().get_corruption_names()
    unknown = set(names) - set(imagecorruptions().get_corruption_names('all'))
    if unknown:
        raise SystemExit(f'--corruptions {" ".join(sorted(unknown))}: unknown; the names are '
                         f'{", ".join(imagecorruptions().get_corruption_names("all"))}')
    cases = [None, *((name, severity) for name in names for severity in args.severities)]

    def known(case):
        name, severity = case or ('none', 0)
        return next((row for row in rows if all(row[key] == value for key, value in own.items())
                     and (row['corruption'], int(row['severity'])) == (name, severity)), None)

    missing = [case for case in cases if known(case) is None]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            runner = build(args, folder)
            loader, evaluator = test_of(runner)
            dataset = innermost(loader.dataset)
            step = CorruptImage(args.cache or Path(folder, 'cache'))
            with_corruption(dataset.pipeline, step)
            for case in missing:
                step.case = case
                before = known(None)
                wanted = args.metric or (before and before['metric'])
                name, value = metric_of(tested(runner.model, loader, evaluator), wanted)
                rows.append(dict(own, corruption=case[0] if case else 'none', severity=case[1] if case else 0,
                                 metric=name, value=value, images=len(dataset), processor=processor(),
                                 torch=version('torch')))
                write_rows(args.csv, FIELDS, rows)
                print(f'{case[0] if case else "clean":20} {case[1] if case else "":1}  {name} {value:.4g}', flush=True)
    chosen = [known(case) for case in cases]
    report([row for row in chosen if row['corruption'] != 'none'], float(chosen[0]['value']), chosen[0]['metric'])


def report(rows, clean, metric):
    by_name = defaultdict(dict)
    for row in rows:
        by_name[row['corruption']][int(row['severity'])] = float(row['value'])
    severities = sorted({severity for values in by_name.values() for severity in values})
    print(f'\n| corruption | {" | ".join(map(str, severities))} | mean |\n|{"---|" * (len(severities) + 2)}')
    for name, values in by_name.items():
        print(f'| {name} | ' + ' | '.join(f'{values[severity]:.4g}' for severity in severities)
              + f' | {np.mean(list(values.values())):.4g} |')
    mean = np.mean([value for values in by_name.values() for value in values.values()])
    share = f'{mean / clean:.1%} of the clean value' if clean else 'no clean value to compare with'
    print(f'\n{metric}: clean {clean:.4g}, mean over corruptions {mean:.4g}, {share}')


def scores(rows):
    """Return {line of the summary: value} of one training."""
    lines, corrupted = defaultdict(list), []
    for row in rows:
        name, value = row['corruption'], float(row['value'])
        if name.startswith(UNKNOWN):
            name = f'{name.removeprefix(UNKNOWN)}: {row["metric"]}'
        elif name != 'none':
            corrupted.append(value)
        lines[name].append(value)
    values = {name: np.mean(found) for name, found in lines.items()}
    first = {}
    if 'none' in values:
        first['clean'] = clean = values.pop('none')
    if corrupted:
        first['mean over corruptions'] = np.mean(corrupted)
        if first.get('clean'):
            first['share of the clean value, %'] = 100 * np.mean(corrupted) / clean
    return first | values


def summary(rows):
    """Print a column for each model. Trainings that differ only in their seeds are one model."""
    trainings = defaultdict(lambda: defaultdict(list))
    for row in rows:
        trainings[row['config'].partition(', seed ')[0]][row['config']].append(row)
    columns = {model: [scores(found) for found in seeds.values()] for model, seeds in trainings.items()}
    print(f'| | {" | ".join(columns)} |\n|{"---|" * (len(columns) + 1)}')
    for line in dict.fromkeys(line for column in columns.values() for values in column for line in values):
        cells = ([float(values[line]) for values in column if line in values] for column in columns.values())
        print(f'| {line.replace("_", " ")} | {" | ".join(plus_minus(values) if values else "" for values in cells)} |')


class Summary(argparse.Action):
    """Print a table and exit, without a configuration and a checkpoint, as --help does."""

    def __call__(self, parser, namespace, path, option_string=None):
        rows = read_rows(Path(path))
        if not rows:
            parser.error(f'{option_string} {path}: the file has no rows')
        summary(rows)
        parser.exit()


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw(args):
    """Draw the metric by severity: a line for each corruption, a panel for each model of the table."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    models = defaultdict(list)
    for row in read_rows(args.csv):
        if not row['corruption'].startswith(UNKNOWN):
            models[row['config'], row['checkpoint'], row['metric']].append(row)
    models = {key: rows for key, rows in models.items() if any(row['corruption'] != 'none' for row in rows)}
    if not models:
        raise SystemExit(f'--plot: {args.csv} has no rows of corruptions yet')
    figure, axes = plt.subplots(1, len(models), figsize=(2.2 + 4.2 * len(models), 4.6), squeeze=False)
    for panel, ((config, _, metric), rows) in zip(axes[0], models.items(), strict=True):
        by_name = defaultdict(dict)
        for row in rows:
            by_name[row['corruption']][int(row['severity'])] = float(row['value'])
        clean = by_name.pop('none', {}).get(0)
        for index, (name, values) in enumerate(sorted(by_name.items())):
            points = sorted({**({0: clean} if clean is not None else {}), **values}.items())
            panel.plot(*zip(*points), marker='osD^v'[index // 10], markersize=4, color=f'C{index % 10}',
                       linestyle='-' if index < 10 else '--', label=name.replace('_', ' '))
        panel.set(title=config, xlabel='severity (0: clean)', ylabel=metric)
        panel.set_xticks(range(6))
        panel.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Unknown images


@torch.no_grad()
def largest_probabilities(model, batches):
    model.eval()
    return np.array([float(sample.pred_score.max()) for batch in batches for sample in model.test_step(batch)])


def unknown(args):
    from sklearn.metrics import roc_auc_score
    files = sorted(path for path in Path(args.unknown).rglob('*') if path.suffix.lower() in PICTURES)
    if not files:
        raise SystemExit(f'--unknown {args.unknown}: the folder has no image ({", ".join(PICTURES)})')
    with tempfile.TemporaryDirectory() as folder:
        runner = build(args, folder)
        if runner.cfg.default_scope != 'mmpretrain':
            raise SystemExit(f'--unknown is for classifiers; {args.config} is a configuration of '
                             f'{runner.cfg.default_scope}')
        loader = runner.build_dataloader(runner.cfg.test_dataloader)
        known = largest_probabilities(runner.model, loader)
        with DefaultScope.overwrite_default_scope(runner.cfg.default_scope):
            pipeline = Compose([TRANSFORMS.build(step) for step in runner.cfg.test_dataloader.dataset.pipeline])
        shape = next(iter(loader))['inputs'][0].shape[1:]

        def batches(size=64):
            import cv2
            for begin in range(0, len(files), size):
                samples = [pipeline(dict(img_path=str(file), gt_label=0)) for file in files[begin:begin + size]]
                for sample in samples:
                    if sample['inputs'].shape[1:] != shape:
                        picture = sample['inputs'].permute(1, 2, 0).numpy()
                        picture = cv2.resize(picture, tuple(shape)[::-1], interpolation=cv2.INTER_AREA)
                        sample['inputs'] = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
                yield dict(inputs=[sample['inputs'] for sample in samples],
                           data_samples=[sample['data_samples'] for sample in samples])

        others = largest_probabilities(runner.model, batches())
    area = roc_auc_score(np.r_[np.ones(len(known)), np.zeros(len(others))], np.r_[known, others])
    threshold = np.quantile(known, 0.05)
    false = float((others >= threshold).mean())
    rows = read_rows(args.csv)
    own = dict(model_columns(args), corruption=UNKNOWN + Path(args.unknown).as_posix().strip('/'), severity=0)
    rows = [row for row in rows if any(str(row[key]) != str(value) for key, value in own.items())]
    for name, value in (('AUROC', area), ('FPR95', false)):
        rows.append(dict(own, metric=name, value=value, images=len(others), processor=processor(),
                         torch=version('torch')))
    write_rows(args.csv, FIELDS, rows)
    print(f'{len(known)} known images, {len(others)} unknown images: AUROC {area:.4f}, FPR95 {false:.4f}')


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument('--corruptions', nargs='+', metavar='NAME', help='corruptions (default: the 15 of ImageNet-C)')
    parser.add_argument('--severities', type=int, nargs='+', choices=SEVERITIES, default=SEVERITIES)
    parser.add_argument('--metric', help="metric to compare, by the test's name (default: the first one)")
    parser.add_argument('--cache', type=Path, help='folder that keeps corrupted images (default: they are not kept)')
    parser.add_argument('--plot', help='draw the whole table')
    parser.add_argument('--unknown', metavar='FOLDER', help='images that belong to none of the classes')
    parser.add_argument('--summary', action=Summary, metavar='FILE.csv', help='print a table of all models and exit')
    args = parse(parser, arguments)
    unknown(args) if args.unknown else corruptions(args)
    if args.plot:
        draw(args)


if __name__ == '__main__':
    main()
