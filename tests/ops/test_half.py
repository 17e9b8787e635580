"""bfloat16 on the CPU: native kernels against float64, and against plain PyTorch under autocast."""
import platform

import pytest
import test_properties
import torch
from hypothesis import given, settings
from processes import PYTHON, finish, start
from test_cpu import ODD, built, instruction_set  # noqa: F401  (a fixture)
from test_mixer_ops import CASES, randn
from test_scan import directional_inputs

from mmlocalmamba import ops
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.ops import directional_scan

pytestmark = built
TOKENS = {'linear': ('x', 'weight', 'bias'), 'gelu': ('x', 'weight', 'bias'), 'grid': ('x', ), 'gate': ('y', 'z'),
          'conv': ('x', ), 'sum': ('y', 'z'), 'norm': ('x', ), 'scan': ('u', 'delta', 'B', 'C')}
# Relative error of a sum of several terms of equal size, each rounded to 16 bits.
LIMIT = 1e-2


def rounded(x):
    return x.detach().bfloat16().to(x.dtype)


def stored(inputs, tokens, mixed):
    """Leaves as a model has them: under autocast (``mixed``) tokens in 16 bits and parameters in 32, or all in 16."""
    return {name: x.detach().to(torch.bfloat16 if name in tokens or not mixed else torch.float32).requires_grad_()
            for name, x in inputs.items()}


def results(function, leaves, autocast=False):
    """Outputs and all gradients for cotangents of values that 16 bits can hold."""
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs, )
    total = sum((y * rounded(randn(*y.shape, seed=5)).to(y.dtype)).double().sum() for y in outputs)
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {**{str(index): y.detach() for index, y in enumerate(outputs)}, **dict(zip(leaves, grads, strict=True))}


def errors(found, exact):
    assert found.keys() == exact.keys()
    return {name: float((found[name].double() - x).norm() / x.norm().clamp(min=1e-12)) for name, x in exact.items()}


def check(function, inputs, tokens, mixed, monkeypatch):
    """Compare with the results of the stored values in float64, and with the error of plain PyTorch."""
    leaves = stored(inputs, tokens, mixed)
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'reference')
    exact = results(function, {name: x.detach().double().requires_grad_() for name, x in leaves.items()})
    plain = errors(results(function, leaves, mixed), exact)
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    ours = results(function, leaves, mixed)
    for name, error in errors(ours, exact).items():
        assert error < LIMIT, f'{name}: {error:.1e}'
        # Rounding the result costs up to half a unit of the last bit.
        assert error <= max(1.05 * plain[name], 2 ** -9), f'{name}: {error:.1e}, plain PyTorch {plain[name]:.1e}'
    for name, x in leaves.items():
        assert ours[name].dtype == x.dtype, name


@pytest.mark.parametrize('mixed', [True, False])
@pytest.mark.parametrize('case', CASES)
def test_equals_float64(instruction_set, case, mixed, monkeypatch):  # noqa: F811
    function, inputs = CASES[case]()
    check(function, inputs, TOKENS[case.split('-')[0]], mixed, monkeypatch)


PRODUCT = """
import torch
from mmlocalmamba import ops
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
x, weight, bias = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((1, 2, 7, 5), (3, 5), (3, )))
y = ops.linear(x, weight, bias, backend='cpu')
y.float().square().sum().backward()
torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=2 ** -7, atol=1e-2)
assert all(leaf.grad.isfinite().all() for leaf in (x, weight, bias))
"""


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='the variable names instruction sets of x86-64')
@pytest.mark.slow
def test_where_onednn_has_no_bfloat16():
    """oneDNN raises an error there, so the op computes the product in another way."""
    finish(start(*PYTHON, '-c', PRODUCT, ONEDNN_MAX_CPU_ISA='AVX2'))


SCANS = {
    'low-rank': dict(**ODD, N=7, rank=5),
    'full': dict(**ODD, N=16),
    'one': dict(batch=1, H=1, W=1, D=1, N=1),
    'scan-order': dict(batch=2, H=5, W=9, D=19, N=3, rank=2, scan_order=True),
    'own-tokens': dict(batch=1, H=8, W=8, D=33, N=2, shared=False),
    'no-pads': dict(batch=3, H=5, W=7, D=5, N=5, pad=False),
}


