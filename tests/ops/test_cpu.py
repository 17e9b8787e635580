"""The native CPU kernel against the reference, at the edges of its vectors, chunks and threads."""
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_scan import assert_same, directional_inputs, run

from mmlocalmamba import ops
from mmlocalmamba.directions import ScanTables, scan_tables
from mmlocalmamba.ops import directional_scan, selective_scan
from mmlocalmamba.ops.backends import cpu

UNAVAILABLE = cpu.BACKEND.unavailable(torch.empty(0))
built = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
# More than two chunks of steps, pads, channels that fill neither a vector nor a work item of any instruction set.
ODD = dict(batch=2, H=7, W=11, D=70)


@pytest.fixture(params=cpu.instruction_sets())
def instruction_set(request, monkeypatch):
    monkeypatch.setenv('MMLOCALMAMBA_CPU_ISA', request.param)
    return request.param


@pytest.mark.parametrize('N,rank', [(1, None), (2, 1), (7, 5), (16, None), (64, 48)])
@pytest.mark.parametrize('dtype,y_rtol,rtol', [(torch.float64, 1e-14, 1e-13), (torch.float32, 1e-6, 1e-5)])
def test_equals_reference(instruction_set, N, rank, dtype, y_rtol, rtol):
    inputs, tables = directional_inputs(**ODD, N=N, rank=rank, dtype=dtype)
    exact = run({name: x.double() for name, x in inputs.items()}, directional_scan, backend='reference', tables=tables)
    ours = run(inputs, directional_scan, backend='cpu', tables=tables)
    assert_same(ours, exact, rtol)
    assert_same(dict(y=ours['y'], last=ours['last']), dict(y=exact['y'], last=exact['last']), y_rtol)


@built
@pytest.mark.skipif(not shutil.which('nm'), reason='needs nm')
def test_a_program_without_python_can_load_it():
    """Python's functions may stay unknown until they are called; its objects are needed when the file is loaded."""
    symbols = subprocess.run(['nm', '-D', '--undefined-only', cpu._EXTENSION.__file__], capture_output=True, text=True,
                             check=True).stdout.split()
    assert 'PyModule_Create2' in symbols
    assert [name for name in symbols if re.match(r'PyExc_|_Py_\w+Struct$|Py\w+_Type$', name)] == []


@built
@pytest.mark.parametrize('kwargs', [
    dict(H=1, W=1, D=1, N=1),
    dict(H=1, W=1, D=17, N=2),
    dict(H=3, W=11, D=3, N=1),
    dict(H=5, W=7, D=5, N=5, pad=False),
    dict(H=5, W=7, D=2, N=3, scan_order=True),
    dict(H=2, W=3, D=2, N=2, shared=False, batch=2),
    dict(H=3, W=5, D=3, N=2, batch=2, rank=2),
    dict(H=3, W=3, D=3, N=2, rank=2, scan_order=True),
])
def test_gradcheck(kwargs):
    inputs, tables = directional_inputs(**{'batch': 1, **kwargs})
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *args: directional_scan(**dict(zip(names, args, strict=True)), tables=tables, delta_softplus=True,
                                       in_scan_order=kwargs.get('scan_order', False), backend='cpu',
                                       return_last_state=True), tuple(inputs.values()), fast_mode=True)


@built
@pytest.mark.parametrize('omitted', ['D', 'delta_bias', 'softplus', 'tables'])
def test_optional_arguments(omitted):
    inputs, tables = directional_inputs(scan_order=True, D=5)
    kwargs = dict(tables=tables, delta_softplus=True, in_scan_order=True)
    if omitted == 'softplus':
        kwargs['delta_softplus'] = False
        inputs['delta'] = inputs['delta'].detach().abs().requires_grad_()
    elif omitted == 'tables':
        kwargs['tables'] = None
    else:
        inputs[omitted] = None
    leaves = [x for x in inputs.values() if x is not None]
    results = []
    for backend in ('cpu', 'reference'):
        y = directional_scan(**inputs, **kwargs, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@built
@pytest.mark.parametrize('groups', [None, 1, 3])
def test_selective_scan(groups):
    torch.manual_seed(0)
    batch, width, N, L = 2, 66, 5, 45
    shape = (batch, N, L) if groups is None else (batch, groups, N, L)
    inputs = dict(u=torch.randn(batch, width, L), delta=torch.randn(batch, width, L), A=-torch.rand(width, N),
                  B=torch.randn(shape), C=torch.randn(shape), D=torch.randn(width), z=torch.randn(batch, width, L),
                  delta_bias=torch.randn(width))
    exact = run({name: x.double() for name, x in inputs.items()}, selective_scan, backend='reference')
    assert_same(run(inputs, selective_scan, backend='cpu'), exact, 1e-5)


# Strides of (B, K, L, D). mamba_ssm's layout (B, D, L) becomes 'columns': contiguous steps.
LAYOUTS = {'rows': lambda x: x.contiguous(), 'columns': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
           'neither': lambda x: x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=2)[:, :, ::2, ::2]}


