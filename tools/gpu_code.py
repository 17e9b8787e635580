"""Compile the Triton scan kernels for a GPU that need not be here, and count what the compiler made of them.

The kernels are compiled as the host launches them: it runs on tensors without memory, and its launches are recorded.
Triton brings ptxas and nvdisasm. Used by ``tools/benchmark_scan.py --compile``, in a process without TRITON_INTERPRET.
"""
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from unittest import mock

import torch

# Multiprocessors and GHz of an H200, for the switch to segments and the predictions.
MULTIPROCESSORS, CLOCK = 132, 1.755
# Kernels that have a loop over steps.
SCANS = ('scan_forward', 'scan_local', 'scan_backward')
# Compute capability: warps, programs and KiB of shared memory of a multiprocessor.
LIMITS = {'sm_80': (64, 32, 164), 'sm_86': (48, 16, 100), 'sm_89': (48, 24, 100), 'sm_90': (64, 32, 228),
          'sm_100': (64, 32, 228), 'sm_120': (48, 24, 100)}
_KINDS = {
    'float': ('FADD', 'FMUL', 'FFMA', 'FADD2', 'FMUL2', 'FFMA2', 'FMNMX', 'FSEL', 'FSETP'),
    'exp2': ('MUFU.EX2', ),
    'global': ('LDG', 'STG'),
    'shared': ('LDS', 'STS', 'LDSM', 'STSM', 'BAR', 'WARPSYNC'),
    'shuffle': ('SHFL', ),
    'convert': ('F2F', 'F2FP', 'PRMT', 'HADD2', 'I2F', 'I2FP'),
}
KINDS = (*_KINDS, 'other')


class _Driver:
    """What Triton asks its driver for when it compiles."""
    target: object = None

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return int(self.target.arch)

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device('cuda', 0)


class _Argument:
    """A tensor without memory, of which the compiler sees the dtype and the alignment."""

    def __init__(self, x):
        self.dtype = x.dtype
        self.offset = x.storage_offset() * x.element_size()

    def data_ptr(self):
        return 4096 + self.offset

    def ptr_range(self):
        return 0


class _Recorder:
    """Stands in for the module with the kernels and keeps their launches: (name, grid, arguments, options)."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):

        class Kernel:

            def __getitem__(_, grid):
                return lambda *args, **kwargs: self.launches.append((name, grid, args, kwargs))

        return Kernel()


@contextmanager
def recorded():
    """Return a context in which the host launches nothing. It gives the list of launches."""
    from mmlocalmamba.ops.backends.triton import host
    recorder = _Recorder()
    with mock.patch.object(host, '_kernels', lambda: recorder), \
            mock.patch.object(host, '_multiprocessors', lambda device: MULTIPROCESSORS):
        yield recorder.launches


def launches(size, middle_token, width, rank, N, batch, dtype, in_scan_order, directions):
    """Return the launches of a scan, {'forward': [...], 'backward': [...]}, and the number of its elements.

    Tokens have ``dtype`` and parameters float32, as under autocast. The factor of the step sizes, B and C are slices of
    one tensor, as the projection of a model makes them.
    """
    from mmlocalmamba.directions import scan_tables
    from mmlocalmamba.ops.backends.triton import host
    tables = scan_tables(directions, *size, middle_token=middle_token)
    K, tokens = tables.inv.shape
    rows = tables.src.shape[1] if in_scan_order else tokens

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device='meta')

    if in_scan_order:
        projected = empty(batch, K, rows, rank + 2 * N, dtype=dtype)
        u = empty(K, batch, rows, width, dtype=dtype).transpose(0, 1)
    else:
        projected = empty(batch, rows, K * (rank + 2 * N), dtype=dtype).unflatten(-1, (K, -1)).transpose(1, 2)
        u = empty(batch, rows, width, dtype=dtype)
    delta, B, C = projected.split((rank, N, N), -1)
    inputs = dict(u=u, delta=delta, A=empty(K, width, N), B=B, C=C, D=empty(K, width), tokens=tokens,
                  src=empty(*tables.src.shape, dtype=torch.int32), delta_bias=empty(K, width),
                  dt_weight=empty(K, width, rank), delta_softplus=True, in_scan_order=in_scan_order)
    with recorded() as forward:
        y, _, checkpoints = host._forward(save=True, **inputs)
    with recorded() as backward:
        host._backward(grad_y=torch.empty_like(y), grad_last=None, checkpoints=checkpoints, wanted=[True] * 7, **inputs)
    return dict(forward=forward, backward=backward), batch * tables.src.numel() * width * N


def compile_for(target, launch):
    """Return Triton's compiled kernel of a launch for a compute capability such as 'sm_90'."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from mmlocalmamba.ops.backends.triton import kernels
    if os.environ.get('TRITON_INTERPRET', '0') not in ('', '0'):
        raise RuntimeError('Triton interprets kernels here and cannot compile them: unset TRITON_INTERPRET')
    _Driver.target = GPUTarget('cuda', int(target.removeprefix('sm_')), 32)
    driver.set_active(_Driver())
    name, grid, args, kwargs = launch
    args = [_Argument(x) if isinstance(x, torch.Tensor) else x for x in args]
    return getattr(kernels, name).run(*args, grid=grid, warmup=True, **kwargs)


