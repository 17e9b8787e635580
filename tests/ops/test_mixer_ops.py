"""The ops around the scan in a mixer: native kernels against plain PyTorch in float64, outputs and gradients."""
import pytest
import torch
from test_cpu import built, instruction_set  # noqa: F401  (a fixture)
from test_scan import assert_same
from torch import nn
from torch.nn import functional as F

from mmlocalmamba import ops
from mmlocalmamba.directions import scan_tables
from mmlocalmamba.layers import SCAttn, rotary_tables
from mmlocalmamba.ops.backends import cpu

DIRECTIONS = ('h', 'v_flip', 'w2', 'w3_flip')
H, W, BATCH = 7, 11, 2
FLOATS = [(torch.float64, 1e-13), (torch.float32, 1e-5)]


def tables(pad=True):
    return scan_tables(DIRECTIONS, H, W, pad=pad)


class Sum(nn.Module):
    """SCAttn's sum over directions as a module of its own, to call it with other weights."""

    def __init__(self, scattn):
        super().__init__()
        self.scattn = scattn

    def forward(self, y, z=None):
        return self.scattn.sum_directions(y, z)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_case(rank=4):
    return ops.linear, dict(x=randn(2, 3, 5, 13), weight=randn(37, 13, seed=1), bias=randn(37, seed=2))


def conv_case(D=70, taps=4, pad=True):
    def function(**inputs):
        return ops.directional_conv(**inputs, tables=tables(pad))
    return function, dict(x=randn(BATCH, H * W, D), weight=randn(4, D, taps, seed=1), bias=randn(4, D, seed=2))


def sum_case(D=70, gated=True):
    module = Sum(SCAttn(D, reduction=min(8, D)))
    weights = {name: randn(*parameter.shape, seed=3) for name, parameter in module.named_parameters()}

    def function(y, z=None, **weights):
        return torch.func.functional_call(module, weights, (y, z))

    # Features with a mean, and more tokens than one work item takes.
    inputs = dict(y=randn(BATCH, 4, H * W, D) + 1, **weights)
    return function, {**inputs, 'z': randn(BATCH, H * W, D, seed=4)} if gated else inputs


def gelu_case():
    # More elements than one work item takes, and not a multiple of them.
    return ops.linear_gelu, dict(x=3 * randn(2, 350, 13), weight=randn(37, 13, seed=1), bias=randn(37, seed=2))


def grid_case(D=70, bias=True, size=(H, W)):
    def function(x, weight, bias=None):
        return ops.conv2d_silu(x, weight, bias, size)

    inputs = dict(x=randn(BATCH, size[0] * size[1], D), weight=randn(D, 1, 3, 3, seed=1))
    return function, {**inputs, 'bias': randn(D, seed=2)} if bias else inputs


def gate_case(D=70, K=4, gated=True):
    def function(y, weight, bias, z=None):
        return ops.norm_gate(y, z, weight, bias, 1e-5)

    inputs = dict(y=randn(BATCH, K, H * W, D) + 1, weight=randn(D, seed=1), bias=randn(D, seed=2))
    return function, {**inputs, 'z': randn(BATCH, H * W, D, seed=4)} if gated else inputs


def norm_case(D=70, rotate=True, residual=True):
    tables = rotary_tables(H, W, D - D % 4, 14, 'cpu') if rotate else (None, None)

    def function(x, residual=None, weight=None):
        cos, sin = (None if table is None else F.pad(table, (0, D % 4)).to(x.dtype) for table in tables)
        return torch.cat(ops.add_rms_norm(x, residual, weight, 1e-5, cos, sin))

    inputs = dict(x=randn(BATCH, H * W, D), weight=randn(D, seed=1))
    return function, {**inputs, 'residual': randn(BATCH, H * W, D, seed=2)} if residual else inputs


CASES = {
    'linear': linear_case,
    'linear-per-direction': lambda: (ops.linear, dict(x=randn(2, 3, 5, 13), weight=randn(3, 7, 13, seed=1))),
    'gelu': gelu_case,
    'grid': grid_case,
    'grid-narrow': lambda: grid_case(D=9, bias=False, size=(5, 3)),
    'grid-1': lambda: grid_case(D=1, size=(1, 1)),
    'gate': gate_case,
    'gate-plain': lambda: gate_case(D=133, K=1, gated=False),
    'gate-5': lambda: gate_case(D=5, K=2),
    'conv': conv_case,
    'conv-odd': lambda: conv_case(D=17, taps=3, pad=False),
    'conv-1': lambda: conv_case(D=1, taps=1),
    'conv-long': lambda: conv_case(D=5, taps=40),
    'sum': sum_case,
    'sum-plain': lambda: sum_case(D=131, gated=False),
    'sum-1': lambda: sum_case(D=2),
    'norm': norm_case,
    'norm-first': lambda: norm_case(D=132, residual=False),
    'norm-plain': lambda: norm_case(D=5, rotate=False),
}


