"""Compare time, memory and error of the selective scan with other implementations, in one run.

    python tools/benchmark_scan.py [--device cpu] [--quick] [--json FILE]
    python tools/benchmark_scan.py --device cuda --dtype bfloat16 --batch 64 --csv scans.csv
    python tools/benchmark_scan.py --compile sm_90 --dtype bfloat16 --batch 64

The shapes are those of LocalVMamba-T's four stages and of LocalVim-T at 224x224 pixels. On a GPU, stage 1 at 512x512
and 800x1333 pixels is added. The script compares all backends of mmlocalmamba.ops that run on the device, mambapy's
parallel scan (pip install --no-deps mambapy), and torch's associative scan (on a GPU also compiled). The latter two
work on sequences, so their inputs are gathered by the table and their outputs are scattered back, as a model needs
them. On a GPU with mamba_ssm, the script adds the authors' pipeline (sequences in float32 by permuting, padding and
stacking, mamba_ssm's operator, and back) and that operator alone on prepared sequences. Both get step sizes, B and C in
scan order, as the authors' projections produce them.

On a GPU, CUDA events measure the time, and the L2 cache is overwritten before each call. The last columns compare it
with a lower bound: the larger of the time for the exponentials and the time to read each input and write each output
once, at rates measured in the same run.

On a CPU, the lower bound of the native kernel's forward pass is the time of its eight multiplications per state, which
are the operations with the lowest throughput, at the rate of oneDNN's matrix product in the same run. The script needs
only torch.

--compile needs no GPU and measures nothing. It compiles the Triton kernels for a compute capability and prints the
registers and spilled bytes of a thread, the programs that a multiprocessor runs at once, and the instructions for an
element (one state of one channel at one step). From these it predicts the least time on an H200.
"""
import argparse
import ctypes
import gc
import json
import os
import statistics
import time
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from records import processor, write_rows

DIRECTIONS = ('h', 'v_flip', 'w2', 'w7_flip')
# {name: (height and width of the token grid, class token in the middle, channels, rank of the step sizes)}
SHAPES = {
    'LocalVMamba-T stage 1': ((56, 56), False, 192, 6),
    'LocalVMamba-T stage 2': ((28, 28), False, 384, 12),
    'LocalVMamba-T stage 3': ((14, 14), False, 768, 24),
    'LocalVMamba-T stage 4': ((7, 7), False, 1536, 48),
    'LocalVim-T': ((14, 14), True, 384, 12),
}
LARGE_SHAPES = {
    'LocalVMamba-T stage 1, 512x512': ((128, 128), False, 192, 6),
    'LocalVMamba-T stage 1, 800x1333': ((200, 333), False, 192, 6),
}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def peak_memory(function, device):
    """Return the peak memory of a call in MB, beyond the memory before it. None if the system does not report it."""
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


def cuda_timer(flush=1 << 28):
    """Return a function that measures the milliseconds of a call on the GPU with a cold cache."""
    cache = torch.empty(flush, dtype=torch.int8, device='cuda')

    def time_once(function):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return time_once


def wall_timer(function):
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def cpu_timer(function):
    start = time.thread_time()
    function()
    return 1e3 * (time.thread_time() - start)


def measure(cases, device, rounds, seconds, cpu_time=False):
    """Return median milliseconds and spread of cases {name: function}.

    A case that cannot run has the reason instead of a time, and no spread. The spread is half the range between the
    quartiles, in percent of the median. Cases take turns, so that a disturbance of the machine affects all of them. In
    each round a case runs at least once and for about ``seconds``. With ``cpu_time``, the result is the minimum
    processor time of this thread.
    """
    timer = cuda_timer() if device == 'cuda' else cpu_timer if cpu_time else wall_timer
    times, failed = {name: [] for name in cases}, {}
    for index in range(rounds + 1):
        for name, function in cases.items():
            if name in failed:
                continue
            end = time.perf_counter() + seconds
            while True:
                try:
                    ms = timer(function)
                except Exception as error:  # another implementation may fail in any way
                    failed[name] = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
                    break
                if index:  # the first round warms up
                    times[name].append(ms)
                if time.perf_counter() >= end or not index:
                    break
    middle = min if cpu_time else statistics.median
    medians = {name: failed.get(name) or middle(times[name]) for name in cases}
    spreads = {}
    for name, values in times.items():
        if name not in failed and len(values) > 1:
            low, _, high = statistics.quantiles(values, n=4, method='inclusive')
            spreads[name] = 50 * (high - low) / medians[name]
    return medians, spreads