def _tool(name, *arguments):
    import triton
    path = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def toolchain():
    """Return the versions of Triton and of its ptxas."""
    import triton
    ptxas = re.search(r'release [\d.]+, V([\d.]+)', _tool('ptxas', '--version'))[1]
    return f'triton {triton.__version__}, ptxas {ptxas}'


def _instructions(text):
    """Return the opcodes of a listing of nvdisasm, and the loops in it as (first, last) places."""
    code, labels, branches = [], {}, []
    for line in text.splitlines():
        if label := re.match(r'^(\.L\w+):', line):
            labels[label[1]] = len(code)
        elif found := re.match(r'^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);', line):
            if found[1].startswith('BRA') and (to := re.search(r'`\((\.L\w+)\)', found[2])):
                branches.append((to[1], len(code)))
            code.append(found[1])
    return code, [(labels[label], place) for label, place in branches if labels.get(label, place) < place]


def _kind(opcode):
    for kind, names in _KINDS.items():
        if opcode in names or opcode.split('.')[0] in names:
            return kind
    return 'other'


def programs(registers, warps, shared, target):
    """Return how many programs a multiprocessor runs at once. A warp's registers come from one of its four parts."""
    most_warps, most_programs, memory = LIMITS[target]
    fit = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    return min(fit, most_warps // warps, most_programs, *([memory * 1024 // (shared + 1024)] if shared else []))


def count(target, launch):
    """Compile a launch and return what its code needs.

    An element is one state of one channel at one step. The instructions of a loop are divided by its elements; those
    around inner loops run once for each chunk of steps.
    """
    name, _, _, flags = launch
    compiled = compile_for(target, launch)
    if compiled.hash not in _COUNTED:
        _COUNTED[compiled.hash] = _count(target, name, flags, compiled)
    return _COUNTED[compiled.hash]


_COUNTED: dict[str, dict] = {}


def _count(target, name, flags, compiled):
    from mmlocalmamba.ops import library
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = _tool('cuobjdump', '--dump-resource-usage', file.name)
        code, loops = _instructions(_tool('nvdisasm', '-c', file.name))
    registers, stack = (int(re.search(rf'{key}:(\d+)', usage)[1]) for key in ('REG', 'STACK'))
    result = dict(kernel=name, registers=registers, spilled=stack,
                  programs=programs(registers, flags['num_warps'], compiled.metadata.shared, target))
    if name not in SCANS:
        return result
    states = flags.get('BLOCK_N') or flags['BLOCK_N1'] * flags['BLOCK_N2']
    per_step = flags['BLOCK_D'] * states / (32 * flags['num_warps'])
    totals = dict.fromkeys(KINDS, 0.)
    for first, last in loops:
        inner = [loop for loop in loops if loop != (first, last) and first <= loop[0] and loop[1] <= last]
        own = [code[i] for i in range(first, last + 1) if not any(a <= i <= b for a, b in inner)]
        # A loop that the compiler has unrolled has as many times the exponentials.
        unrolled = max(1, own.count('MUFU.EX2') // max(1, int(flags['GROUP'] * per_step))) if not inner else 1
        steps = flags.get('CHUNK', library.CHUNK) if inner else flags['GROUP'] * unrolled
        for opcode in own:
            totals[_kind(opcode)] += 1 / (steps * per_step)
    result.update(instructions=sum(totals.values()), **totals)
    return result


def traffic(launches):
    """Return the bytes of each tensor that the kernels read or write, {'kernel: tensor': bytes}, each once a kernel."""
    from mmlocalmamba.ops.backends.triton import kernels
    found = {}
    for name, _, args, _ in launches:
        own = {}  # a tensor that is given twice stands for a missing one the second time, or as delta or enter
        for parameter, x in zip(getattr(kernels, name).arg_names, args):
            if isinstance(x, torch.Tensor) and own.get(id(x), ('delta', ))[0] in ('delta', 'enter'):
                own[id(x)] = parameter, x.numel() * x.element_size()
        found.update({f'{name}: {parameter}': size for parameter, size in own.values()})
    return found


def least_traffic(forward, which):
    """Return the bytes of tokens and outputs, which any implementation reads or writes; ``forward``: its launches."""
    moved = traffic(forward)
    delta = 'step_sizes: delta' if 'step_sizes: delta' in moved else 'scan_pack: delta'
    names = (delta, 'scan_pack: B', 'scan_pack: C', 'scan_forward: u')
    least = {name: moved[name] for name in names} | {'y': moved['scan_forward: y']}
    # The backward pass reads the tokens and the gradient of y, and writes the gradients of the tokens.
    return least if which == 'forward' else {**least, **{f'gradient of {name}': moved[name] for name in names}}


def least_ms(instructions, elements):
    """Return the milliseconds if every scheduler of an H200 issued an instruction at every clock."""
    return instructions * elements / 32 / (MULTIPROCESSORS * 4 * CLOCK * 1e6)