def scan_case(case):
    inputs, tables = directional_inputs(**SCANS[case])

    def function(**inputs):
        return directional_scan(**inputs, tables=tables, delta_softplus=True, return_last_state=True,
                                in_scan_order=SCANS[case].get('scan_order', False))
    return function, inputs


@pytest.mark.parametrize('mixed', [True, False])
@pytest.mark.parametrize('case', SCANS)
def test_scan_equals_float64(instruction_set, case, mixed, monkeypatch):  # noqa: F811
    function, inputs = scan_case(case)
    check(function, inputs, TOKENS['scan'] + (('A', ) if not mixed else ()), mixed, monkeypatch)


@pytest.mark.parametrize('columns', [('u', ), ('delta', ), ('B', 'C'), ('u', 'delta', 'B', 'C')])
def test_mambas_layout(instruction_set, columns, monkeypatch):  # noqa: F811
    """Tensors with contiguous steps, as u (B, D, L)."""
    def function(**inputs):
        inputs = {name: x.mT.contiguous().mT if name in columns else x for name, x in inputs.items()}
        return directional_scan(**inputs, delta_softplus=True, in_scan_order=True)

    inputs = dict(u=randn(2, 3, 45, 70), delta=randn(2, 3, 45, 70, seed=1), A=-randn(3, 70, 5, seed=2).abs(),
                  B=randn(2, 3, 45, 5, seed=3), C=randn(2, 3, 45, 5, seed=4), D=randn(3, 70, seed=6))
    check(function, inputs, TOKENS['scan'], True, monkeypatch)


def test_the_state_and_sums_over_steps_have_32_bits():
    """4,096 steps, all alike: in 16 bits the state, and gradients that sum over steps, would stop growing at 256."""
    L = 4096
    ones = torch.ones(1, 1, L, 1, dtype=torch.bfloat16)
    u = ones.clone().requires_grad_()
    A, D = torch.zeros(1, 1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    y, last = directional_scan(u, ones, A, ones, ones, D, in_scan_order=True, return_last_state=True, backend='cpu')
    assert last.item() == L and y[0, 0, -1].item() == L
    y.backward(ones)
    assert D.grad.item() == L and u.grad[0, 0, 0].item() == L
    # Sums over directions, too.
    x, weight = torch.ones(1, 1, 1, dtype=torch.bfloat16), torch.ones(600, 1, 1, requires_grad=True)
    tables = type(TABLES)(*(table.expand(600, -1).contiguous() for table in TABLES))
    x.requires_grad_()
    y = ops.directional_conv(x, weight, None, tables, backend='cpu')
    y.float().sum().backward()
    slope = torch.autograd.functional.jacobian(torch.nn.functional.silu, torch.ones(())).item()
    assert abs(x.grad.item() / (600 * slope) - 1) < 2 ** -8


TABLES = ops.ScanTables(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32))