@pytest.mark.parametrize('layouts', list(itertools.product(LAYOUTS, ['rows', 'columns'], LAYOUTS)), ids='-'.join)
@pytest.mark.parametrize('L,D,N,dtype', [(45, 70, 5, torch.float32), (33, 17, 16, torch.float64),
                                         (1, 20, 2, torch.float32), (64, 1, 1, torch.float64),
                                         (7, 3, 33, torch.float32)])
def test_any_layout(instruction_set, layouts, L, D, N, dtype):
    """The layouts are those of u, of delta, and of the other tensors."""
    torch.manual_seed(0)
    kinds = [LAYOUTS[name] for name in layouts]
    exact = [torch.randn(2, 3, L, D).double(), torch.randn(2, 3, L, D).double(), -torch.rand(3, D, N).double(),
             torch.randn(2, 3, L, N).double(), torch.randn(2, 3, L, N).double(), torch.randn(3, D).double()]
    dy, dlast = torch.randn(2, 3, L, D).double(), torch.randn(2, 3, D, N).double()
    results = []
    for backend in ('reference', 'cpu'):
        leaves = [x.clone().requires_grad_() for x in exact]
        if backend == 'cpu':
            u, delta, A, B, C, D_ = (x.to(dtype) for x in leaves)
            given = kinds[0](u), kinds[1](delta), A, kinds[2](B), kinds[2](C), D_
        else:
            given = leaves
        y, last = directional_scan(*given, delta_softplus=True, in_scan_order=True, return_last_state=True,
                                   backend=backend)
        # Gradients of y have any layout, too.
        total = (y * (kinds[2](dy.to(y.dtype)) if backend == 'cpu' else dy)).sum() + (last * dlast.to(y.dtype)).sum()
        results.append([y, last, *torch.autograd.grad(total, leaves)])
    names = 'y last u delta A B C D'.split()
    assert_same(dict(zip(names, results[1])), dict(zip(names, results[0])), 1e-5 if dtype == torch.float32 else 1e-12)


@built
def test_no_copy_of_mambas_layout():
    """Outputs and gradients of inputs (B, D, L) have that layout, and no tensor of that size is copied."""
    torch.manual_seed(0)
    u, delta, dy = (torch.randn(2, 66, 45) for _ in range(3))
    B, C = (torch.randn(2, 5, 45) for _ in range(2))
    inputs = [u.requires_grad_(), delta.requires_grad_(), -torch.rand(66, 5), B, C]
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        y = selective_scan(*inputs, backend='cpu')
        grads = torch.autograd.grad(y, inputs[:2], dy)
    assert all(x.is_contiguous() for x in (y, *grads))
    copied = [sum(event.input_shapes, []) for event in profile.events() if event.name == 'aten::copy_']
    assert not [shape for shape in copied if 45 in shape and 66 in shape]


@built
def test_gradient_of_one_output_only():
    inputs, tables = directional_inputs(D=5)
    for pick in (0, 1):
        grads = []
        for backend in ('cpu', 'reference'):
            outputs = directional_scan(**inputs, tables=tables, backend=backend, return_last_state=True)
            grads.append(torch.autograd.grad(outputs[pick].square().sum(), list(inputs.values()), allow_unused=True))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if expected is None else expected)


def single_steps(instruction_set, delta, **kwargs):
    """Outputs of scans of one step each: dt * u * B * C."""
    ones = torch.ones(1, 1, 1, delta.numel())
    one = torch.ones(1, 1, 1, 1)
    return directional_scan(ones, delta.view(1, 1, 1, -1), torch.zeros(1, delta.numel(), 1), one, one,
                            in_scan_order=True, backend='cpu', **kwargs).flatten()


def test_softplus_keeps_its_digits(instruction_set):
    x = torch.cat([torch.linspace(-80, 40, 100003), torch.tensor([-0., 20., 20.00001, 1e4])])
    ours = single_steps(instruction_set, x, delta_softplus=True)
    exact = torch.where(x > 20, x.double(), torch.nn.functional.softplus(x.double(), threshold=1000))
    assert ((ours.double() - exact) / exact).abs().max() < 5e-7


