"""The Triton kernels against the reference in float64: on a GPU, or without one in Triton's interpreter.

The interpreter proves the arithmetic and the masks, not that threads do not race.
"""
import sys
import warnings
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from test_scan import assert_same, directional_inputs, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmlocalmamba import __main__ as main
from mmlocalmamba import ops
from mmlocalmamba.directions import ScanTables, scan_tables
from mmlocalmamba.ops import directional_scan, dispatch, library, selective_scan
from mmlocalmamba.ops.backends.triton import host, tune, tuning
from mmlocalmamba.ops.dispatch import choose

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Three chunks of steps (see chunks), pads, channels that fill no block.
ODD = dict(batch=1, H=3, W=5, D=5, N=3, directions=('v_flip', 'w2'))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill memory that kernels write with NaN."""
    monkeypatch.setattr(host, '_empty', lambda *shape, **options: torch.full(shape, torch.nan, **options))


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Use short chunks, so that short sequences have several."""
    monkeypatch.setattr(library, 'CHUNK', 8)


@pytest.fixture(params=['sequential', 'segments'])
def plan(request, monkeypatch):
    """Run one program for a whole sequence, or several."""
    if request.param == 'segments':
        monkeypatch.setattr(host, '_segment', lambda sequences, blocks, steps, *_: (-(-steps // 8), 8))
    else:
        monkeypatch.setattr(host, '_segment', lambda sequences, blocks, steps, *_: (1, -(-steps // 8) * 8))
    return request.param


def to_device(tables):
    return ScanTables(*(table.to(DEVICE) for table in tables))


def run_triton(inputs, tables, **kwargs):
    result = run({name: x.to(DEVICE) for name, x in inputs.items()}, directional_scan, backend='triton',
                 tables=to_device(tables), **kwargs)
    return {name: x.cpu() for name, x in result.items()}


def compare(rtol=2e-6, gradient_rtol=1e-5, dtype=torch.float32, omit=(), **kwargs):
    inputs, tables = directional_inputs(dtype=dtype, **{**ODD, **kwargs})
    for name in omit:
        inputs.pop(name)
    scan_order = dict(in_scan_order=kwargs.get('scan_order', False))
    exact = run({name: x.double() for name, x in inputs.items()}, directional_scan, backend='reference',
                tables=tables, **scan_order)
    ours = run_triton(inputs, tables, **scan_order)
    assert ours['y'].dtype == dtype and ours['last'].dtype == torch.float32
    assert all(ours[name].dtype == x.dtype for name, x in inputs.items())
    for outputs, limit in ((('y', 'last'), rtol), (inputs, gradient_rtol)):
        assert_same(ours, {name: exact[name] for name in outputs}, limit)
    return ours


@pytest.mark.parametrize('N', [1, 2, 5, 16])
def test_equals_reference(plan, N):
    compare(N=N)


@pytest.mark.parametrize('kwargs', [
    dict(scan_order=True),
    dict(shared=False, pad=False),
    dict(rank=3, batch=2),
    dict(rank=1, scan_order=True, pad=False),
    dict(H=1, W=1, D=1, N=1),
    dict(H=1, W=9, D=33, N=2, directions=('h', )),  # two blocks of channels
    dict(omit=('D', 'delta_bias')),
], ids=str)
@pytest.mark.slow
def test_ways_to_call(plan, kwargs):
    compare(**kwargs)


@pytest.mark.parametrize('forward,backward', list(zip(tuning.CANDIDATES['forward'],
                                                      cycle(tuning.CANDIDATES['backward']))), ids=str)
@pytest.mark.slow
def test_every_block_size(monkeypatch, forward, backward):
    """Segments use all kernels. The channels fill no block: they are three of 16, two of 32 or one of 64."""
    monkeypatch.setattr(host, '_segment', lambda sequences, blocks, steps, *_: (-(-steps // 8), 8))
    with tuning.forced('forward', forward), tuning.forced('backward', backward):
        compare(H=1, W=11, D=37, directions=('w2_flip', ), rank=2)


@pytest.mark.slow
def test_tuning(monkeypatch, tuning_file, capsys):
    """The clock is simulated: a candidate that fails and one that computes wrongly are left out."""
    choices = {kernel: candidates[:4] for kernel, candidates in tuning.CANDIDATES.items()}
    wrong, broken = choices['forward'][1], choices['backward'][3]
    monkeypatch.setattr(tuning, 'CANDIDATES', choices)
    scan = directional_scan

    def wrong_once(**inputs):
        return scan(**inputs) * (1.1 if tuning._forced.get('forward') == wrong else 1)

    def timer(function):
        (kernel, choice), = tuning._forced.items()
        if choice == broken:
            raise RuntimeError('out of registers')
        return dict(forward=[5., .1, 4., 6.], backward=[5., 4.95, 6.])[kernel][choices[kernel].index(choice)]

    monkeypatch.setattr(ops, 'directional_scan', wrong_once)
    shape = dict(batch=1, H=1, W=2, width=3, rank=1)
    assert tune.tune(['float32'], [1], quick=True, device=DEVICE, shapes=[shape], timer=timer)
    printed = capsys.readouterr().out
    assert f'{wrong} is left out: ArithmeticError: results differ by 1.0e-01' in printed
    assert f'{broken} is left out: RuntimeError: out of registers' in printed
    assert str(tuning_file) in printed

    problems = []
    initialise = host._Problem.__init__

    def spy(self, kernel, **inputs):
        initialise(self, kernel, **inputs)
        problems.append((kernel, self.flags['GROUP'], self.warps))

    monkeypatch.setattr(host._Problem, '__init__', spy)
    compare(N=1, H=1, W=3, D=2, directions=('h', ))
    assert problems == [(kernel, choice.group, choice.warps) for kernel, choice in
                        (('forward', choices['forward'][2]), ('backward', choices['backward'][0]))]


def test_tuning_stops_where_the_built_in_sizes_fail(tuning_file):

    def run_tune(error):

        def timer(function):
            raise error

        return tune.tune(['float32'], [1], device=DEVICE, shapes=[dict(batch=1, H=1, W=1, width=1, rank=1)],
                         timer=timer)

    with pytest.raises(RuntimeError, match='the device is gone'):
        run_tune(RuntimeError('the device is gone'))
    assert not run_tune(torch.OutOfMemoryError())
    assert not tuning_file.exists()


def test_more_programs_than_are_launched_together(monkeypatch):
    monkeypatch.setattr(host, '_BACKWARD_PROGRAMS', 3)
    compare(batch=2, H=2, W=3)


def test_large_rank_is_multiplied_before(monkeypatch):
    monkeypatch.setattr(host, '_MAX_RANK', 1)
    compare(rank=20, H=1)


class NoProducts(TorchDispatchMode):

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name().split('::')[1] not in ('mm', 'bmm', 'addmm', 'baddbmm', 'mv', 'dot'), function
        return function(*args, **(kwargs or {}))


def test_step_sizes_are_not_multiplied_by_pytorch(monkeypatch):
    """PyTorch's matrix product may use TF32 on a GPU."""
    monkeypatch.setattr(host, '_MAX_RANK', 1)
    inputs, tables = directional_inputs(**{**ODD, 'H': 1}, rank=2, dtype=torch.float32)
    tensors = {name: x.detach().to(DEVICE) for name, x in inputs.items()}
    with NoProducts():  # it sees nothing inside of an operator
        y, last, checkpoints = host._forward(**tensors, src=tables.src.to(DEVICE), tokens=tables.inv.shape[1],
                                             delta_softplus=True, in_scan_order=False, save=True)
        host._backward(grad_y=y, grad_last=None, checkpoints=checkpoints, wanted=[True] * 7, **tensors,
                       src=tables.src.to(DEVICE), tokens=tables.inv.shape[1], delta_softplus=True, in_scan_order=False)


@pytest.mark.parametrize('name', ['B', 'delta'])
def test_nan_of_the_first_token_stays_there(name):
    """Pads read a row of zeros, not the first token. Its NaN is in outputs from its step on, not before."""
    inputs, tables = directional_inputs(**{**ODD, 'H': 1, 'directions': ('h', 'w2_flip')}, rank=2, dtype=torch.float32)
    with torch.no_grad():
        inputs[name][..., 0, 0] = torch.nan
    results = [directional_scan(**{key: x.detach().to(device) for key, x in inputs.items()}, delta_softplus=True,
                                tables=ScanTables(*(x.to(device) for x in tables)), backend=backend).cpu()
               for backend, device in (('triton', DEVICE), ('reference', 'cpu'))]
    assert 0 < results[1].isnan().sum() < results[1].numel()
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_rows_beyond_32_bits(monkeypatch):
    """The last row of u begins 2^31 elements after the first one. Only the pages that are used get memory."""
    if DEVICE == 'cpu':  # the interpreter would copy the storage onto itself
        from triton.runtime import interpreter
        monkeypatch.setattr(interpreter.GridExecutor, '_restore_args_dev', lambda *args: None)
    inputs, tables = directional_inputs(**{**ODD, 'H': 1, 'W': 9}, rank=2, dtype=torch.bfloat16)
    inputs = {name: x.detach().to(DEVICE) for name, x in inputs.items()}
    far = torch.empty(2 ** 31 + 5, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 9, 5), (0, 2 ** 28, 1))
    far.copy_(inputs['u'])
    results = [directional_scan(**{**inputs, 'u': u}, tables=to_device(tables), delta_softplus=True, backend='triton')
               for u in (inputs['u'], far)]
    assert torch.equal(*results)


@pytest.mark.parametrize('dtype,rtol', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_inputs_keep_a_float32_state(dtype, rtol):
    compare(dtype=dtype, rtol=rtol, gradient_rtol=rtol)


def test_mixed_precision():
    """Activations have 16 bits and parameters 32, as under autocast."""
    inputs, tables = directional_inputs(**ODD, rank=2, dtype=torch.bfloat16)
    exact = run({name: x.double() for name, x in inputs.items()}, directional_scan, backend='reference', tables=tables)
    parameters = ('A', 'D', 'delta_bias', 'dt_weight')
    inputs = {name: x.float() if name in parameters else x for name, x in inputs.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = run_triton(inputs, tables)
    assert all(ours[name].dtype == x.dtype for name, x in inputs.items())
    assert_same(ours, exact, 2e-2)
    assert_same(ours, {'last': exact['last']}, 2e-6)


def test_same_bits_every_time():
    results = [compare(), compare()]
    for name, x in results[0].items():
        assert torch.equal(results[1][name], x), name


def test_strides_do_not_matter():
    inputs, tables = directional_inputs(**ODD, dtype=torch.float32)
    strided = {name: torch.cat([x, x], -1).chunk(2, -1)[1].detach() for name, x in inputs.items()}
    other = {name: x.detach().flip(0).repeat_interleave(2, -1)[..., ::2].flip(0) for name, x in inputs.items()}
    results = [directional_scan(**{name: x.to(DEVICE) for name, x in each.items()}, tables=to_device(tables),
                                delta_softplus=True, backend='triton') for each in (inputs, strided, other)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.slow
def test_gradient_of_one_output_only(plan):
    inputs, tables = directional_inputs(**ODD, dtype=torch.float32)
    for pick in (0, 1):
        grads = []
        for backend, device in (('triton', DEVICE), ('reference', 'cpu')):
            leaves = [x.detach().to(device).requires_grad_() for x in inputs.values()]
            outputs = directional_scan(**dict(zip(inputs, leaves, strict=True)), delta_softplus=True, backend=backend,
                                       return_last_state=True, tables=ScanTables(*(x.to(device) for x in tables)))
            grads.append(torch.autograd.grad(outputs[pick].square().sum(), leaves, allow_unused=True))
        for ours, expected in zip(*grads, strict=True):
            ours = ours.cpu()
            torch.testing.assert_close(ours, torch.zeros_like(ours) if expected is None else expected,
                                       rtol=1e-4, atol=1e-5)


def test_selective_scan():
    torch.manual_seed(0)
    batch, width, N, L = 1, 6, 2, 11
    inputs = dict(u=torch.randn(batch, width, L), delta=torch.randn(batch, width, L), A=-torch.rand(width, N),
                  B=torch.randn(batch, 2, N, L), C=torch.randn(batch, 2, N, L), D=torch.randn(width),
                  z=torch.randn(batch, width, L), delta_bias=torch.randn(width))
    exact = run({name: x.double() for name, x in inputs.items()}, selective_scan, backend='reference')
    ours = run({name: x.to(DEVICE) for name, x in inputs.items()}, selective_scan, backend='triton')
    assert_same({name: x.cpu() for name, x in ours.items()}, exact, 1e-5)


def test_softplus_keeps_its_digits():
    x = torch.cat([torch.linspace(-80, 40, 500), torch.tensor([-0., 20., 20.00001, 1e4])])
    ones, one = torch.ones(1, 1, 1, x.numel(), device=DEVICE), torch.ones(1, 1, 1, 1, device=DEVICE)
    ours = directional_scan(ones, x.view(1, 1, 1, -1).to(DEVICE), torch.zeros(1, x.numel(), 1, device=DEVICE), one, one,
                            in_scan_order=True, delta_softplus=True, backend='triton').flatten().cpu()
    exact = torch.where(x > 20, x.double(), torch.nn.functional.softplus(x.double(), threshold=1000))
    # Half of the error at -80 is that of x * log2(e).
    assert ((ours.double() - exact) / exact / (1 + x.abs().clamp(max=90) / 8)).abs().max() < 1e-6


@pytest.mark.parametrize('shape', [(0, 3, 2), (1, 3, 0)])
def test_empty(shape):
    batch, L, width = shape
    u, delta = (torch.zeros(batch, 1, L, width, device=DEVICE, requires_grad=True) for _ in range(2))
    A = torch.zeros(1, width, 2, device=DEVICE, requires_grad=True)
    B = torch.zeros(batch, 1, L, 2, device=DEVICE, requires_grad=True)
    y = directional_scan(u, delta, A, B, B, in_scan_order=True, backend='triton')
    assert y.shape == u.shape
    y.sum().backward()
    assert not B.grad.any() and A.grad.shape == A.shape


@pytest.mark.parametrize('dtype,rtol', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('case', [dict(), dict(taps=1, D=65), dict(pad=False, bias=False, W=12)], ids=str)
def test_convolution(monkeypatch, case, dtype, rtol):
    case = {**dict(taps=4, D=5, pad=True, bias=True, H=3, W=5), **case}
    generator = torch.Generator().manual_seed(0)
    tables = scan_tables(('h', 'w2_flip'), case['H'], case['W'], pad=case['pad'])
    shapes = dict(x=(2, case['H'] * case['W'], case['D']), weight=(2, case['D'], case['taps']), bias=(2, case['D']))
    inputs = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if not case['bias']:
        del inputs['bias']
    results = []
    for backend, device, kind in (('triton', DEVICE, dtype), ('reference', 'cpu', torch.float64)):
        monkeypatch.setenv(ops.BACKEND_VARIABLE, backend)
        leaves = {name: x.detach().to(device, kind, copy=True).requires_grad_() for name, x in inputs.items()}
        y = ops.directional_conv(leaves['x'], leaves['weight'], leaves.get('bias'),
                                 ScanTables(*(table.to(device) for table in tables)))
        (y * torch.linspace(-1, 1, y.numel(), device=device, dtype=kind).view(y.shape)).sum().backward()
        results.append(dict(y=y.detach().cpu(), **{name: x.grad.cpu() for name, x in leaves.items()}))
        assert y.dtype == kind
    assert_same(*results, rtol)


def test_high_ranks_are_not_multiplied_in_16_bits(monkeypatch):
    monkeypatch.setattr(host, '_MAX_RANK', 1)
    inputs, tables = directional_inputs(**{**ODD, 'H': 1}, rank=24, dtype=torch.float32)
    inputs = {name: x.detach().to(DEVICE, torch.bfloat16 if name in ('u', 'delta') else x.dtype)
              for name, x in inputs.items()}
    ours, exact = (directional_scan(**{name: x.to(dtype or x.dtype) for name, x in inputs.items()},
                                    tables=to_device(tables), delta_softplus=True, return_last_state=True,
                                    backend=backend)[1]
                   for backend, dtype in (('triton', None), ('reference', torch.float64)))
    assert (ours - exact).norm() / exact.norm() < 1e-5


def operator(name, x):
    return getattr(torch.ops.mmlocalmamba, name + host._suffix(x))


@pytest.mark.parametrize('wanted', [[True, False, False, False, False, True, True], [False, True, True] + [False] * 4,
                                    [False] * 3 + [False, True, False, False], [False] * 7], ids=str)
@pytest.mark.slow
def test_unwanted_gradients(wanted):
    """Unwanted gradients are empty, and the others do not change."""
    inputs, tables = directional_inputs(**{**ODD, 'H': 1}, rank=2, dtype=torch.float32)
    inputs = {name: x.detach().to(DEVICE) for name, x in inputs.items()}
    tensors, src = [inputs[name] for name in ('u', 'delta', 'A', 'B', 'C', 'D')], tables.src.to(DEVICE)
    rest = (src, tables.inv.shape[1], inputs['delta_bias'], inputs['dt_weight'])
    y, last, checkpoints = operator('directional_scan', src)(*tensors, *rest, True, False, True)
    every, some = (operator('directional_scan_backward', src)(y, last, *tensors, *rest, checkpoints, True, False, mask)
                   for mask in ([True] * 7, wanted))
    for ours, expected, needed in zip(some, every, wanted, strict=True):
        assert torch.equal(ours, expected) if needed else ours.numel() == 0
    x, weight, inv = inputs['u'], torch.ones(2, 5, 4, device=DEVICE), tables.inv.to(DEVICE)
    grad = torch.ones(x.shape[0], 2, src.shape[1], 5, device=DEVICE)
    every, some = (operator('directional_conv_backward', src)(grad, x, weight, None, src, inv, mask)
                   for mask in ([True] * 3, wanted[-3:]))
    for ours, expected, needed in zip(some, every, wanted[-3:], strict=True):
        assert torch.equal(ours, expected) if needed else ours.numel() == 0


@pytest.mark.slow
def test_opcheck():
    """Shapes, strides and dtypes are as declared, which torch.compile relies on."""
    utilities = ('test_schema', 'test_faketensor', 'test_autograd_registration')
    for rank in (None, 2):
        inputs, tables = directional_inputs(**{**ODD, 'H': 2}, rank=rank, dtype=torch.bfloat16)
        inputs = {name: x.detach().to(DEVICE, torch.float32 if name == 'A' else x.dtype) for name, x in inputs.items()}
        tensors, src = [inputs[name] for name in ('u', 'delta', 'A', 'B', 'C', 'D')], tables.src.to(DEVICE)
        rest = (src, tables.inv.shape[1], inputs['delta_bias'], inputs.get('dt_weight'))
        op = operator('directional_scan', src)
        backward = operator('directional_scan_backward', src)
        torch.library.opcheck(op.default, (*tensors, *rest, True, False, True), test_utils=utilities)
        y, last, checkpoints = op(*tensors, *rest, True, False, True)
        for wanted in ([True] * 7, [False, True] * 3 + [False]):
            torch.library.opcheck(backward.default, (y, last, *tensors, *rest, checkpoints, True, False, wanted),
                                  test_utils=utilities)
    x, weight, inv = inputs['u'], torch.randn(2, 5, 4, device=DEVICE), tables.inv.to(DEVICE)
    conv = operator('directional_conv', src)
    torch.library.opcheck(conv.default, (x, weight, None, src, inv), test_utils=utilities)
    for wanted in ([True] * 3, [True, False, False], [False, True, False]):
        torch.library.opcheck(operator('directional_conv_backward', src).default,
                              (conv(x, weight, None, src, inv), x, weight, None, src, inv, wanted),
                              test_utils=utilities)


def test_compiles_without_a_graph_break():
    inputs, tables = directional_inputs(**{**ODD, 'H': 1}, rank=2, dtype=torch.float32)
    inputs = {name: x.detach().to(DEVICE).requires_grad_() for name, x in inputs.items()}
    tables = to_device(tables)

    def model(inputs):
        return directional_scan(**inputs, tables=tables, delta_softplus=True, backend='triton')

    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend='aot_eager')):
        y = function(inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('name', ['LocalVMambaMixer', 'LocalVimMixer'])
def test_mixers(name, monkeypatch):
    """Whole mixers, checkpointed and under autocast, take the kernels."""
    pytest.importorskip('mmengine')
    from mmlocalmamba.layers import mixers
    torch.manual_seed(0)
    module = getattr(mixers, name)(4, ('v', 'w2_flip'), d_state=2, dt_rank=2, scattn=dict(reduction=2)).to(DEVICE)
    x = torch.randn(1, 6, 4, device=DEVICE)
    tables = scan_tables(module.directions, 2, 3, device=DEVICE)
    arguments = (x, tables) if name == 'LocalVimMixer' else (x, (2, 3), tables)
    results = []
    for backend in ('triton', 'reference'):
        monkeypatch.setenv(ops.BACKEND_VARIABLE, backend)
        module.zero_grad()
        y = checkpoint(module, *arguments, use_reentrant=False)
        y.square().sum().backward()
        results.append(dict(y=y.detach(), **{name: p.grad.clone() for name, p in module.named_parameters()
                                             if p.grad is not None}))
    assert_same(*results, 1e-3)  # gradients of norms are small differences of large numbers
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'triton')
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        low = module(*arguments)
    assert low.dtype == torch.bfloat16
    assert_same(dict(y=low.detach()), dict(y=results[1]['y']), 3e-2)


def test_bad_input_is_named():
    inputs, tables = directional_inputs(**ODD, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: it computes in float32, .* torch.float64"):
        directional_scan(**{name: x.double() for name, x in inputs.items()}, tables=tables, backend='triton')
    with pytest.raises(ValueError, match='src must be an int32 table of 2 rows'):
        run_triton(inputs, ScanTables(tables.src.long(), tables.inv))
    with pytest.raises(TypeError, match='B must be float32, bfloat16 or float16, got torch.float64'):
        tensors = {name: inputs[name].to(DEVICE) for name in ('u', 'delta', 'A', 'B', 'C')}
        host._forward(**{**tensors, 'B': tensors['B'].double()}, D=None, src=None, tokens=45, delta_bias=None,
                      dt_weight=None, delta_softplus=True, in_scan_order=False, save=False)


@pytest.mark.parametrize('version,reason', [
    ('3.2.0', r'it needs triton >= 3.3, which torch >= 2.7 brings; triton 3.2.0 does not compile its kernels'),
    ('3.3.0', None), ('3.10.1+git', None)])
def test_an_old_triton_is_not_chosen(monkeypatch, version, reason):
    import triton
    monkeypatch.setattr(triton, '__version__', version)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setitem(ops.BACKENDS, 'cuda', SimpleNamespace(device_type='cuda', automatic=True,
                                                              refuses=lambda *_: 'it is not installed'))
    dispatch._warn_of_slow_scan.cache_clear()
    host._triton_problem.cache_clear()
    u = SimpleNamespace(device=torch.device('cuda'), dtype=torch.float32, numel=lambda: 1 << 20)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            assert choose(u).name == ('triton' if reason is None else 'chunked')
        assert [reason in str(warning.message) for warning in caught] == [True] * (reason is not None)
        assert host.BACKEND.unavailable(u) == reason
    finally:
        host._triton_problem.cache_clear()
        dispatch._warn_of_slow_scan.cache_clear()


def test_the_interpreter_is_never_chosen():
    if DEVICE == 'cpu':
        assert ops.available_backends(torch.empty(0))['triton'] is None
        assert choose(torch.empty(0)).name != 'triton'
    else:
        assert choose(torch.empty(0, device=DEVICE)).name == 'triton'


@pytest.mark.parametrize('sequences,blocks,steps,expected', [
    (256, 6, 3136, 1),  # stage 1 at batch 64: 1536 programs
    (8, 6, 66800, 44),  # detection: 48 programs
    (4, 6, 3136, 49),  # one image: no segment is shorter than two chunks
    (4, 48, 49, 1),
])
def test_segments(monkeypatch, sequences, blocks, steps, expected):
    monkeypatch.undo()
    monkeypatch.setattr(host, '_multiprocessors', lambda device: 132)
    segments, length = host._segment(sequences, blocks, steps, 16, torch.device('cuda'))
    assert segments == expected and length % library.CHUNK == 0 and (segments - 1) * length < steps <= segments * length


gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')


@gpu
@pytest.mark.parametrize('H,W,D,N,rank,batch', [(28, 28, 384, 16, 12, 4), (200, 333, 40, 16, None, 1),
                                                (13, 31, 200, 1, 5, 3), (9, 9, 130, 64, None, 2)])
def test_real_sizes_without_races(monkeypatch, H, W, D, N, rank, batch):
    """Compare with the chunked backend in float64, and three runs with each other bit by bit."""
    monkeypatch.setattr(library, 'CHUNK', 32)
    inputs, tables = directional_inputs(batch=batch, H=H, W=W, D=D, N=N, rank=rank, dtype=torch.float32)
    inputs = {name: x.detach().to(DEVICE) for name, x in inputs.items()}
    exact = run({name: x.double() for name, x in inputs.items()}, directional_scan, backend='chunked',
                tables=to_device(tables))
    results = [run(inputs, directional_scan, backend='triton', tables=to_device(tables)) for _ in range(3)]
    assert_same(results[0], exact, 1e-5)
    for result in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(result[name], x), name


@gpu
def test_more_than_32_bits_of_elements(monkeypatch):
    monkeypatch.undo()
    batch, K, L, D = 176, 4, 3136, 1024
    tables = scan_tables(('h', 'v', 'w2', 'w7_flip'), 56, 56, device=DEVICE)
    assert batch * K * L * D > 2 ** 31
    u = torch.randn(batch, L, D, device=DEVICE, dtype=torch.bfloat16)
    delta = torch.randn(batch, K, L, 1, device=DEVICE, dtype=torch.bfloat16)
    B, C = (torch.randn(batch, K, L, 1, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    A, weight = -torch.ones(K, D, 1, device=DEVICE), torch.randn(K, D, 1, device=DEVICE)

    def scan(part):
        leaves = [x[part].clone().requires_grad_() for x in (u, delta, B, C)]
        y = directional_scan(leaves[0], leaves[1], A, leaves[2], leaves[3], tables=tables, delta_softplus=True,
                             dt_weight=weight, backend='triton')
        return [y[-1].detach(), *(x[-1] for x in torch.autograd.grad(y, leaves, torch.ones_like(y)))]

    for ours, expected in zip(scan(slice(None)), scan(slice(batch - 1, None)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


@gpu
def test_tuning_on_this_gpu(monkeypatch, tuning_file, capsys):
    monkeypatch.undo()
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tuning_file))
    monkeypatch.setattr(sys, 'argv', ['mmlocalmamba', 'tune', '--quick', '--dtypes', 'bfloat16', '--states', '1'])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 0
    assert {(key.kernel, key.d_state, key.dtype) for key in tuning.saved()} == {
        ('forward', 1, 'bfloat16'), ('backward', 1, 'bfloat16')}
    assert 'left out' not in capsys.readouterr().out


@gpu
def test_cuda_graph(monkeypatch):
    monkeypatch.undo()
    inputs, tables = directional_inputs(batch=2, H=9, W=9, D=40, N=16, rank=4, dtype=torch.float32)
    inputs, tables = {name: x.detach().to(DEVICE) for name, x in inputs.items()}, to_device(tables)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def step():
        y = directional_scan(**inputs, tables=tables, delta_softplus=True, backend='triton')
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for ours, x in zip(captured, expected, strict=True):
        assert torch.equal(ours, x)