def run(case, dtype, backend, monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, backend)
    function, inputs = CASES[case]()
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    y = function(**leaves)
    (y * randn(*y.shape, seed=5).to(dtype)).sum().backward()
    return dict(result=y.detach(), **{name: x.grad for name, x in leaves.items()})


@pytest.mark.parametrize('dtype,rtol', FLOATS)
@pytest.mark.parametrize('case', CASES)
def test_equals_pytorch(instruction_set, case, dtype, rtol, monkeypatch):  # noqa: F811
    exact = run(case, torch.float64, 'reference', monkeypatch)
    ours = run(case, dtype, 'cpu', monkeypatch)
    # The mean of normalised features is small compared with its summands.
    norm = {name: exact.pop(name) for name in list(exact) if 'norm.weight' in name}
    assert_same(ours, exact, rtol)
    assert_same(ours, norm, 100 * rtol)


@built
@pytest.mark.parametrize('case', CASES)
def test_opcheck(case, monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == 'mmlocalmamba':
                seen.append((func, tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)))
            return func(*args, **(kwargs or {}))

    function, inputs = CASES[case]()
    with Record():
        function(**{name: x.requires_grad_() for name, x in inputs.items()}).sum().backward()
    names = {func.name().removeprefix('mmlocalmamba::').removesuffix('.default') for func, _ in seen}
    assert names == {'linear': {'linear'}, 'conv': {'directional_conv', 'directional_conv_backward'},
                     'gelu': {'linear_gelu', 'linear_gelu_backward', 'linear'},
                     'grid': {'conv2d_silu', 'conv2d_silu_backward'}, 'gate': {'norm_gate', 'norm_gate_backward'},
                     'sum': {'scattn_sum', 'scattn_sum_backward'}, 'norm': {'add_rms_norm'}}[case.split('-')[0]]
    for func, args in seen:
        torch.library.opcheck(func, args)


@built
@pytest.mark.parametrize('case', CASES)
def test_same_bits_whatever_the_threads(case, monkeypatch):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, 'cpu', monkeypatch))
    finally:
        torch.set_num_threads(threads)
    # oneDNN chooses the order of summation of its products.
    tolerance = 1e-5 if case.startswith(('linear', 'gelu')) else 0
    for name, x in results[0].items():
        torch.testing.assert_close(results[1][name], x, rtol=tolerance, atol=tolerance, msg=name)