def test_exp_keeps_its_digits(instruction_set):
    # A first step sets the state to 1, a second one lets it decay: y = exp(dt * A).
    # Around 86.6 the exponents leave what the kernel looks up in a table; beyond 87.3 results are denormal.
    x = torch.cat([torch.linspace(-87, 87, 100003), torch.zeros(1)])
    width = x.numel()
    delta = torch.stack([torch.ones(width), torch.ones(width)]).view(1, 1, 2, width)
    u = torch.stack([torch.ones(width), torch.zeros(width)]).view(1, 1, 2, width)
    ones = torch.ones(1, 1, 2, 1)
    y = directional_scan(u, delta, x.view(1, width, 1), ones, ones, in_scan_order=True, backend='cpu')[0, 0, 1]
    exact = x.double().exp()
    # x * log2(e) is rounded, and what is lost there grows with x.
    assert ((y.double() - exact) / exact / (1 + x.double().abs())).abs().max() < 1.5e-7
    assert y[-1] == 1


@built
def test_every_binade_and_entry_of_the_table(instruction_set):
    # Powers of two that are exact, and neighbours between which the lookup changes its entry. log2(e) * A * dt is x.
    exponents = torch.arange(-124, 125, 1 / 32, dtype=torch.float64)
    x = (exponents / torch.tensor(1.44269504, dtype=torch.float32).double()).float()
    ones = torch.ones(1, 1, 2, 1)
    u = torch.stack([torch.ones(x.numel()), torch.zeros(x.numel())]).view(1, 1, 2, -1)
    y = directional_scan(u, torch.ones_like(u), x.view(1, -1, 1), ones, ones, in_scan_order=True, backend='cpu')
    assert ((y[0, 0, 1].double() / exponents.exp2() - 1).abs() / (1 + exponents.abs())).max() < 1.5e-7


@built
def test_what_is_not_a_number_hides_no_large_exponent(instruction_set):
    """A chunk decides by its largest step; steps before one that is NaN must come out all the same."""
    delta = torch.full((1, 1, 40, 20), 0.1)
    delta[:, :, 3], delta[:, :, 5] = 95., torch.nan
    u, A, B = torch.ones_like(delta), -torch.ones(1, 20, 2), torch.ones(1, 1, 40, 2)
    ours, expected = (directional_scan(u, delta, A, B, B, in_scan_order=True, backend=backend)
                      for backend in ('cpu', 'reference'))
    assert expected[:, :, :5].isfinite().all() and expected[:, :, 5:].isnan().all()
    torch.testing.assert_close(ours, expected, equal_nan=True)


def test_extreme_steps_neither_trap_nor_leave_a_trace(instruction_set):
    inputs, tables = directional_inputs(**ODD, dtype=torch.float32)
    inputs['delta'] = (inputs['delta'].detach() * 1e4).requires_grad_()
    ours = run(inputs, directional_scan, backend='cpu', tables=tables)
    exact = run({name: x.double() for name, x in inputs.items()}, directional_scan, backend='reference', tables=tables)
    assert_same(ours, exact, 1e-5)


@built
def test_states_that_hardly_decay_are_kept(instruction_set):
    """An error of an exponential near 1, the same at each step, would grow with the steps."""
    torch.manual_seed(0)
    L, D, N = 3136, 20, 16
    u, delta = torch.randn(1, 1, L, D), torch.rand(1, 1, L, D) * 1e-9
    A, B, C = -torch.rand(1, D, N), torch.randn(1, 1, L, N), torch.randn(1, 1, L, N)
    arguments = dict(u=u, delta=delta, A=A, B=B, C=C)
    exact = directional_scan(**{name: x.double() for name, x in arguments.items()}, in_scan_order=True,
                             backend='reference')
    ours = directional_scan(**arguments, in_scan_order=True, backend='cpu')
    assert_same(dict(y=ours), dict(y=exact), 1e-6)


@pytest.mark.slow
@built
@pytest.mark.skipif(platform.machine() != 'x86_64' or 'avx2' not in cpu.instruction_sets() or not shutil.which('g++'),
                    reason='needs g++ and the extension with AVX2')
def test_avx512_on_any_machine(tmp_path):
    """Both ways of AVX-512, emulated: they take the places of AVX2 and of the portable kernels in another process."""
    here = Path(__file__).parent
    library = tmp_path / 'libemulated.so'
    # -fexpensive-optimizations: products and sums become one rounding, as in the extension.
    flags = '-std=c++17 -O1 -fexpensive-optimizations -mavx2 -mfma -w -fPIC -shared'.split()
    subprocess.run(['g++', *flags, '-I', Path(ops.__file__).parent / 'csrc', here / 'avx512_emulated.cpp',
                    '-o', library], check=True)
    environment = {name: value for name, value in os.environ.items() if name != 'MMLOCALMAMBA_CPU_ISA'}
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', here / 'test_cpu.py',
         here / 'test_half.py', '-k', 'emulated'],
        env={**environment, 'LD_PRELOAD': str(library)}, cwd=here.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'passed' in result.stdout and 'skipped' not in result.stdout, result.stdout