def test_rounds_as_torch_does(instruction_set):  # noqa: F811
    """Every sum of two 16-bit numbers: ties to even, infinities, NaN, numbers below the smallest normal one."""
    bits = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int16).view(torch.bfloat16)
    for shift in (0, 1, 77, 128, 130):
        other = bits.roll(shift)[None, :, None].expand(1, -1, 4).contiguous()
        x = bits[None, :, None].expand(1, -1, 4).contiguous()
        total = ops.add_rms_norm(x, other, torch.ones(4), 1e-5, backend='cpu')[1]
        exact = x.float() + other.float()
        # The kernels take numbers below the smallest normal one for zero.
        normal = ~torch.stack([x.float(), other.float(), exact]).abs().lt(2 ** -126).any(0)
        torch.testing.assert_close(total[normal], exact.bfloat16()[normal], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('case', [*CASES, *SCANS])
def test_same_bits_whatever_the_threads(case, monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    if case.startswith('linear'):
        pytest.skip("the order of summation is oneDNN's")
    function, inputs = CASES[case]() if case in CASES else scan_case(case)
    leaves = stored(inputs, TOKENS[case.split('-')[0] if case in CASES else 'scan'], True)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            found.append(results(function, leaves))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, x in found[0].items():
            # With factors of the step sizes, gradients are products by oneDNN.
            if name not in ('dt_weight', ) and not ('dt_weight' in leaves and name == 'delta'):
                assert torch.equal(other[name], x), name


class Record(torch.utils._python_dispatch.TorchDispatchMode):
    """Record the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'mmlocalmamba':
            self.calls.append((func, tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('case', [*CASES, *SCANS])
def test_opcheck(case, monkeypatch):
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    function, inputs = CASES[case]() if case in CASES else scan_case(case)
    leaves = stored(inputs, TOKENS[case.split('-')[0] if case in CASES else 'scan'], True)
    with Record() as record:
        results(function, leaves)
    assert record.calls
    for func, args in record.calls:
        torch.library.opcheck(func, args)


ARCHS = {
    LocalVMamba: dict(arch=dict(embed_dims=[8, 12], depths=[1, 1], d_state=4), patch_size=2),
    LocalVim: dict(arch=dict(embed_dims=8, num_layers=2, d_state=4), patch_size=4, img_size=24),
}
OWN = {
    LocalVMamba: {'conv2d_silu', 'directional_scan', 'norm_gate', 'scattn_sum'},
    LocalVim: {'directional_scan', 'directional_conv', 'scattn_sum', 'add_rms_norm'},
}


@pytest.mark.parametrize('mixed', [True, False])
@pytest.mark.parametrize('kind', OWN)
def test_models_take_the_native_kernels(kind, mixed):
    """They run in 16 bits, forward and backward, under autocast and with weights in 16 bits."""
    kwargs = dict(ARCHS[kind])
    model = kind(kwargs.pop('arch'), directions=['h', 'w2_flip'], drop_path_rate=0., **kwargs)
    images = torch.randn(2, 3, 24, 20)
    if not mixed:
        model, images = model.bfloat16(), images.bfloat16()
    with Record() as record, torch.autocast('cpu', torch.bfloat16, enabled=mixed):
        sum(out.float().square().mean() for out in model(images)).backward()
    wide = {'add_rms_norm'} if mixed else set()  # the first, of positions that autocast does not touch
    called = {func.name().removeprefix('mmlocalmamba::').removesuffix('.default') for func, args in record.calls
              if args[0].dtype == torch.bfloat16}
    expected = OWN[kind] | {f'{name}_backward' for name in OWN[kind] if name != 'add_rms_norm'}
    assert called - {'linear'} == expected
    others = {func.name().removeprefix('mmlocalmamba::').removesuffix('.default') for func, args in record.calls
              if args[0].dtype != torch.bfloat16}
    assert others <= wide | {'linear'}  # products of the gradients of step sizes
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('kind', OWN)
@pytest.mark.slow
def test_models_are_as_exact_as_plain_pytorch(kind, monkeypatch):
    """Compare errors of outputs and gradients under autocast, for the images and backbones of test_properties.py.

    The sum of all errors is compared, since a single one is random.
    """
    monkeypatch.setattr(test_properties, 'MAX_TOKENS', 24)
    sums = torch.zeros(2, 3, dtype=torch.float64)

    @settings(max_examples=40, **test_properties.SETTINGS)
    @given(test_properties.cases(kind))
    def check(case):
        model, images, _ = case
        model.eval()
        found = []
        for backend, autocast in (('chunked', False), ('chunked', True), ('cpu', True)):
            monkeypatch.setenv(ops.BACKEND_VARIABLE, backend)
            double = not autocast
            model, x = (model.double(), images.double()) if double else (model.float(), images.clone())
            model.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                outs = model(x.requires_grad_())
            sum((out * rounded(randn(*out.shape)).to(out.dtype)).double().sum() for out in outs).backward()
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found.append([torch.cat([x.detach().double().flatten() for x in group]) for group in (outs, [x.grad], grads)
                          if group])
        for index, (exact, *others) in enumerate(zip(*found, strict=True)):
            for which, other in enumerate(others):
                sums[which, index] += (other - exact).norm() / exact.norm().clamp(min=1e-9)

    check()
    assert (sums[0] > 0).all() and (sums[1] <= 1.1 * sums[0]).all(), sums
