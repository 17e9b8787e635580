"""Measure the accuracy of a classifier's frozen features with few labels, or on classes that it was not trained on.

    python research/few_shot.py CONFIG CHECKPOINT --csv FILE.csv [--novel 5 6 7 8 9]

The features are the inputs of the head's last layer, for the training and the test images. Both go through the test's
pipeline. The model is not trained. scikit-learn fits the following:

- kNN: 20 nearest training images by cosine similarity s, weighted by exp(s / 0.07) (Wu et al., arXiv 1805.01978).
- linear probe: logistic regression on the training images, with --shots images of each class and with all images.
- episodes: an episode draws --ways classes and --shots images of each class. It assigns --queries more images of each
  class to the nearest class mean (Snell et al., arXiv 1703.05175). Episodes draw from the test images only, and only
  from the classes in --novel if that is given. The result is the mean over --episodes with its 95 % interval.

Labels are those of the test. A new measurement replaces the same row of the table.
"""
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))
from records import processor, read_rows, write_rows
from robustness import build, make_parser, model_columns, parse

FIELDS = ('config', 'checkpoint', 'protocol', 'accuracy', 'interval', 'images', 'processor', 'torch')
NEIGHBOURS, TEMPERATURE = 20, 0.07


@torch.no_grad()
def features(model, loader):
    """Return features (n, C) of unit length in float32, and labels (n,)."""
    model.eval()
    found, labels = [], []
    for batch in loader:
        data = model.data_preprocessor(batch, training=False)
        found.append(model.extract_feat(data['inputs'], stage='pre_logits').flatten(1).float().cpu())
        labels += [int(sample.gt_label) for sample in data['data_samples']]
    return torch.nn.functional.normalize(torch.cat(found)).numpy(), np.array(labels)


def similarity(distance):
    return np.exp((1 - distance) / TEMPERATURE)


def neighbours(known, others):
    """Return the accuracy of the weighted nearest neighbours, in percent."""
    model = KNeighborsClassifier(min(NEIGHBOURS, len(known[1])), weights=similarity, metric='cosine')
    return 100 * model.fit(*known).score(*others)


def probe(known, others):
    """Return the accuracy of a linear classifier, in percent."""
    return 100 * make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(*known).score(*others)


def first_of_each(known, count):
    """Return the first ``count`` features and labels of each class, in their order."""
    places = np.sort(np.concatenate([np.flatnonzero(known[1] == label)[:count] for label in np.unique(known[1])]))
    return known[0][places], known[1][places]


def episodes(images, labels, ways, shots, queries, count, seed=0):
    """Return the mean accuracy and half of its 95 % interval, in percent."""
    chance = np.random.default_rng(seed)
    by_class = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    scarce = {label: len(places) for label, places in by_class.items() if len(places) < shots + queries}
    if len(by_class) < ways:
        raise SystemExit(f'--ways {ways}: there are only {len(by_class)} classes')
    if scarce:
        raise SystemExit(f'--shots {shots} --queries {queries}: class {min(scarce)} has only {min(scarce.values())} '
                         'images')
    results = []
    for _ in range(count):
        drawn = np.stack([chance.choice(by_class[label], shots + queries, replace=False)
                          for label in chance.choice(list(by_class), ways, replace=False)])
        means = images[drawn[:, :shots]].mean(1)
        distance = ((images[drawn[:, shots:]][:, :, None] - means) ** 2).sum(-1)
        results.append(100 * (distance.argmin(-1) == np.arange(ways)[:, None]).mean())
    return np.mean(results), 1.96 * np.std(results, ddof=1) / count ** 0.5


def measure(args):
    """Return [(protocol, accuracy, half of the interval or '', number of images)]."""
    with tempfile.TemporaryDirectory() as folder:
        runner = build(args, folder)
        if runner.cfg.default_scope != 'mmpretrain':
            raise SystemExit(f'{args.config} is a configuration of {runner.cfg.default_scope}: this script needs a '
                             'classifier of mmpretrain')
        test = runner.cfg.test_dataloader
        train = dict(test, dataset=dict(runner.cfg.train_dataloader.dataset, pipeline=test.dataset.pipeline))
        train['dataset'].pop('indices', None)  # the model may have been trained on a part of the images
        known = features(runner.model, runner.build_dataloader(train))
        others = features(runner.model, runner.build_dataloader(test))
    rows = [(f'{NEIGHBOURS} nearest neighbours', neighbours(known, others), '', len(known[1])),
            ('linear probe, all images', probe(known, others), '', len(known[1]))]
    for shots in args.shots:
        few = first_of_each(known, shots)
        rows.append((f'linear probe, {shots} of each class', probe(few, others), '', len(few[1])))
    chosen = np.isin(others[1], args.novel) if args.novel else np.full(len(others[1]), True)
    if args.novel and set(args.novel) - set(others[1]):
        raise SystemExit(f'--novel {sorted(set(args.novel) - set(others[1]))}: no test image has that label')
    for shots in args.shots:
        mean, half = episodes(others[0][chosen], others[1][chosen], args.ways, shots, args.queries, args.episodes)
        which = f' of classes {", ".join(map(str, sorted(args.novel)))}' if args.novel else ''
        rows.append((f'{args.ways}-way {shots}-shot{which}', mean, f'{half:.2f}', int(chosen.sum())))
    return rows


def main(arguments=None):
    parser = make_parser(__doc__)
    parser.add_argument('--novel', type=int, nargs='+', metavar='LABEL', help='classes of the episodes (default: all)')
    parser.add_argument('--ways', type=int, default=5, help='classes of an episode (default: 5)')
    parser.add_argument('--shots', type=int, nargs='+', default=[1, 5, 20],
                        help='labelled images of each class (default: 1 5 20)')
    parser.add_argument('--queries', type=int, default=15, help='test images of each class (default: 15)')
    parser.add_argument('--episodes', type=int, default=600, help='number of episodes (default: 600)')
    args = parse(parser, arguments)
    if min(args.ways, args.episodes) < 2 or min(*args.shots, args.queries) < 1:
        parser.error('--ways and --episodes must be at least 2, --shots and --queries at least 1')
    own = model_columns(args)
    results = measure(args)
    protocols = [protocol for protocol, *_ in results]
    rows = [row for row in read_rows(args.csv) if row['protocol'] not in protocols
            or any(row[key] != value for key, value in own.items())]
    rows += [dict(own, protocol=protocol, accuracy=f'{accuracy:.2f}', interval=half, images=images,
                  processor=processor(), torch=version('torch')) for protocol, accuracy, half, images in results]
    write_rows(args.csv, FIELDS, rows)
    for protocol, accuracy, half, _ in results:
        print(f'{protocol:45} {accuracy:6.2f} %' + (f' ± {half}' if half else ''))


if __name__ == '__main__':
    main()