@built
@pytest.mark.parametrize('name', ['u', 'delta', 'B', 'A'])
def test_nan_spreads_as_in_the_reference(name):
    inputs, tables = directional_inputs(dtype=torch.float32, D=20)
    with torch.no_grad():
        inputs[name].flatten()[7] = torch.nan
        ours, expected = (directional_scan(**inputs, tables=tables, delta_softplus=True, backend=backend)
                          for backend in ('cpu', 'reference'))
    assert expected.isnan().any()
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@built
def test_strides_do_not_matter():
    inputs, tables = directional_inputs(**ODD, N=6)
    expected = run(inputs, directional_scan, backend='cpu', tables=tables)

    def strided(x):
        spread = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
        return spread.copy_(x)

    # Transposed rows, other elements between channels, and slices of a wider projection.
    views = [lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2), strided,
             lambda x: torch.cat([x, x], dim=-1)[..., x.shape[-1]:]]
    for view in views:
        def function(view=view, **inputs):
            return directional_scan(**{name: view(x) if isinstance(x, torch.Tensor) else x
                                       for name, x in inputs.items()})
        ours = run(inputs, function, backend='cpu', tables=tables)
        assert_same(ours, expected, 1e-14)


@built
def test_expanded_gradient():
    inputs, tables = directional_inputs(D=20)
    grads = [torch.autograd.grad(directional_scan(**inputs, tables=tables, backend=backend).sum(), inputs['u'])[0]
             for backend in ('cpu', 'reference')]
    torch.testing.assert_close(*grads)


@built
@pytest.mark.parametrize('kwargs', [dict(batch=0), dict(D=0), dict(N=0)])
def test_empty(kwargs):
    inputs, tables = directional_inputs(**kwargs)
    y, last = directional_scan(**inputs, tables=tables, delta_softplus=True, return_last_state=True, backend='cpu')
    expected = directional_scan(**inputs, tables=tables, delta_softplus=True, backend='reference')
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert all(grad.shape == x.shape and grad.isfinite().all() for grad, x in zip(grads, inputs.values(), strict=True))


@built
@pytest.mark.parametrize('batch', [1, 3, 9])
@pytest.mark.parametrize('shared', [True, False])
def test_same_bits_whatever_the_threads(batch, shared):
    # Few and many sequences a thread: gradients are summed in parts or in place.
    inputs, tables = directional_inputs(batch=batch, H=6, W=7, D=300, N=16, shared=shared, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(inputs, directional_scan, backend='cpu', tables=tables))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(result[name], x), name


@built
def test_backward_under_autocast():
    inputs, tables = directional_inputs(dtype=torch.float32)
    expected = run(inputs, directional_scan, backend='cpu', tables=tables)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ours = run(inputs, directional_scan, backend='cpu', tables=tables)
    for name, x in expected.items():
        assert torch.equal(ours[name], x), name


@built
def test_backward_without_saved_states():
    inputs, tables = directional_inputs(H=9, W=9)
    arguments = (*(inputs[name] for name in ('u', 'delta', 'A', 'B', 'C', 'D')), tables.src, 81, inputs['delta_bias'],
                 None, True, False)
    grads = [torch.autograd.grad(torch.ops.mmlocalmamba.directional_scan(*arguments, save)[0].square().sum(),
                                 list(inputs.values())) for save in (True, False)]
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


