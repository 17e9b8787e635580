"""Derivatives of the operators by autograd and torch.func: those they have, and those they refuse."""
import re
from functools import partial

import pytest
import torch
from test_cpu import built
from test_scan import DIRECTIONS, directional_inputs
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from mmlocalmamba import ops
from mmlocalmamba.directions import ScanTables, scan_tables

H, W = 2, 3
TABLES = scan_tables(DIRECTIONS, H, W)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COS, SIN = randn(H * W, 4, seed=3), randn(H * W, 4, seed=4)


def scan_case(rank=None):
    inputs, tables = directional_inputs(batch=2, H=H, W=W, D=3, N=2, rank=rank)
    return lambda **x: ops.directional_scan(**x, tables=tables, delta_softplus=True), inputs


CASES = {
    'scan': scan_case,
    'scan-low-rank': lambda: scan_case(rank=2),
    'linear': lambda: (lambda **x: ops.linear(**x),
                       dict(x=randn(2, 3, 5), weight=randn(4, 5, seed=1), bias=randn(4, seed=2))),
    'linear-per-direction': lambda: (lambda **x: ops.linear(**x),
                                     dict(x=randn(2, 3, 5, 4), weight=randn(3, 2, 4, seed=1))),
    'linear_gelu': lambda: (lambda **x: ops.linear_gelu(**x),
                            dict(x=randn(2, 3, 5), weight=randn(4, 5, seed=1), bias=randn(4, seed=2))),
    'conv2d_silu': lambda: (lambda **x: ops.conv2d_silu(**x, size=(H, W)),
                            dict(x=randn(2, H * W, 3), weight=randn(3, 1, 3, 3, seed=1), bias=randn(3, seed=2))),
    'norm_gate': lambda: (lambda **x: ops.norm_gate(**x, eps=1e-5),
                          dict(y=randn(2, 4, H * W, 5), z=randn(2, H * W, 5, seed=1), weight=randn(5, seed=2),
                               bias=randn(5, seed=3))),
    'conv': lambda: (lambda **x: ops.directional_conv(**x, tables=TABLES),
                     dict(x=randn(2, H * W, 3), weight=randn(4, 3, 2, seed=1), bias=randn(4, 3, seed=2))),
    'scattn_sum': lambda: (lambda **x: ops.scattn_sum(**x, eps=1e-5), dict(
        y=randn(2, 4, H * W, 5), z=randn(2, H * W, 5, seed=1), norm_weight=randn(5, seed=2),
        norm_bias=randn(5, seed=3), reduce_weight=randn(2, 5, seed=4), reduce_bias=randn(2, seed=5),
        select_weight=randn(5, 2, seed=6), select_bias=randn(5, seed=7))),
    'add_rms_norm': lambda: (
        lambda **x: torch.cat(ops.add_rms_norm(**x, eps=1e-5, cos=COS, sin=SIN)),
        dict(x=randn(2, H * W, 4), residual=randn(2, H * W, 4, seed=1), weight=randn(4, seed=2))),
}
every_case = pytest.mark.parametrize('case', CASES)


def positional(case):
    """Return the function and its inputs without gradients, both by position."""
    function, inputs = CASES[case]()
    names = list(inputs)
    return lambda *x: function(**dict(zip(names, x, strict=True))), tuple(x.detach() for x in inputs.values())


@pytest.fixture(params=['cpu', 'chunked', 'reference'])
def backend(request, monkeypatch):
    if ops.available_backends(torch.empty(0))[request.param] is not None:
        pytest.skip('the extension is not built')
    monkeypatch.setenv(ops.BACKEND_VARIABLE, request.param)
    return request.param


def replaced(function, inputs, i, x):
    return function(*inputs[:i], x, *inputs[i + 1:])


def dual_jvp(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


def functional_jvp(function, x, tangent):
    return torch.func.jvp(function, (x, ), (tangent, ))[1]


@every_case
def test_a_tangent_never_vanishes(case, backend):
    """Forward-mode derivatives are right or refused. Each tensor is tested alone, so that none hides another."""
    function, inputs = positional(case)
    for i, x in enumerate(inputs):
        along = partial(replaced, function, inputs, i)
        tangent, step = randn(*x.shape, seed=9), 1e-6
        expected = (along(x + step * tangent) - along(x - step * tangent)) / (2 * step)
        for jvp in (dual_jvp, functional_jvp):
            try:
                ours = jvp(along, x, tangent)
            except NotImplementedError as error:
                assert backend == 'cpu' or (backend == 'chunked' and case.startswith('scan'))
                assert re.search('no forward-mode derivatives .*MMLOCALMAMBA_BACKEND=reference', str(error)), error
            else:
                assert backend != 'cpu'  # of chunked, all but what the recurrence takes
                torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@built
def test_an_input_that_gets_no_gradient_is_an_error(backend):
    """add_rms_norm: the fused versions take the rotary tables as constants."""
    inputs = dict(x=randn(2, H * W, 4), residual=None, weight=randn(4, seed=2), eps=1e-5)
    for name in ('cos', 'sin'):
        tables = dict(cos=COS, sin=SIN)
        tables[name] = tables[name].clone().requires_grad_()
        if backend == 'cpu':
            with pytest.raises(NotImplementedError, match=f"no gradient of {name}.*backend='reference'"):
                ops.add_rms_norm(**inputs, **tables)
        else:
            ops.add_rms_norm(**inputs, **tables)[0].sum().backward()
            assert tables[name].grad.abs().max() > 0
        with torch.no_grad():
            ops.add_rms_norm(**inputs, **tables)


def test_operators_refuse_tangents_themselves():
    """An exported graph calls the operators without the dispatcher."""
    x, weight = randn(2, 3), randn(4, 3)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match='no forward-mode'):
        torch.ops.mmlocalmamba.linear(x, forward_ad.make_dual(weight, weight), None)
    with pytest.raises(NotImplementedError, match=r'call it by mmlocalmamba\.ops'):
        torch.func.grad(lambda w: torch.ops.mmlocalmamba.linear(x, w, None).sum())(weight)


