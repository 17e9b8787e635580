"""Measure peak memory and time of a supernet's training step, by sampling mode and number of directions.

    python research/search_cost.py                     # 20 blocks x 8, 32, 128 directions, in every mode
    python research/search_cost.py --device cuda --batch 8

Each measurement runs in its own process. The time is the shortest of --steps. The memory is the difference between the
peak and the value after the model was built: of the resident size on a CPU, of the allocated memory on a GPU. Windows
are not padded (window_pad='none'), because w<K> with K larger than the grid serves to have 128 different names.
"""
import argparse
import itertools
import resource
import subprocess
import sys
import time

import torch

from mmlocalmamba.backbones import LocalVim

MODES = {
    'full': dict(sampling='full'),
    'single_path, 1 direction': dict(sampling='single_path', samples=1),
    'single_path, 4 directions': dict(sampling='single_path', samples=4),
    'partial_channel, 1/4': dict(sampling='partial_channel', reduction=4),
}


def candidates(count):
    names = ['h', 'h_flip', 'v', 'v_flip']
    names += [f'w{K}{flip}' for K in range(2, count) for flip in ('', '_flip')]
    return names[:count]


def measure(mode, count, args):
    torch.manual_seed(0)
    cuda = args.device == 'cuda'
    model = LocalVim(dict(embed_dims=args.dim, num_layers=args.blocks), window_pad='none', drop_path_rate=0.,
                     directions=dict(candidates=candidates(count), **MODES[mode])).to(args.device)
    image = torch.randn(args.batch, 3, 224, 224, device=args.device)

    def now():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak():
        # The unit of ru_maxrss is a kilobyte.
        return torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before, times = torch.cuda.memory_allocated() if cuda else peak(), []
    for _ in range(args.steps):
        start = now()
        model(image)[0].square().sum().backward()
        times.append(now() - start)
        model.zero_grad()
    print(f'{(peak() - before) / 2 ** 30:.2f} {min(times):.2f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--directions', type=int, nargs='+', default=[8, 32, 128])
    parser.add_argument('--blocks', type=int, default=20)
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one[0], int(args.one[1]), args)
        return
    print('| directions | sampling | peak memory, GiB | step, s |\n|---|---|---|---|')
    for count, mode in itertools.product(args.directions, MODES):
        result = subprocess.run([sys.executable, *sys.argv, '--one', mode, str(count)], capture_output=True, text=True)
        if result.returncode:
            print(f'| {count} | {mode} | failed | {result.stderr.strip().splitlines()[-1][:80]} |', flush=True)
        else:
            memory, seconds = result.stdout.split()[-2:]
            print(f'| {count} | {mode} | {memory} | {seconds} |', flush=True)


if __name__ == '__main__':
    main()