@built
@pytest.mark.slow
def test_opcheck():
    inputs, tables = directional_inputs(H=5, W=9, D=3, N=2, dtype=torch.float32)
    tensors = [inputs[name] for name in ('u', 'delta', 'A', 'B', 'C', 'D')]
    op = torch.ops.mmlocalmamba.directional_scan.default
    for save in (True, False):
        torch.library.opcheck(op, (*tensors, tables.src, 45, inputs['delta_bias'], None, True, False, save))
    in_order = directional_inputs(scan_order=True)[0]
    torch.library.opcheck(op, (*(in_order[name] for name in ('u', 'delta', 'A', 'B', 'C')), None, None,
                               in_order['u'].shape[2], None, None, False, True, True))

    columns = {name: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
               for name, x in in_order.items()}
    torch.library.opcheck(op, (*(columns[name] for name in ('u', 'delta', 'A', 'B', 'C')), None, None,
                               in_order['u'].shape[2], None, None, False, True, True))

    factored = directional_inputs(H=5, W=9, D=3, N=2, rank=2)[0]
    torch.library.opcheck(op, (*(factored[name] for name in ('u', 'delta', 'A', 'B', 'C', 'D')), tables.src, 45,
                               factored['delta_bias'], factored['dt_weight'], True, False, True))

    tensors = [x.detach() for x in tensors]
    y, last, checkpoints = op(*tensors, tables.src, 45, inputs['delta_bias'].detach(), None, True, False, True)
    for wanted in ([True] * 7, [False, True, False, True, False, True, False]):
        torch.library.opcheck(
            torch.ops.mmlocalmamba.directional_scan_backward.default,
            (torch.randn_like(y), None, *tensors, tables.src, 45, inputs['delta_bias'].detach(), None, checkpoints,
             True, False, wanted))


@built
def test_compiles_without_a_graph_break():
    inputs, _ = directional_inputs(H=6, W=6, rank=2, dtype=torch.float32)

    def model(inputs):
        tables = scan_tables(('h', 'v_flip', 'w2', 'w3_flip'), 6, 6)
        return directional_scan(**inputs, tables=tables, delta_softplus=True)

    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    results = []
    for function in (model, compiled):
        y = function(inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@built
def test_second_derivative_is_refused():
    inputs, tables = directional_inputs()
    y = directional_scan(**inputs, tables=tables, backend='cpu')
    grad, = torch.autograd.grad(y.square().sum(), inputs['u'], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives: use backend='reference'"):
        grad.sum().backward()


@built
def test_bad_input_is_an_error_not_a_crash(monkeypatch):
    inputs, tables = directional_inputs()
    with pytest.raises(IndexError, match='src holds tokens from -1 to 35, there are 35'):
        directional_scan(**inputs, tables=ScanTables(tables.src + (tables.src == 34).int(), tables.inv), backend='cpu')
    with pytest.raises(ValueError, match='must be an int32 table of 4 rows on the CPU'):
        directional_scan(**inputs, tables=ScanTables(tables.src.long(), tables.inv), backend='cpu')

    op = torch.ops.mmlocalmamba.directional_scan
    detached = {name: x.detach() for name, x in inputs.items()}
    arguments = [detached[name] for name in ('u', 'delta', 'A', 'B', 'C', 'D')]
    rest = (tables.src, 35, detached['delta_bias'], None, True, False, False)
    with pytest.raises(TypeError, match='A must be Double beside these tokens, got Float'):
        op(*arguments[:2], arguments[2].float(), *arguments[3:], *rest)
    with pytest.raises(ValueError, match='B must have shape'):
        op(*arguments[:3], arguments[3][..., :1], *arguments[4:], *rest)
    with pytest.raises(TypeError, match='u must be float32, float64 or bfloat16'):
        op(arguments[0].half(), *arguments[1:], *rest)

    monkeypatch.setenv('MMLOCALMAMBA_CPU_ISA', 'avx1024')
    with pytest.raises(ValueError, match='MMLOCALMAMBA_CPU_ISA=avx1024: this machine can run .*portable'):
        op(*arguments, *rest)


@pytest.mark.slow
def test_without_the_extension():
    """A fresh interpreter that cannot import it: falls back, says so once and only for scans of a serious size."""
    code = '''
import sys, warnings
sys.modules['mmlocalmamba.ops._cpu'] = None
import torch
from mmlocalmamba import ops
def scan(L):
    x = torch.ones(1, 1, L, 64)
    return ops.directional_scan(x, x, -torch.ones(1, 64, 1), x[..., :1], x[..., :1], in_scan_order=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    scan(10)
    assert not caught
    scan(2000), scan(2000)
assert len(caught) == 1, caught
assert 'the extension is not built' in str(caught[0].message) and caught[0].filename == '<string>', caught[0]
assert ops.cpu.instruction_sets() == []
try:
    ops.directional_scan(*[torch.ones(1, 1, 1, 1)] * 2, torch.ones(1, 1, 1), *[torch.ones(1, 1, 1, 1)] * 2,
                         in_scan_order=True, backend='cpu')
except RuntimeError as error:
    assert "backend 'cpu' cannot run here: the extension is not built" in str(error)
else:
    raise AssertionError
'''
    subprocess.run([sys.executable, '-c', code], check=True)


@built
def test_default_on_the_cpu():
    assert next(iter(ops.available_backends(torch.empty(0)))) == 'cpu'
    assert ops.available_backends(torch.empty(0, device='meta'))['cpu'] == 'it is for CPU tensors'