@every_case
@pytest.mark.slow
def test_second_derivatives_of_the_reference(case, monkeypatch):
    """The environment variable names the reference for all ops of a model."""
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'reference')
    function, inputs = positional(case)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_backward_ad=False)
    assert torch.autograd.gradgradcheck(function, inputs)


@every_case
def test_the_way_out_of_a_missing_second_derivative(case, backend, monkeypatch):
    """A missing second derivative is an error that names a remedy, and the remedy works: as environment variable and as
    argument."""
    function, inputs = positional(case)
    inputs = [x.requires_grad_() for x in inputs]

    def penalty():
        y = function(*inputs)
        grads = torch.autograd.grad((y * randn(*y.shape, seed=8)).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), inputs, allow_unused=True)

    # These are plain PyTorch, or their backward passes consist of differentiable operations.
    able = backend == 'reference' or not case.startswith('scan') and (
        backend == 'chunked' or case in ('linear', 'linear-per-direction', 'add_rms_norm'))
    if able:
        ours = penalty()
    else:
        with pytest.raises(NotImplementedError, match="backend='reference', or MMLOCALMAMBA_BACKEND=reference"):
            penalty()
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'reference')
    expected = penalty()
    if able:
        torch.testing.assert_close(ours, expected)
    monkeypatch.setenv(ops.BACKEND_VARIABLE, backend)
    name = case.split('-')[0]
    name = dict(scan='directional_scan', conv='directional_conv').get(name, name)
    monkeypatch.setattr(ops, name, partial(getattr(ops, name), backend='reference'))
    for ours, theirs in zip(penalty(), expected, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize('backbone', ['LocalVim', 'LocalVMamba'])
def test_second_derivatives_of_a_model(backbone, monkeypatch):
    """With the reference, a Hessian times a vector equals differences of gradients."""
    backbones = pytest.importorskip('mmlocalmamba.backbones')
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'reference')
    torch.manual_seed(0)
    arch, more = dict(LocalVim=(dict(embed_dims=8, num_layers=2, d_state=2),
                                dict(img_size=8, patch_size=4, out_type='featmap')),
                      LocalVMamba=(dict(embed_dims=[8], depths=[1], d_state=2), {}))[backbone]
    model = getattr(backbones, backbone)(arch=arch, directions=['h', 'w2_flip'], out_indices=(0, ), **more)
    model.double().eval()
    image, vector = randn(1, 3, 8, 8), randn(1, 3, 8, 8, seed=1)

    def gradient(x, create_graph=False):
        return torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=create_graph)[0]

    x = image.clone().requires_grad_()
    ours, = torch.autograd.grad((gradient(x, True) * vector).sum(), x)
    step = 1e-5
    there, back = (gradient((image + sign * step * vector).requires_grad_()) for sign in (1, -1))
    torch.testing.assert_close(ours, (there - back) / (2 * step), rtol=1e-5, atol=1e-6)


@every_case
def test_torch_func(case, backend):
    """Test grad, grad of each sample under vmap, and vmap of the function."""
    function, inputs = positional(case)
    weights = randn(*function(*inputs).shape, seed=5)
    cotangent = weights.flatten()

    def loss(*inputs):
        return (function(*inputs).flatten() * cotangent).sum()

    every = tuple(range(len(inputs)))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for ours, theirs in zip(torch.func.grad(loss, every)(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    samples = torch.stack([inputs[0], 2 * inputs[0], inputs[0] - 1])
    in_dims = (0, *[None] * (len(inputs) - 1))
    together = torch.func.vmap(torch.func.grad(loss, every), in_dims)(samples, *inputs[1:])
    alone = [torch.func.grad(loss, every)(sample, *inputs[1:]) for sample in samples]
    for ours, theirs in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))
    torch.testing.assert_close(torch.func.vmap(function, in_dims)(samples, *inputs[1:]),
                               torch.stack([function(sample, *inputs[1:]) for sample in samples]))


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.slow
def test_chunked_compiles_as_one_graph(grad):
    torch._dynamo.reset()
    _, inputs = scan_case()
    leaves = {name: x.detach().requires_grad_(grad) for name, x in inputs.items()}

    def scan(**x):
        return ops.directional_scan(**x, tables=TABLES, backend='chunked')

    with torch.set_grad_enabled(grad):
        results = []
        for function in (scan, torch.compile(scan, fullgraph=True, backend='aot_eager')):
            y = function(**leaves)
            results.append([y, *(torch.autograd.grad(y.square().sum(), list(leaves.values())) if grad else ())])
    torch.testing.assert_close(*results)