def with_threads(threads, function):
    """Return a function that runs another with a number of threads."""

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
    from mmlocalmamba.ops.backends.triton import tuning
    if device == 'cuda':
        name = '; '.join([torch.cuda.get_device_name(), *tuning.in_force(torch.device('cuda'))])
    else:
        name = f'{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads'
    load = f', load {os.getloadavg()[0]:.1f} at the start' if hasattr(os, 'getloadavg') else ''
    return f'torch {torch.__version__}, {name}{load}'


# ----------------------------------------------------------------------------------------------------------------------
# Cases


def inputs(size, middle_token, width, rank, N, batch, device, dtype):
    from mmlocalmamba.directions import scan_tables
    tables = scan_tables(DIRECTIONS, *size, middle_token=middle_token, device=device)
    K, L = tables.inv.shape
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    # Mamba initialises step sizes and decay rates like this.
    factor, weight = randn(batch, K, L, rank), randn(K, width, rank) / (2 * rank ** 0.5)
    tensors = dict(
        u=randn(batch, L, width),
        A=-torch.arange(1., N + 1).repeat(K, width, 1),
        B=randn(batch, K, L, N),
        C=randn(batch, K, L, N),
        D=torch.ones(K, width),
        delta_bias=torch.log(torch.expm1(torch.exp(torch.rand(K, width, generator=generator) * 4.6 - 6.9))))
    tensors = {name: x.to(device) for name, x in tensors.items()}
    factor, weight = factor.to(device, dtype), weight.to(device)
    for name in ('u', 'B', 'C'):  # activations; parameters stay float32
        tensors[name] = tensors[name].to(dtype)
    tensors['delta'] = torch.einsum('bklr,kdr->bkld', factor, weight.to(dtype))
    return tensors, dict(delta=factor, dt_weight=weight), tables


def unfused(linear_scan, u, delta, A, B, C, D, delta_bias, tables):
    """The scan with the recurrence h[t] = a[t] h[t - 1] + x[t] done by ``linear_scan`` on (B * K, T, D, N)."""
    from mmlocalmamba.ops.scan_order import from_scan_order, step_size, to_scan_order
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


def associative_scan(a, x, mode='generic'):
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return scan(combine, (a, x), dim=1, combine_mode=mode)[1]


def to_sequence(x, name):
    """Arrange a feature map (B, D, H, W) along a direction, (B, D, T), by permuting and padding as the authors do."""
    base = name.removesuffix('_flip')
    if base == 'v':
        x = x.transpose(2, 3)
    elif base != 'h':
        K = int(base[1:])
        x = F.pad(x, (0, -x.shape[3] % K, 0, -x.shape[2] % K))
        x = x.unflatten(3, (-1, K)).unflatten(2, (-1, K)).transpose(3, 4)
    x = x.flatten(2)
    return x.flip(-1) if name != base else x


