"""Test whether the direction search finds a planted direction: in these images, one scan direction shows the class.

    python research/planted.py --out work_dirs/planted

An image has 14x14 tokens. Each token has one of three colours, plus noise. Along the planted direction, the colour of
step t + 3 follows from that of step t: it is the next colour of the circle of three in class 0, the previous one in
class 1, and any of the three with probability --noise. Single tokens contain no information about the class, nor do
pairs of tokens whose distance along the direction is not a multiple of 3.

This plants a direction because blocks of LocalVim mix tokens only along their scans. The first mixing is a causal
convolution over 4 steps, which spans exactly one such pair. Along the planted direction and its flip, every pair has
the distance 3. Between h and w7, 4 of 7 pairs have it, because both have runs of 7 tokens in common; between all other
directions, none or almost none have it (--overlap prints the numbers). The three interleaved chains forget quickly with
noise, so longer distances help little.

The script runs a search for each task and seed. The result is the rank of the planted direction or its flip by the mean
probability over the blocks.
"""
import argparse
import itertools
import json
import os

import numpy as np
import torch
from mmengine.config import DictAction
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmlocalmamba.backbones import LocalVim
from mmlocalmamba.directions import scan_index
from mmlocalmamba.search import CANDIDATES

SIDE, COLOURS, DISTANCE = 14, 3, 3


class Planted(torch.utils.data.Dataset):
    """Images that are drawn anew: a training sees no index twice."""

    def __init__(self, direction, images, noise, seed):
        self.order = scan_index(direction, SIDE, SIDE, pad=False).numpy()
        self.images, self.noise, self.seed = images, noise, seed

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        label = int(rng.integers(2))
        steps = SIDE * SIDE
        moves = np.where(rng.random(steps) < self.noise, rng.integers(0, COLOURS, steps), 1 if label == 0 else -1)
        moves[:DISTANCE] = rng.integers(0, COLOURS, DISTANCE)
        colours = np.empty(steps, int)
        for chain in range(DISTANCE):
            colours[self.order[chain::DISTANCE]] = moves[chain::DISTANCE].cumsum() % COLOURS
        image = np.eye(COLOURS)[colours].T.reshape(COLOURS, SIDE, SIDE) * 2 - 2 / COLOURS
        image += 0.2 * rng.standard_normal(image.shape)
        return dict(inputs=torch.from_numpy(image).float(), labels=label)


class Classifier(BaseModel):

    def __init__(self, dim, depth, sampling):
        super().__init__()
        self.backbone = LocalVim(dict(embed_dims=dim, num_layers=depth, d_state=4), img_size=SIDE, patch_size=1,
                                 directions=dict(candidates=CANDIDATES, **sampling), drop_path_rate=0.)
        self.head = nn.Linear(dim, 2)

    def forward(self, inputs, labels, mode='loss'):
        logits = self.head(self.backbone(inputs)[0])
        return dict(loss=nn.functional.cross_entropy(logits, labels),
                    accuracy=(logits.detach().argmax(1) == labels).float().mean())


def search(direction, seed, args):
    torch.manual_seed(seed)
    work_dir = os.path.join(args.out, f'{direction}-{seed}')

    def loader(stream):
        return dict(batch_size=args.batch, num_workers=0, collate_fn=dict(type='default_collate'),
                    sampler=dict(type='DefaultSampler', shuffle=False),
                    dataset=Planted(direction, args.batch * args.iterations, args.noise, 2 * seed + stream))

    hook = dict(type='mmlocalmamba.ScanSearchHook', mode=args.mode, k=2, interval=args.iterations // 5)
    if args.mode == 'bilevel':
        hook.update(held_out=loader(1), optimizer=dict(type='Adam', lr=10 * args.lr, betas=(0.5, 0.999)))
    runner = Runner(
        model=Classifier(args.dim, args.depth, args.sampling), work_dir=work_dir, experiment_name=f'{direction}-{seed}',
        default_scope='mmengine', train_dataloader=loader(0),
        train_cfg=dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=args.iterations),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=args.lr, weight_decay=0.05), clip_grad=dict(max_norm=5.),
                           paramwise_cfg=dict(custom_keys=dict(alphas=dict(decay_mult=0., lr_mult=10.)))),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=20),
        default_hooks=dict(checkpoint=None, logger=dict(type='LoggerHook', interval=50)),
        custom_hooks=[hook], randomness=dict(seed=seed), log_level=args.log_level)
    runner.train()
    accuracy = runner.message_hub.get_scalar('train/accuracy').mean(50)
    with open(os.path.join(work_dir, 'directions.json')) as file:
        mean = json.load(file)['mean_probability']
    ranked = sorted(mean, key=mean.get, reverse=True)
    rank = 1 + min(ranked.index(direction), ranked.index(f'{direction}_flip'))
    return rank, ranked, mean, accuracy


def overlap(planted, other):
    """Return the share of the planted direction's pairs that have the same distance along another direction."""
    step = torch.empty(SIDE * SIDE, dtype=torch.long)
    step[scan_index(other, SIDE, SIDE, pad=False).long()] = torch.arange(SIDE * SIDE)
    along = step[scan_index(planted, SIDE, SIDE, pad=False).long()]
    return ((along[DISTANCE:] - along[:-DISTANCE]).abs() == DISTANCE).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='work_dirs/planted')
    parser.add_argument('--directions', nargs='+', default=['h', 'v', 'w2', 'w7'])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--mode', default='joint', choices=['joint', 'bilevel'])
    parser.add_argument('--sampling', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE',
                        help='options of the search, for example sampling=single_path samples=2')
    parser.add_argument('--iterations', type=int, default=100)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--lr', type=float, default=4e-3)
    parser.add_argument('--dim', type=int, default=32)
    parser.add_argument('--depth', type=int, default=2)
    parser.add_argument('--noise', type=float, default=0.5)
    parser.add_argument('--overlap', action='store_true',
                        help='print the share of pairs that other directions see, and exit')
    parser.add_argument('--log-level', default='WARNING')
    args = parser.parse_args()
    if args.overlap:
        for planted, other in itertools.product(args.directions, args.directions):
            print(f'{planted} seen along {other}: {overlap(planted, other):.3f}')
        return
    print('| planted | seed | rank of it or its flip | mean probabilities, best first | training accuracy |')
    print('|---|---|---|---|---|')
    for direction, seed in itertools.product(args.directions, args.seeds):
        rank, ranked, mean, accuracy = search(direction, seed, args)
        best = ', '.join(f'{name} {mean[name]:.3f}' for name in ranked[:len(CANDIDATES) // 2])
        print(f'| {direction} | {seed} | {rank} | {best} | {accuracy:.3f} |', flush=True)


if __name__ == '__main__':
    main()