@every_case
@pytest.mark.slow
def test_every_op_compiles_as_one_graph(case, backend):
    """Also without gradients, and with the gradients of eager code."""
    torch._dynamo.reset()
    function, inputs = positional(case)
    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for run in (function, compiled):
        y = run(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results)


class Calls(TorchDispatchMode):
    """Record the operators that run, and their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.name().removeprefix('mmlocalmamba::'), args))
        return func(*args, **(kwargs or {}))


@built
@every_case
def test_frozen_tensors_cost_no_gradient(case, monkeypatch):
    """If one tensor requires a gradient, the operators compute only this gradient, with the same value."""
    monkeypatch.setenv(ops.BACKEND_VARIABLE, 'cpu')
    function, inputs = positional(case)
    expected = torch.autograd.grad(function(*[x.requires_grad_() for x in inputs]).square().sum(), inputs)
    for i, exact in enumerate(expected):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        y = function(*leaves).square().sum()
        with Calls() as calls:
            grad, = torch.autograd.grad(y, [leaves[i]])
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-12)
        asked = [args[-1] for name, args in calls.seen if name.endswith('_backward') and '::' not in name
                 and name != 'linear_gelu_backward']
        assert all(sum(wanted) == 1 for wanted in asked), asked
        assert len(asked) == (0 if case.startswith(('linear', 'add_rms_norm')) else 1)
        products = [name for name, _ in calls.seen if name == 'linear']
        if case == 'scan-low-rank':  # of the factor, or of the weight for each direction
            assert len(products) == {'delta': 1, 'dt_weight': len(DIRECTIONS)}.get(list(CASES[case]()[1])[i], 0)
        if case.startswith('scattn'):  # no product for the weights of another layer
            matrices = sum(name == 'aten::mm' for name, _ in calls.seen)
            assert matrices <= 3


@built
def test_backward_operators_read_nothing_out_of_bounds():
    """A tensor of a wrong shape is an error, not a read beyond its end."""
    function, inputs = CASES['scattn_sum']()
    saved = torch.ops.mmlocalmamba.scattn_sum(*list(inputs.values())[:4], 1e-5, *list(inputs.values())[4:])
    y, z, norm_weight, norm_bias, reduce_weight, _, select_weight, _ = inputs.values()
    good = dict(grad=saved[0], y=y, z=z, norm_weight=norm_weight, norm_bias=norm_bias, reduce_weight=reduce_weight,
                select_weight=select_weight, average=saved[1], mean=saved[2], inverse=saved[3], reduced=saved[4],
                gate=saved[5])
    operator = torch.ops.mmlocalmamba.scattn_sum_backward
    operator(*good.values(), [True] * 8)
    for name, x in good.items():
        for dim in range(x.dim()):
            with pytest.raises(ValueError, match='must have shape'):
                operator(*{**good, name: x.narrow(dim, 0, x.shape[dim] - 1)}.values(), [True] * 8)
        with pytest.raises(TypeError, match='must be'):
            operator(*{**good, name: x.float()}.values(), [True] * 8)
    with pytest.raises(ValueError, match='there is no z'):
        operator(*{**good, 'z': None}.values(), [True] * 8)


@built
@pytest.mark.parametrize('row', [[0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, -1], [5, 4, 3, 2, 1, -1]], ids=str)
def test_a_table_that_is_no_permutation_is_refused(row):
    """Such a table would leave rows of the output unwritten."""
    tables = ScanTables(torch.tensor([list(range(6)), row], dtype=torch.int32),
                        torch.arange(6, dtype=torch.int32).repeat(2, 1))
    x = torch.ones(1, 6, 3)
    with pytest.raises(ValueError, match='row 1 of src must hold each of the 6 tokens once'):
        ops.directional_conv(x, torch.ones(2, 3, 4), None, tables, backend='cpu')
    ones = torch.ones(1, 2, 6, 3)
    with pytest.raises(ValueError, match='row 1 of src must hold each of the 6 tokens once'):
        ops.directional_scan(x, ones, -torch.ones(2, 3, 3), ones, ones, tables=tables, backend='cpu')
