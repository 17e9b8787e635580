"""What are a classifier's frozen features worth, with few labels or for classes that it was not trained on?

    python tools/analysis_tools/few_shot.py CONFIG CHECKPOINT --csv FILE.csv [--novel 5 6 7 8 9]

Features are what stands before the head's last layer, of the training and the test images, both through the test's
pipeline; nothing is trained but what stands here, by scikit-learn:

- kNN: 20 nearest training images by cosine similarity s, weighted by exp(s / 0.07) (Wu et al., arXiv 1805.01978).
- linear probe: logistic regression on the training images, with --shots images of each class and with all of them.
- episodes: of --ways classes, --shots images of each; --queries more of each class go to the nearest mean of a class
  (Snell et al., arXiv 1703.05175). Test images only, of the classes in --novel if given. The mean over --episodes with
  its 95 % interval.

Labels are the test's. A row of the table is replaced when it is measured again.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analysis_tools.robustness import build, make_parser, of_model, parse
from records import processor, read_rows, write_rows

FIELDS = ('config', 'checkpoint', 'protocol', 'accuracy', 'interval', 'images', 'processor', 'torch')
NEIGHBOURS, TEMPERATURE = 20, 0.07


@torch.no_grad()
def features(model, loader):
    """(features (n, C) of length 1, float32; labels (n,))"""
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
    """Accuracy of the weighted nearest neighbours, in percent."""
    model = KNeighborsClassifier(min(NEIGHBOURS, len(known[1])), weights=similarity, metric='cosine')
    return 100 * model.fit(*known).score(*others)


def probe(known, others):
    """Accuracy of a linear classifier, in percent."""
    return 100 * make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(*known).score(*others)


def first_of_each(known, count):
    """That many of each class, in their order."""
    places = np.sort(np.concatenate([np.flatnonzero(known[1] == label)[:count] for label in np.unique(known[1])]))
    return known[0][places], known[1][places]


def episodes(images, labels, ways, shots, queries, count, seed=0):
    """(mean accuracy, half of its 95 % interval), in percent."""
    chance = np.random.default_rng(seed)
    by_class = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    scarce = {label: len(places) for label, places in by_class.items() if len(places) < shots + queries}
    if len(by_class) < ways:
        raise SystemExit(f'--ways {ways}: there are {len(by_class)} classes to draw from')
    if scarce:
        raise SystemExit(f'--shots {shots} --queries {queries}: class {min(scarce)} has {min(scarce.values())} images')
    results = []
    for _ in range(count):
        drawn = np.stack([chance.choice(by_class[label], shots + queries, replace=False)
                          for label in chance.choice(list(by_class), ways, replace=False)])
        means = images[drawn[:, :shots]].mean(1)
        distance = ((images[drawn[:, shots:]][:, :, None] - means) ** 2).sum(-1)
        results.append(100 * (distance.argmin(-1) == np.arange(ways)[:, None]).mean())
    return np.mean(results), 1.96 * np.std(results, ddof=1) / count ** 0.5


def measure(args):
    """[(protocol, accuracy, half of the interval or '', images)]"""
    with tempfile.TemporaryDirectory() as folder:
        runner = build(args, folder)
        if runner.cfg.default_scope != 'mmpretrain':
            raise SystemExit(f'{args.config} is for {runner.cfg.default_scope}: this is for classifiers of mmpretrain')
        test = runner.cfg.test_dataloader
        train = dict(test, dataset=dict(runner.cfg.train_dataloader.dataset, pipeline=test.dataset.pipeline))
        train['dataset'].pop('indices', None)  # the model may have been trained on a part
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
    parser.add_argument('--novel', type=int, nargs='+', metavar='LABEL', help='classes of the episodes (all)')
    parser.add_argument('--ways', type=int, default=5)
    parser.add_argument('--shots', type=int, nargs='+', default=[1, 5, 20])
    parser.add_argument('--queries', type=int, default=15)
    parser.add_argument('--episodes', type=int, default=600)
    args = parse(parser, arguments)
    if min(args.ways, args.episodes) < 2 or min(*args.shots, args.queries) < 1:
        parser.error('--ways and --episodes are 2 or more, --shots and --queries 1 or more')
    own = of_model(args)
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
