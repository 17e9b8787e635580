"""The Triton kernels against the reference in float64: on a GPU, or without one in Triton's interpreter.

The interpreter proves the arithmetic and the masks, not that threads do not race.
"""
import pytest
import torch
from test_ops import assert_same, directional_inputs, run

from mmlocalmamba import ops
from mmlocalmamba.ops import directional_scan, library, selective_scan, triton
from mmlocalmamba.scans import ScanTables

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Three chunks of steps (see chunks), pads, channels that fill no block.
ODD = dict(batch=1, H=3, W=5, D=5, N=3, directions=('v_flip', 'w2'))


@pytest.fixture(autouse=True)
def numpy_scalars(monkeypatch):
    """numpy 2.4 turns arrays of one element into integers no longer, which Triton 3.6's interpreter relies on."""
    if DEVICE == 'cuda':
        return
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, '_patch_lang_tensor', patched)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    monkeypatch.setattr(triton, '_empty', lambda *shape, **options: torch.full(shape, torch.nan, **options))


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Short ones, so that short sequences have several."""
    monkeypatch.setattr(library, 'CHUNK', 8)


@pytest.fixture(params=['sequential', 'segments'])
def plan(request, monkeypatch):
    """One program for a whole sequence, or several."""
    if request.param == 'segments':
        monkeypatch.setattr(triton, '_segment', lambda sequences, blocks, steps, *_: (-(-steps // 8), 8))
    else:
        monkeypatch.setattr(triton, '_segment', lambda sequences, blocks, steps, *_: (1, -(-steps // 8) * 8))
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
def test_ways_to_call(plan, kwargs):
    compare(**kwargs)


def test_more_programs_than_are_launched_together(monkeypatch):
    monkeypatch.setattr(triton, '_BACKWARD_PROGRAMS', 3)
    compare(batch=2, H=2, W=3)


def test_large_rank_is_multiplied_outside(monkeypatch):
    monkeypatch.setattr(triton, '_MAX_RANK', 1)
    compare(rank=2)


@pytest.mark.parametrize('dtype,rtol', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_inputs_keep_a_float32_state(dtype, rtol):
    compare(dtype=dtype, rtol=rtol, gradient_rtol=rtol)


def test_mixed_precision():
    """As under autocast: activations in 16 bits, parameters in 32."""
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


def test_gradient_of_one_output_only(plan):
    inputs, tables = directional_inputs(**ODD, dtype=torch.float32)
    for pick in (0, 1):
        grads = []
        for backend, device in (('triton', DEVICE), ('reference', 'cpu')):
            leaves = [x.detach().to(device).requires_grad_() for x in inputs.values()]
            outputs = directional_scan(**dict(zip(inputs, leaves, strict=True)), backend=backend,
                                       delta_softplus=True, return_last_state=True, tables=ScanTables(*(x.to(device) for x in tables)))
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


def test_bad_input_is_named():
    inputs, tables = directional_inputs(**ODD, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run here: it computes in float32, .* torch.float64"):
        directional_scan(**{name: x.double() for name, x in inputs.items()}, tables=tables, backend='triton')
    with pytest.raises(ValueError, match='src must be an int32 table of 2 rows'):
        run_triton(inputs, ScanTables(tables.src.long(), tables.inv))
    with pytest.raises(TypeError, match='B must be float32, bfloat16 or float16, got torch.float64'):
        run_triton({**inputs, 'B': inputs['B'].double()}, tables)


def test_the_interpreter_is_never_chosen():
    if DEVICE == 'cpu':
        assert ops.available_backends(torch.empty(0))['triton'] is None
        assert ops._choose(torch.empty(0), None) is not triton
    else:
        assert ops._choose(torch.empty(0, device=DEVICE), None) is triton


@pytest.mark.parametrize('sequences,blocks,steps,expected', [
    (256, 6, 3136, 1),  # stage 1 at batch 64: 1536 programs
    (8, 6, 66800, 44),  # detection: 48 programs
    (4, 6, 3136, 49),  # one image: no segment is shorter than two chunks
    (4, 48, 49, 1),
])
def test_segments(monkeypatch, sequences, blocks, steps, expected):
    monkeypatch.undo()
    monkeypatch.setattr(triton, '_multiprocessors', lambda device: 132)
    segments, length = triton._segment(sequences, blocks, steps, 1, torch.device('cuda'))
    assert segments == expected and length % library.CHUNK == 0 and (segments - 1) * length < steps <= segments * length