@built
def test_linear_has_second_derivatives(monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    inputs = [x.requires_grad_() for x in linear_case()[1].values()]
    assert torch.autograd.gradgradcheck(ops.linear, inputs)


@built
def test_strides_do_not_matter(monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    for case in ('linear', 'gelu', 'grid', 'gate', 'conv', 'sum', 'norm'):
        function, inputs = CASES[case]()
        inputs = {name: x.float() for name, x in inputs.items()}
        strided = {name: x.flip(0).repeat_interleave(2, -1)[..., ::2].flip(0) for name, x in inputs.items()}
        chunks = {name: torch.cat([x, x], -1).chunk(2, -1)[1] for name, x in inputs.items()}
        for other in (strided, chunks):
            torch.testing.assert_close(function(**other), function(**inputs), rtol=0,
                                       atol=1e-5 if case in ('linear', 'gelu') else 0)


@built
@pytest.mark.parametrize('library', ['mkl', 'onednn'])
def test_products_of_both_libraries(library, monkeypatch):
    """Each processor takes one of them by itself."""
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    function, inputs = linear_case()
    exact = function(**inputs)
    extension = cpu._EXTENSION
    try:
        assert extension.set_library(library)
        with torch.autograd.profiler.profile() as profile:
            y = function(**{name: x.float() for name, x in inputs.items()})
        assert not extension.set_library('blas')
    finally:
        extension.set_library('processor')
    by_onednn = any(event.name.startswith('mkldnn::') for event in profile.function_events)
    assert by_onednn == (library == 'onednn')
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-5)


@built
def test_gelu_of_extreme_and_missing_numbers(instruction_set, monkeypatch):  # noqa: F811
    """What is far below zero becomes zero. Errors elsewhere are those of a rounded distribution function."""
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    one = torch.ones(1, 1)
    x = torch.cat([torch.linspace(-7, 7, 10001), torch.tensor([-1e30, -50., 50., 1e30, float('nan'), float('inf')])])
    y = ops.linear_gelu(x[:, None], one)[:, 0]
    exact = F.gelu(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=4e-7, atol=1.5e-6, equal_nan=True)
    error, found = y - exact, exact.isfinite()
    assert error[found][:10001].norm() < 1e-7 * exact[:10001].norm() and y[10001] == 0 and y[10002] == 0


@built
@pytest.mark.parametrize('shape', [(0, 6, 4), (2, 6, 0)])
def test_empty(shape, monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = torch.zeros(2, shape[2], 4, requires_grad=True), torch.zeros(2, shape[2], requires_grad=True)
    y = ops.directional_conv(x, weight, bias, scan_tables(('h', 'w2'), 2, 3))
    assert y.shape == (shape[0], 2, 8, shape[2])
    z = ops.linear(x, torch.zeros(5, shape[2], requires_grad=True))
    assert z.shape == (*shape[:2], 5)
    taps, row = torch.zeros(shape[2], 1, 3, 3, requires_grad=True), torch.zeros(shape[2], requires_grad=True)
    z = ops.norm_gate(ops.conv2d_silu(x, taps, None, (2, 3))[:, None], x, row, row, 1e-5)
    assert z.shape == x.shape
    (y.sum() + z.sum() + ops.linear_gelu(x, taps[:, 0, 0, :].t()).sum()).backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


@built
def test_extreme_and_missing_numbers(instruction_set, monkeypatch):  # noqa: F811
    """SiLU far out neither overflows nor traps; NaN stays in its steps' reach."""
    x = torch.tensor([-1e30, -200., -88., 88., 200., 1e30, float('nan'), 1.])[None, :, None].repeat(1, 1, 3)
    weight, bias = torch.ones(1, 3, 1), torch.zeros(1, 3)
    y = ops.directional_conv(x, weight, bias, scan_tables(('h', ), 1, 8))[0, 0, :, 0]
    torch.testing.assert_close(y, torch.nn.functional.silu(x[0, :, 0]), equal_nan=True, rtol=1e-6, atol=1e-30)


@built
def test_bad_input_is_an_error_not_a_crash(monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    x, weight, bias = (inputs.detach() for inputs in conv_case(D=3)[1].values())
    with pytest.raises(ValueError, match='weight must have shape'):
        ops.directional_conv(x, weight[:, :2], bias, tables())
    with pytest.raises(IndexError, match='src holds tokens'):
        ops.directional_conv(x[:, :5], weight, bias, tables())
    with pytest.raises(ValueError, match=r'weight \(O, I\) and bias \(O,\), got \[2, 77, 3\], \[7, 4\]'):
        ops.linear(x, torch.ones(7, 4, dtype=x.dtype))
    with pytest.raises(ValueError, match=r'weight \(K, O, I\) without bias'):
        ops.linear(x[:, None], torch.ones(2, 7, 3, dtype=x.dtype))
    with pytest.raises(ValueError, match='z must have shape'):
        torch.ops.mmlocalmamba.scattn_sum(x[:, None], x[:1], *[bias[0]] * 2, 1e-5, bias, bias[0], bias.t(), bias[0])
    with pytest.raises(ValueError, match='select_weight must have shape'):
        torch.ops.mmlocalmamba.scattn_sum(x[:, None], None, *[bias[0]] * 2, 1e-5, bias, bias[:, 0], bias, bias[0])
    with pytest.raises(ValueError, match=r'x must be \(B, height \* width, D\), got \[2, 77, 3\] for 7 x 10'):
        ops.conv2d_silu(x, x.new_ones(3, 1, 3, 3), None, (7, 10))
    with pytest.raises(ValueError, match='weight must have shape'):
        ops.conv2d_silu(x, x.new_ones(3, 1, 5, 5), None, (H, W))
    with pytest.raises(ValueError, match=r'y must be \(B, K, L, D\)'):
        ops.norm_gate(x, None, bias[0], bias[0], 1e-5)
    with pytest.raises(ValueError, match='z must have shape'):
        ops.norm_gate(x[:, None], x[:1], bias[0], bias[0], 1e-5)
    with pytest.raises(ValueError, match='residual must have shape'):
        ops.add_rms_norm(x, x[:1], bias[0], 1e-5)
    with pytest.raises(ValueError, match='channels must be pairs, got 3'):
        ops.add_rms_norm(x, x, bias[0], 1e-5, x[0], x[0])


@built
def test_mixed_precision(monkeypatch):
    """Under autocast products run in 16 bits, as torch's own; other ops keep their tokens' dtype."""
    inputs = {name: x.float() for name, x in linear_case()[1].items()}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert ops.linear(**inputs).dtype == torch.bfloat16
    x, weight, bias = (x.bfloat16() for x in conv_case(D=3)[1].values())
    assert ops.directional_conv(x, weight, bias, tables()).dtype == torch.bfloat16
