"""Derive scan directions from a supernet's checkpoint, ours or the authors'.

    python tools/derive_directions.py work_dirs/localvim_search_8xb128-100e_in1k/epoch_100.pth
    python tools/derive_directions.py local_vim_tiny_search.ckpt --out searched -k 4

The script writes directions.json, alphas.csv and pictures into the checkpoint's folder or into --out. It refuses files
that execute code.
"""
import argparse
import os
import sys

import torch

from mmlocalmamba import __version__
from mmlocalmamba.directions import check_scan
from mmlocalmamba.files import load_checkpoint
from mmlocalmamba.search import CANDIDATES
from mmlocalmamba.search.results import STATE, find_alphas, write_search
from mmlocalmamba.weights import backbone_state_dict


def read(path, candidates=None):
    """Return (candidates, names of the blocks, [(step, logits (blocks, K))], information about the search)."""
    checkpoint = load_checkpoint(path)
    state = checkpoint.get(STATE)  # ScanSearchHook writes it; an EMA's logits are not used
    if state is not None:
        history = [(record['step'], record['alphas']) for record in state['history']]
        meta = checkpoint.get('meta', {})
        now = torch.stack([alpha.float() for alpha in state['alphas']])
        if not history or not torch.equal(history[-1][1], now):  # the checkpoint was saved between two reports
            history.append((meta.get('iter', 0), now))
        blocks = state['blocks']
        about = dict(seed=meta.get('seed'), epoch=meta.get('epoch'), iteration=meta.get('iter'), mode=state['mode'])
        candidates = candidates or state['candidates']
    else:
        found = find_alphas(backbone_state_dict(checkpoint))
        history, about = [(0, torch.stack(list(found.values())).float())], {}
        blocks = [name.removesuffix('.mixer') for name in found]
        candidates = candidates or CANDIDATES
    count = history[-1][1].shape[1]
    if len(candidates) != count:
        raise ValueError(f'{path} has {count} candidates a block; name them in their order with --candidates (the '
                         f'default has {len(candidates)}: {" ".join(candidates)})')
    return candidates, blocks, history, about


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint')
    parser.add_argument('-k', type=int, default=4, help='directions to choose for each block (default: 4)')
    parser.add_argument('--candidates', nargs='+', metavar='NAME',
                        help="scan names in the supernet's order (default: the checkpoint's, or the paper's 8)")
    parser.add_argument('--out', metavar='DIR', help="folder to write to (default: the checkpoint's)")
    args = parser.parse_args()
    out = args.out or os.path.dirname(os.path.abspath(args.checkpoint))
    try:
        for name in args.candidates or ():
            check_scan(name)
        candidates, blocks, history, about = read(args.checkpoint, args.candidates)
        result = write_search(
            out, candidates, blocks, args.k, history,
            dict(checkpoint=os.path.basename(args.checkpoint), **about, version=__version__))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f'{parser.prog}: {error}')
    for block, names in zip(blocks, result['directions']):
        print(f'{block}: {" ".join(names)}')
    print(f'written to {out}: directions.json, alphas.csv, directions.png, alphas.png')


if __name__ == '__main__':
    main()