def from_sequence(x, name, H, W):
    """Invert :func:`to_sequence`: (B, D, T) -> (B, D, H, W)."""
    base = name.removesuffix('_flip')
    x = x.flip(-1) if name != base else x
    if base == 'h':
        return x[..., :H * W].unflatten(2, (H, W))
    if base == 'v':
        return x[..., :H * W].unflatten(2, (W, H)).transpose(2, 3)
    K = int(base[1:])
    rows, cols = -(-H // K), -(-W // K)
    return x[..., :rows * cols * K * K].unflatten(2, (rows, cols, K, K)).transpose(3, 4).flatten(4).flatten(
        2, 3)[:, :, :H, :W]


def authors_pipeline(selective_scan_fn, size, u, delta, A, B, C, D, delta_bias):
    """Run the authors' pipeline.

    u (B, L, D) is at original positions. delta (B, K * D, T), B and C (B, K, N, T) are sequences.
    """
    batch, _, width = u.shape
    image = u.transpose(1, 2).unflatten(2, size).float()
    sequences = [to_sequence(image, name) for name in DIRECTIONS]
    lengths = [x.shape[-1] for x in sequences]
    xs = torch.stack([F.pad(x, (0, max(lengths) - x.shape[-1])) for x in sequences], 1).flatten(1, 2)
    y = selective_scan_fn(xs, delta.float(), A.flatten(0, 1), B.float(), C.float(), D.flatten(), None,
                          delta_bias.flatten(), True)
    y = y.view(batch, len(DIRECTIONS), width, -1)
    # Shorter sequences are padded at their ends.
    return torch.stack([from_sequence(y[:, k, :, :lengths[k]], name, *size)
                        for k, name in enumerate(DIRECTIONS)], 1).flatten(3).transpose(2, 3).to(u.dtype)


def op_alone(selective_scan_fn, u, delta, A, B, C, D, delta_bias):
    return selective_scan_fn(u, delta, A.flatten(0, 1), B, C, D.flatten(), None, delta_bias.flatten(), True)


def ready_made(tensors, tables, u_as_well):
    """Return the tensors as sequences for mamba_ssm."""
    from mmlocalmamba.ops.scan_order import to_scan_order
    made = dict(tensors)
    for name in ('delta', 'B', 'C', 'u') if u_as_well else ('delta', 'B', 'C'):
        x = to_scan_order(tensors[name], *tables).transpose(2, 3).contiguous()
        made[name] = x if name in 'BC' else x.flatten(1, 2)
    return made


def methods(device, tensors, low_rank, tables, size, middle_token, wanted=None):
    """Return {name: (function, its tensors, threads)}, our fastest first. ``wanted``: parts of names, None: all."""
    from mmlocalmamba import ops
    from mmlocalmamba.ops import directional_scan
    usable = [name for name, reason in ops.available_backends(tensors['u'][:0]).items() if reason is None]
    threads = torch.get_num_threads()
    found = {}
    for backend in usable:
        function = partial(directional_scan, tables=tables, delta_softplus=True, backend=backend)
        label = 'PyTorch loop (reference)' if backend == 'reference' else f'ours: {backend}'
        if backend == 'cpu':
            for n in sorted({threads, 1}, reverse=True):
                found[f'{label}, {n} thread{"s" * (n > 1)}'] = (function, tensors, n)
        elif backend == 'cuda':
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
            found['gathers by the table, mamba_ssm'] = (function, tensors, threads)
            if not middle_token:
                found["the authors' pipeline"] = (partial(authors_pipeline, selective_scan_fn, size),
                                                  ready_made(tensors, tables, False), threads)
            found['mamba_ssm alone, ready-made sequences'] = (partial(op_alone, selective_scan_fn),
                                                              ready_made(tensors, tables, True), threads)
        else:
            found[label] = (function, tensors, threads)
            if backend == 'triton':
                found[f'{label}, step sizes from rank {low_rank["delta"].shape[-1]}'] = (
                    function, {**tensors, **low_rank}, threads)
    found['mambapy pscan'] = (partial(unfused, mambapy_scan, tables=tables), tensors, threads)
    found['torch associative_scan'] = (partial(unfused, associative_scan, tables=tables), tensors, threads)
    if device == 'cuda':
        found['torch associative_scan, compiled'] = (
            torch.compile(partial(unfused, partial(associative_scan, mode='pointwise'), tables=tables)), tensors,
            threads)
    chosen = {name: case for name, case in found.items() if wanted is None or any(part in name for part in wanted)}
    if not chosen:
        raise SystemExit(f'no method has one of {", ".join(wanted)} in its name: there are {"; ".join(found)}')
    return chosen


def forward(function, tensors):
    with torch.no_grad():
        return function(**tensors)


def forward_backward(function, tensors, dy):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return dict(y=y.detach(), **dict(zip(leaves, grads, strict=True)))


def relative_error(ours, exact, names):
    """Return the largest error among tensors of the same name and shape. Tensors in scan order have other shapes."""
    names = [name for name in names if name in ours and ours[name].shape == exact[name].shape]
    return max((((ours[name].double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-30)).item()
                for name in names), default=None)


def gpu_rates():
    """Measure exponentials and bytes of memory traffic per millisecond."""
    import triton
    import triton.language as tl

    @triton.jit
    def exponentials(to, count, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = at.to(tl.float32) * 1e-6
        for _ in range(count):
            x = tl.exp2(-x)
        tl.store(to + at, x)

    def best(function, repeat=20):
        timer = cuda_timer()
        return min(timer(function) for _ in range(repeat))

    programs, count, block = 132 * 64, 2000, 1024
    to = torch.empty(programs * block, device='cuda')
    rate = programs * block * count / best(lambda: exponentials[(programs, )](to, count, BLOCK=block))
    source = torch.randn(1 << 28, device='cuda')
    target = torch.empty_like(source)
    return rate, 2 * source.nbytes / best(lambda: target.copy_(source))


def cpu_rate(threads, size=1024, repeat=20):
    """Measure float32 multiplications per millisecond in oneDNN's matrix product."""
    from mmlocalmamba.ops import linear
    x, weight = torch.randn(2, size, size)
    run = with_threads(threads, partial(linear, x, weight, backend='cpu'))
    return size ** 3 / min(wall_timer(run) for _ in range(repeat))


# Per state in csrc/scan_kernel.h: four in the exponential, one before it, three in the recurrence.
MULTIPLICATIONS = 8


def floors(tensors, y_bytes, tables, N, rates):
    """Return lower bounds in milliseconds of the forward pass and of both passes: (exponentials, memory) each.

    The backward pass computes each exponential again, reads the inputs and the output's gradient, and writes the
    gradients.
    """
    steps, (batch, _, width) = tables.src.numel(), tensors['u'].shape
    exponentials = batch * steps * width * N / rates[0]
    read = sum(tensors[name].nbytes for name in ('u', 'delta', 'B', 'C'))
    return dict(zip(('forward', 'forward + backward'), (
        (exponentials, (read + y_bytes) / rates[1]),
        (2 * exponentials, (3 * read + 2 * y_bytes) / rates[1])), strict=True))


def compiled(args):
    """Compile the kernels of each shape, print what they need, and return the rows of the table."""
    import gpu_code
    rows, bytes_moved = [], []
    for name, N in product(args.shapes, args.states):
        size, middle_token, width, rank = args.shapes[name]
        in_scan_order = middle_token  # LocalVim convolves along the scan
        passes, elements = gpu_code.launches(size, middle_token, width, rank, N, args.batch, DTYPES[args.dtype],
                                             in_scan_order, DIRECTIONS)
        for which, launches in passes.items():
            moved = gpu_code.traffic(launches)
            least = sum(gpu_code.least_traffic(passes['forward'], which).values())
            bytes_moved.append([name, N, which, sum(moved.values()) / 1e6, least / 1e6, ', '.join(
                f'{tensor} {size / 1e6:.0f}' for tensor, size in moved.items() if size > 0.01 * least)])
            for launch in launches:
                row = {'shape': name, 'N': N, 'pass': which, **gpu_code.count(args.compile, launch)}
                if 'instructions' in row:
                    row['H200, ms at least'] = gpu_code.least_ms(row['instructions'], elements)
                rows.append(row)
    print(f'{args.compile}, {gpu_code.toolchain()}, batch {args.batch}, {args.dtype}. Instructions for an element, by '
          'kind. The last column is a prediction: the time if every scheduler issued an instruction at every clock of '
          f'{gpu_code.CLOCK} GHz.\n')
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(columns, [[row.get(column) for column in columns] for row in rows])
    print('MB that kernels read and write, each tensor once a kernel, beside what any kernel has to: u, the factor of '
          'the step sizes, B, C and y, and in the backward pass their gradients.\n')
    print_table(['shape', 'N', 'pass', 'MB', 'least', 'of which'], bytes_moved)
    return rows


def run_once(args):
    """Run each method once, forward and backward, for a profiler."""
    for name, N in product(args.shapes, args.states):
        size, middle_token, width, rank = args.shapes[name]
        tensors, low_rank, tables = inputs(size, middle_token, width, rank, N, args.batch, args.device,
                                           DTYPES[args.dtype])
        found = methods(args.device, tensors, low_rank, tables, size, middle_token, args.methods)
        for method, (function, own, _) in found.items():
            y = forward(function, own)
            forward_backward(function, own, torch.ones_like(y))
            print(f'{name}, N = {N}: {method}', flush=True)


def compare(name, N, args, rates):
    from mmlocalmamba.ops import directional_scan
    size, middle_token, width, rank = {**SHAPES, **LARGE_SHAPES}[name]
    tensors, low_rank, tables = inputs(size, middle_token, width, rank, N, args.batch, args.device, DTYPES[args.dtype])
    found = methods(args.device, tensors, low_rank, tables, size, middle_token, args.methods)
    dy = torch.randn(args.batch, *tables.inv.shape, width, device=args.device).to(DTYPES[args.dtype])
    exact = None
    if tables.inv.numel() * width * args.batch < args.check:  # float64 needs much time and memory
        exact = forward_backward(partial(directional_scan, tables=tables, delta_softplus=True, backend='chunked'),
                                 {key: x.double() for key, x in tensors.items()}, dy.double())
    # Outputs in scan order get gradients of their own shape. Only time and memory of these methods are compared.
    sequence_dy = torch.randn(args.batch, len(DIRECTIONS) * width, tables.src.shape[1], device=args.device).to(dy)
    calls = {'forward': {}, 'forward + backward': {}}
    for key, (function, own, n) in found.items():
        cotangent = sequence_dy if own['u'].dim() == 3 and own['u'].shape[1] == len(DIRECTIONS) * width else dy
        calls['forward'][key] = with_threads(n, partial(forward, function, own))
        calls['forward + backward'][key] = with_threads(n, partial(forward_backward, function, own, cotangent))
    rows = [dict(shape=name, N=N, batch=args.batch, dtype=args.dtype, tokens=tables.inv.shape[1], channels=width,
                 method=key) for key in found]
    if args.device == 'cuda':
        least = floors(tensors, dy.nbytes, tables, N, rates)
    states = args.batch * tables.src.numel() * width * N
    for which, cases in calls.items():
        times, spreads = measure(cases, args.device, args.rounds, args.seconds)
        first = next(iter(times.values()))
        for row, (key, call) in zip(rows, cases.items(), strict=True):
            ms = times[key]
            row[f'{which}, ms'] = ms
            if isinstance(ms, str):
                continue
            row[f'{which}, +- %'] = spreads.get(key)
            row[f'{which}, times ours'] = ms / first
            row[f'{which}, peak MB'] = peak_memory(call, args.device)
            if args.device == 'cuda':
                row[f'{which}, % of the floor'] = 100 * max(least[which]) / ms
            elif which == 'forward' and key.startswith('ours: cpu') and rates:
                row['forward, % of the floor'] = 100 * MULTIPLICATIONS * states / rates[found[key][2]] / ms
            if exact is not None:
                result = call()
                if which == 'forward':
                    row['error of y'] = relative_error(dict(y=result), exact, ['y'])
                else:
                    row['error of gradients'] = relative_error(result, exact, list(tensors))
    return rows


def save(args, rows, **about):
    """Write the files that are asked for."""
    from mmlocalmamba.files import write_whole
    if args.json:
        about = dict(**about, batch=args.batch, dtype=args.dtype, results=rows)
        write_whole(args.json, json.dumps(about, indent=1) + '\n')
    if args.csv:
        write_rows(args.csv, list(dict.fromkeys(key for row in rows for key in row)), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--batch', type=int, default=1, help='batch size (default: 1)')
    parser.add_argument('--dtype', choices=DTYPES, default='float32',
                        help='dtype of activations; parameters are float32')
    parser.add_argument('--shapes', nargs='+', help='only shapes whose names end in one of these')
    parser.add_argument('--states', type=int, nargs='+', default=[16, 1], help='d_state (default: 16 1)')
    parser.add_argument('--check', type=float, default=3e8,
                        help='compute errors if y has fewer elements (default: 3e8)')
    parser.add_argument('--rounds', type=int, default=3, help='number of rounds; methods take turns (default: 3)')
    parser.add_argument('--seconds', type=float, default=0.3,
                        help='seconds for each method in each round (default: 0.3)')
    parser.add_argument('--quick', action='store_true', help='only two small shapes, in one round')
    parser.add_argument('--methods', nargs='+', metavar='PART',
                        help='only methods that have one of these in their names, such as triton or mamba_ssm')
    parser.add_argument('--once', action='store_true', help='run each method once and measure nothing, for a profiler')
    parser.add_argument('--compile', metavar='TARGET', choices=['sm_80', 'sm_86', 'sm_89', 'sm_90', 'sm_100', 'sm_120'],
                        help='compile the Triton kernels for a GPU that need not be here, such as sm_90, and count')
    parser.add_argument('--json', help='file for the measurements; it is written anew after each shape')
    parser.add_argument('--csv', help='the same as a table')
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 0.05
    shapes = {**SHAPES, **LARGE_SHAPES} if args.device == 'cuda' or args.compile else SHAPES
    if args.quick:
        shapes, args.states = dict(list(SHAPES.items())[3:]), args.states[:1]
    if args.shapes:
        ends = tuple(args.shapes)
        if not any(name.endswith(ends) for name in shapes):
            parser.error(f'no shape ends in {" or ".join(ends)}: there are {"; ".join(shapes)}')
        shapes = {name: shape for name, shape in shapes.items() if name.endswith(ends)}
    args.shapes = shapes
    if args.compile:
        return save(args, compiled(args), target=args.compile)
    if args.once:
        return run_once(args)

    from mmlocalmamba import ops
    machine = describe_machine(args.device)
    print(f'{machine}\nbatch {args.batch}, {len(DIRECTIONS)} directions, {args.dtype}; '
          'relative errors, against float64\n')
    if args.device == 'cuda':
        rates = gpu_rates()
        print(f'measured: {rates[0] / 1e9:.2f} T exponentials / s, {rates[1] / 1e9:.2f} TB / s\n')
    elif args.dtype == 'float32' and ops.available_backends(torch.zeros(0))['cpu'] is None:
        rates = {threads: cpu_rate(threads) for threads in sorted({1, torch.get_num_threads()})}
        print('measured, G multiplications / s: ' + ', '.join(
            f'{rate / 1e6:.0f} with {threads} thread{"s" * (threads > 1)}' for threads, rate in rates.items()) + '\n')
    else:
        rates = None
    results = []
    for name, N in product(args.shapes, args.states):
        rows = compare(name, N, args, rates)
        results += rows
        print(f'### {name}: L = {rows[0]["tokens"]}, D = {rows[0]["channels"]}, N = {N}\n')
        columns = ['method', *(key for key in rows[0] if key.startswith(('forward', 'error')))]
        print_table(columns, [[row.get(column) for column in columns] for row in rows])
        save(args, results, machine=machine, rates=rates)


if __name__ == '__main__':
    main()
