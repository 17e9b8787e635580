"""Time, memory and error of the selective scan, side by side with other ways to compute it, in one run.

    python tools/benchmark_scan.py [--device cpu] [--quick] [--json FILE]

The shapes are those of LocalVMamba-T's four stages and of LocalVim-T at 224x224 pixels. Compared are all backends of
mmlocalmamba.ops that run on the device; mambapy's parallel scan (pip install --no-deps mambapy); torch's associative
scan. Peers work on sequences, so they get theirs gathered by the table and their outputs put back, as a model needs
them. Needs torch alone.
"""
import argparse
import ctypes
import gc
import json
import os
import statistics
import time
from functools import partial

import torch

DIRECTIONS = ('h', 'v_flip', 'w2', 'w7_flip')
# Name: (height and width of the tokens, class token in the middle, channels).
SHAPES = {
    'LocalVMamba-T stage 1': (56, False, 192),
    'LocalVMamba-T stage 2': (28, False, 384),
    'LocalVMamba-T stage 3': (14, False, 768),
    'LocalVMamba-T stage 4': (7, False, 1536),
    'LocalVim-T': (14, True, 384),
}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(function, device):
    """MB that a call takes at its peak, beyond what was there before. None if the system cannot tell."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # forget the peak
    except (OSError, AttributeError):
        return None

    def status(key):
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    before = status('VmRSS')
    function()
    return status('VmHWM') - before


def measure(cases, device, rounds, seconds):
    """Median milliseconds of each case {name: function}, or the reason why it cannot run.

    Cases take turns, so that a disturbance of the machine meets all of them. In each round a case runs at least once
    and for about ``seconds``.
    """
    times, failed = {name: [] for name in cases}, {}
    for index in range(rounds + 1):
        for name, function in cases.items():
            if name in failed:
                continue
            end = time.perf_counter() + seconds
            while True:
                synchronize(device)
                start = time.perf_counter()
                try:
                    function()
                except Exception as error:  # a peer may lack anything
                    failed[name] = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
                    break
                synchronize(device)
                now = time.perf_counter()
                if index:  # the first round warms up
                    times[name].append(1e3 * (now - start))
                if now >= end or not index:
                    break
    return {name: failed.get(name) or statistics.median(times[name]) for name in cases}


def with_threads(threads, function):
    """The function, run with so many threads."""

    def run():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return run


def number(x, digits=3):
    if x is None:
        return '-'
    return x if isinstance(x, str) else f'{x:.{digits}g}' if x < 1000 else f'{x:.0f}'


def print_table(header, rows):
    print('| ' + ' | '.join(header) + ' |')
    print('|' + '---|' * len(header))
    for row in rows:
        print('| ' + ' | '.join(number(x) for x in row) + ' |', flush=True)
    print()


def describe_machine(device):
    if device == 'cuda':
        name = torch.cuda.get_device_name()
    else:
        name = 'CPU'
        if os.path.exists('/proc/cpuinfo'):
            with open('/proc/cpuinfo') as file:
                name = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), name)
        name += f', {os.cpu_count()} cores, {torch.get_num_threads()} threads'
    load = f', load {os.getloadavg()[0]:.1f} at the start' if hasattr(os, 'getloadavg') else ''
    return f'torch {torch.__version__}, {name}{load}'


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def inputs(side, middle_token, width, N, batch, device):
    from mmlocalmamba.scans import scan_tables
    tables = scan_tables(DIRECTIONS, side, side, middle_token=middle_token, device=device)
    K, L = tables.inv.shape
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    # Step sizes and decay rates as Mamba initialises them.
    tensors = dict(
        u=randn(batch, L, width),
        delta=randn(batch, K, L, width) / 2,
        A=-torch.arange(1., N + 1).repeat(K, width, 1),
        B=randn(batch, K, L, N),
        C=randn(batch, K, L, N),
        D=torch.ones(K, width),
        delta_bias=torch.log(torch.expm1(torch.exp(torch.rand(K, width, generator=generator) * 4.6 - 6.9))))
    return {name: x.to(device) for name, x in tensors.items()}, tables


def unfused(linear_scan, u, delta, A, B, C, D, delta_bias, tables):
    """The scan with the recurrence h[t] = a[t] h[t - 1] + x[t] done by ``linear_scan`` on (B * K, T, D, N)."""
    from mmlocalmamba.ops.common import from_scan_order, step_size, to_scan_order
    u, delta, B, C = (to_scan_order(x, *tables) for x in (u, delta, B, C))
    dt = step_size(delta, delta_bias, True)
    a = torch.exp(dt[..., None] * A[:, None])
    x = (dt * u)[..., None] * B[..., None, :]
    h = linear_scan(a.flatten(0, 1), x.flatten(0, 1)).view(a.shape)
    y = (h @ C[..., None]).squeeze(-1) + D[:, None] * u
    return from_scan_order(y, *tables)


def mambapy_scan(a, x):
    from mambapy.pscan import pscan
    return pscan(a, x)


def associative_scan(a, x):
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return scan(combine, (a, x), dim=1, combine_mode='generic')[1]


def methods(device, tables):
    """{name: (function of the tensors, threads)}, our fastest first."""
    from mmlocalmamba import ops
    from mmlocalmamba.ops import directional_scan
    usable = [name for name, reason in ops.available_backends(torch.empty(0, device=device)).items() if reason is None]
    threads = torch.get_num_threads()
    found = {}
    for backend in usable:
        function = partial(directional_scan, tables=tables, delta_softplus=True, backend=backend)
        label = 'PyTorch loop (reference)' if backend == 'reference' else f'ours: {backend}'
        if backend == 'cpu':
            for n in sorted({threads, 1}, reverse=True):
                found[f'{label}, {n} thread{"s" * (n > 1)}'] = (function, n)
        else:
            found[label] = (function, threads)
    found['mambapy pscan'] = (partial(unfused, mambapy_scan, tables=tables), threads)
    found['torch associative_scan'] = (partial(unfused, associative_scan, tables=tables), threads)
    return found


def forward(function, tensors):
    with torch.no_grad():
        return function(**tensors)


def forward_backward(function, tensors, dy):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


def relative_error(ours, exact):
    return max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(ours, exact, strict=True))


def compare(name, N, args):
    from mmlocalmamba.ops import directional_scan
    tensors, tables = inputs(*SHAPES[name], N, args.batch, args.device)
    found = methods(args.device, tables)
    dy = torch.randn(args.batch, *tables.inv.shape, tensors['u'].shape[-1], device=args.device)
    exact = forward_backward(partial(directional_scan, tables=tables, delta_softplus=True, backend='chunked'),
                             {key: x.double() for key, x in tensors.items()}, dy.double())
    calls = {
        'forward': {key: with_threads(n, partial(forward, function, tensors)) for key, (function, n) in found.items()},
        'forward + backward': {key: with_threads(n, partial(forward_backward, function, tensors, dy))
                               for key, (function, n) in found.items()},
    }
    rows = [dict(shape=name, N=N, tokens=tables.inv.shape[1], channels=SHAPES[name][2], method=key) for key in found]
    for which, cases in calls.items():
        times = measure(cases, args.device, args.rounds, args.seconds)
        first = next(iter(times.values()))
        for row, (key, call) in zip(rows, cases.items(), strict=True):
            ms = times[key]
            row[f'{which}, ms'] = ms
            if isinstance(ms, str):
                continue
            row[f'{which}, times ours'] = ms / first
            row[f'{which}, peak MB'] = peak_memory(call, args.device)
            result = call()
            if which == 'forward':
                row['error of y'] = relative_error([result], exact[:1])
            else:
                row['error of gradients'] = relative_error(result[1:], exact[1:])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=3, help='how often the methods take turns')
    parser.add_argument('--seconds', type=float, default=0.3, help='for each method in each round')
    parser.add_argument('--quick', action='store_true', help='two small shapes, one round')
    parser.add_argument('--json', help='write the figures here, too')
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 0.05

    machine = describe_machine(args.device)
    print(f'{machine}\nbatch {args.batch}, {len(DIRECTIONS)} directions, float32; relative errors, against float64\n')
    results = []
    for name in list(SHAPES)[3:] if args.quick else SHAPES:
        for N in (16, ) if args.quick else (16, 1):
            rows = compare(name, N, args)
            results += rows
            side, _, width = SHAPES[name]
            print(f'### {name}: L = {rows[0]["tokens"]}, D = {width}, N = {N}\n')
            columns = ['method', *(key for key in rows[0] if key.startswith(('forward', 'error')))]
            print_table(columns, [[row.get(column) for column in columns] for row in rows])
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(dict(machine=machine, batch=args.batch, results=results), file, indent=1)


if __name__ == '__main__':
    main()
