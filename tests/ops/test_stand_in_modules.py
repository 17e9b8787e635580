"""Modules, norms and extensions of mmlocalmamba.ops.stand_ins against definitions in float64: shapes, strides, dtypes,
None arguments and gradients, as the packages document them. tests/ops/test_other_repositories.py runs real code."""
import inspect
from functools import partial

import pytest
import torch
from test_causal_conv1d import close
from test_causal_conv1d import definition as convolution
from test_stand_ins import exact, scan_definition
from torch import nn
from torch.nn import functional as F

from mmlocalmamba.ops import stand_ins
from mmlocalmamba.ops.stand_ins import extensions, mamba_modules

B, D, N, L = 2, 6, 4, 9


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def gradients(function, leaves):
    """Outputs of the function, and gradients of their weighted sum."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    y = function(**leaves)
    ys = y if isinstance(y, tuple | list) else (y, )
    total = sum((t.double() * torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape)).sum() for t in ys)
    return ys, dict(zip(leaves, torch.autograd.grad(total, leaves.values())))


def same(ours, definition, leaves, tolerance=1e-10):
    ys, grads = gradients(ours, leaves)
    expected, exact_grads = gradients(definition, {name: x.double() for name, x in leaves.items()})
    assert len(ys) == len(expected)
    for i, (y, right) in enumerate(zip(ys, expected)):
        close(y, right, tolerance, f'output {i}')
    for name, x in leaves.items():
        assert grads[name].dtype == x.dtype, name
        close(grads[name], exact_grads[name], tolerance, f'gradient of {name}')
    return ys


# ---- norms ----

def norm_definition(rms, x, weight, bias=None, residual=None, x1=None, weight1=None, bias1=None, rowscale=None,
                    eps=1e-6, prenorm=False):
    total = x if rowscale is None else x * rowscale[..., None]
    total = total if x1 is None else total + x1
    total = total if residual is None else total + residual

    def norm(weight, bias):
        centred = total if rms else total - total.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        return y if bias is None else y + bias

    ys = [norm(weight, bias), *([] if weight1 is None else [norm(weight1, bias1)]), *([total] if prenorm else [])]
    return ys[0] if len(ys) == 1 else tuple(ys)


@pytest.mark.parametrize('rms', [False, True])
@pytest.mark.parametrize('names', [(), ('bias', ), ('residual', ), ('bias', 'residual'), ('rowscale', 'residual'),
                                   ('x1', 'weight1', 'residual'), ('x1', 'weight1', 'bias', 'bias1')], ids=str)
@pytest.mark.parametrize('prenorm', [False, True])
def test_norms(rms, names, prenorm):
    torch.manual_seed(0)
    shapes = dict(bias=(D, ), residual=(B, L, D), rowscale=(B, L), x1=(B, L, D), weight1=(D, ), bias1=(D, ))
    leaves = dict(x=randn(B, L, D), weight=randn(D), **{name: randn(*shapes[name]) for name in names})
    options = dict(eps=1e-2, prenorm=prenorm)
    function = stand_ins.rms_norm_fn if rms else stand_ins.layer_norm_fn
    same(lambda **x: function(**{'bias': None, **x}, **options), lambda **x: norm_definition(rms, **x, **options),
         leaves)
    reference = stand_ins.rms_norm_ref if rms else stand_ins.layer_norm_ref
    same(lambda **x: reference(**{'bias': None, **x}, **options), lambda **x: norm_definition(rms, **x, **options),
         leaves)
    if rms:
        ours, right = (stand_ins.layer_norm_fn(**{'bias': None, **leaves}, **options, is_rms_norm=True),
                       stand_ins.rms_norm_fn(**{'bias': None, **leaves}, **options))
        assert all(torch.equal(a, b) for a, b in zip(ours, right))


@pytest.mark.parametrize('rms', [False, True])
@pytest.mark.parametrize('stream', [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('in_fp32', [False, True])
def test_the_stream_has_its_own_dtype(rms, stream, in_fp32):
    torch.manual_seed(0)
    x, weight = randn(B, L, D, dtype=torch.bfloat16), randn(D, dtype=torch.float32)
    residual = None if stream is None else randn(B, L, D, dtype=stream)
    y, total = stand_ins.layer_norm_fn(x, weight, None, residual, prenorm=True, residual_in_fp32=in_fp32,
                                       is_rms_norm=rms)
    assert y.dtype == torch.bfloat16
    assert total.dtype == (stream or (torch.float32 if in_fp32 else torch.bfloat16))
    right, right_total = norm_definition(rms, x.double(), weight.double(), prenorm=True,
                                         residual=None if residual is None else residual.double())
    close(y, right, 5e-3)  # the norm is of the sum before it is rounded
    close(total, right_total, 1e-6 if total.dtype == torch.float32 else 5e-3)


def test_dropout_of_norms():
    torch.manual_seed(0)
    x, x1, weight = torch.ones(1, 50, 40), 2 * torch.ones(1, 50, 40), torch.ones(40)
    y, total, mask, mask1 = stand_ins.rms_norm_fn(x, weight, None, x1=x1, dropout_p=0.25, prenorm=True,
                                                  return_dropout_mask=True)
    assert mask.dtype == mask1.dtype == torch.bool and mask.shape == mask1.shape == x.shape
    assert 0.7 < mask.float().mean() < 0.8 and 0.7 < mask1.float().mean() < 0.8 and not torch.equal(mask, mask1)
    torch.testing.assert_close(total, (mask + 2 * mask1) / 0.75)
    again = stand_ins.rms_norm_ref(x, weight, None, x1=x1, dropout_p=0.25, dropout_mask=mask, dropout_mask1=mask1)
    assert torch.equal(again, y)
    y, mask, mask1 = stand_ins.layer_norm_fn(x, weight, None, return_dropout_mask=True)
    assert mask is mask1 is None
    norm = stand_ins.RMSNorm(40, dropout_p=0.5)
    assert not torch.equal(norm(torch.randn(3, 40)) == 0, torch.zeros(3, 40) == 1)
    assert (norm.eval()(torch.randn(3, 40)) != 0).all()


@pytest.mark.parametrize('change,error,message', [
    (dict(weight=torch.ones(3)), ValueError, r'weight must have shape \(C,\) = \(4,\), got \(3,\)'),
    (dict(residual=torch.ones(2, 4)), ValueError, "residual must have shape x's shape"),
    (dict(rowscale=torch.ones(4)), ValueError, 'rowscale must have shape'),
    (dict(x1=torch.ones(3, 4), rowscale=torch.ones(3)), ValueError, 'rowscale must be None with x1'),
    (dict(dropout_p=1.0), ValueError, 'dropout_p must be at least 0 and below 1, got 1.0'),
    (dict(x=torch.ones(3, 4).int()), TypeError, 'x must be a floating point tensor'),
])
def test_bad_norms(change, error, message):
    with pytest.raises(error, match=message):
        stand_ins.layer_norm_fn(**{'x': torch.ones(3, 4), 'weight': torch.ones(4), 'bias': None, **change})


# ---- layers ----

KEYS = ['A_log', 'D', 'in_proj.weight', 'conv1d.weight', 'conv1d.bias', 'x_proj.weight', 'dt_proj.weight',
        'dt_proj.bias']
BACK = ['conv1d_b.weight', 'conv1d_b.bias', 'x_proj_b.weight', 'dt_proj_b.weight', 'dt_proj_b.bias']
ACROSS = [name.replace('_b.', '_s.') for name in BACK]
LAYERS = {
    'none': ({}, KEYS),
    'v1': (dict(bimamba_type='v1'), ['A_log', 'D', 'A_b_log', *KEYS[2:]]),
    'v2': (dict(bimamba_type='v2'), ['A_log', 'D', 'A_b_log', 'D_b', *KEYS[2:], *BACK]),
    'divided': (dict(bimamba_type='v2', if_divide_out=True, init_layer_scale=0.5),
                ['gamma', 'A_log', 'D', 'A_b_log', 'D_b', *KEYS[2:], *BACK]),
    'bimamba': (dict(bimamba=True), ['A_log', 'D', 'A_b_log', 'D_b', *KEYS[2:], *BACK]),
    'v3': (dict(bimamba_type='v3', nslices=3),
           ['A_log', 'D', 'A_b_log', 'D_b', 'A_s_log', 'D_s', *KEYS[2:], *BACK, *ACROSS]),
}
each_layer = pytest.mark.parametrize('kind', LAYERS)


def layer_definition(x, options, weights):
    """The layer from its weights, one direction after the other."""
    def w(name):
        return weights.get(name)

    def direction(xz, suffix, A):
        x, z = xz.chunk(2, dim=1)
        x = convolution(x, w(f'conv1d{suffix}.weight')[:, 0], w(f'conv1d{suffix}.bias'), 'silu')
        rank = w(f'dt_proj{suffix}.weight').shape[1]
        dt, b, c = (x.transpose(1, 2) @ w(f'x_proj{suffix}.weight').T).split([rank, N, N], dim=-1)
        dt = (dt @ w(f'dt_proj{suffix}.weight').T).transpose(1, 2)
        return x, dt, b.mT, c.mT, z, scan_definition(x, dt, A, b.mT, c.mT, w(f'D{suffix}'), z,
                                                     w(f'dt_proj{suffix}.bias'), True)[0]

    kind = 'v2' if options.get('bimamba') else options.get('bimamba_type', 'none')
    xz = (x @ w('in_proj.weight').T).transpose(1, 2)
    *parts, y = direction(xz, '', -w('A_log').exp())
    if kind == 'v1':
        u, dt, b, c, z = (part.flip(-1) for part in parts)
        y = y + scan_definition(u, dt, -w('A_b_log').exp(), b, c, w('D'), z, w('dt_proj.bias'), True)[0].flip(-1)
    if kind in ('v2', 'v3'):
        y = y + direction(xz.flip(-1), '_b', -w('A_b_log').exp())[-1].flip(-1)
    if kind == 'v3':
        slices = options['nslices']
        order = torch.arange(x.shape[1]).view(slices, -1).T.flatten()  # the first of each slice, the second ...
        across = direction(xz[..., order], '_s', -w('A_s_log').exp())[-1]
        y = y + torch.zeros_like(across).index_copy(-1, order, across)
    y = y / 2 if options.get('if_divide_out') else y
    y = y.transpose(1, 2) @ w('out_proj.weight').T
    return y if w('gamma') is None else y * w('gamma')


@each_layer
def test_layers(kind):
    options, keys = LAYERS[kind]
    torch.manual_seed(0)
    layer = stand_ins.Mamba(8, d_state=N, expand=1.5, **options)
    assert list(layer.state_dict()) == [*keys, 'out_proj.weight']
    assert layer.d_inner == 12 and layer.dt_rank == 1
    layer.double()
    x, weights = randn(B, L, 8), {name: 0.4 * randn(*p.shape) for name, p in layer.named_parameters()}
    same(lambda x, **weights: torch.func.functional_call(layer, weights, x),
         lambda x, **weights: layer_definition(x, options, weights), {'x': x, **weights})
    assert torch.equal(layer(x, T=4), layer(x))  # VideoMamba's argument


def test_initial_weights():
    torch.manual_seed(0)
    layer = stand_ins.Mamba(32, dt_init='constant', dt_scale=2., dt_min=0.01, dt_max=0.2, init_layer_scale=0.1,
                            bimamba_type='v2')
    torch.testing.assert_close(layer.dt_proj.weight, torch.full((64, 2), 2 ** 0.5))
    steps = F.softplus(layer.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.02 and 0.1 < steps.max() < 0.201
    for A_log in (layer.A_log, layer.A_b_log):
        torch.testing.assert_close(A_log.exp(), torch.arange(1., 17).repeat(64, 1))
    assert (layer.D == 1).all() and (layer.D_b == 1).all() and (layer.gamma == 0.1).all()
    marked = {name for name, p in layer.named_parameters() if hasattr(p, '_no_weight_decay')}
    assert marked == {'A_log', 'A_b_log', 'D', 'D_b'}
    assert layer.dt_proj.bias._no_reinit and not hasattr(layer.dt_proj_b.bias, '_no_reinit')
    half = stand_ins.Mamba(32, dtype=torch.bfloat16, device='meta')
    assert half.in_proj.weight.dtype == torch.bfloat16 and half.A_log.dtype == half.D.dtype == torch.float32
    assert half.A_log.device.type == 'meta'


def test_token_by_token():
    torch.manual_seed(0)
    layer, x = stand_ins.Mamba(8, d_state=N, layer_idx=3).double(), randn(B, L, 8)
    for first in (2, 6):  # fewer and more tokens than taps
        params = stand_ins.InferenceParams(max_seqlen=L, max_batch_size=B)
        with torch.no_grad():
            steps = [layer(x[:, :first], inference_params=params)]
            conv_state, ssm_state = params.key_value_memory_dict[3]
            for t in range(first, L):
                params.seqlen_offset = t
                steps.append(layer(x[:, t:t + 1], inference_params=params))
        close(torch.cat(steps, dim=1), layer(x), 1e-10)
        assert params.key_value_memory_dict[3][0] is conv_state and conv_state.shape == (B, 16, 4)
        close(conv_state, (x[:, -4:] @ layer.in_proj.weight.T).mT[:, :16], 1e-12)
        assert ssm_state.shape == (B, 16, N)
    params.reset(4, 2)
    assert params.seqlen_offset == 0 and params.max_seqlen == 4
    conv_state, ssm_state = layer.allocate_inference_cache(5, 99, dtype=torch.bfloat16)
    assert conv_state.shape == (5, 16, 4) and ssm_state.shape == (5, 16, N) and conv_state.dtype == torch.bfloat16
    assert not conv_state.any() and not ssm_state.any()


@pytest.mark.parametrize('options,call,error,message', [
    (dict(bimamba_type='v4'), {}, ValueError, "unknown bimamba_type 'v4': known are none, v1, v2, v3"),
    (dict(dt_init='zero'), {}, NotImplementedError, "dt_init must be 'random' or 'constant', got 'zero'"),
    (dict(bimamba_type='v3', nslices=4), {}, ValueError, '9 tokens cannot be split into 4 slices'),
    (dict(bimamba_type='v2', layer_idx=0), dict(inference_params=stand_ins.InferenceParams(9, 2)),
     NotImplementedError, 'cannot continue it step by step'),
    ({}, dict(inference_params=stand_ins.InferenceParams(9, 2)), ValueError, 'layer_idx must be given'),
    (dict(layer_idx=0), dict(inference_params=stand_ins.InferenceParams(9, 2, 5)), ValueError, 'one token at a time'),
])
def test_bad_layers(options, call, error, message):
    with pytest.raises(error, match=message):
        stand_ins.Mamba(8, **options)(torch.ones(B, L, 8), **call)


@pytest.mark.parametrize('norm', [nn.LayerNorm, stand_ins.RMSNorm])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('mlp', [False, True])
def test_blocks(norm, fused, mlp):
    torch.manual_seed(0)
    mixer = partial(stand_ins.Mamba, d_state=N)
    block = (stand_ins.Block(8, mixer, partial(nn.Linear, 8), norm, fused, True) if mlp else
             mamba_modules.BlockV1(8, mixer, norm_cls=norm, fused_add_norm=fused, residual_in_fp32=True))
    children = [name for name, _ in block.named_children()]
    assert children == (['norm', 'mixer', 'norm2', 'mlp'] if mlp else ['mixer', 'norm'])
    assert list(inspect.signature(mamba_modules.BlockV1).parameters)[2] == 'norm_cls'
    block.double()
    x, residual = randn(B, L, 8), randn(B, L, 8)
    for given in (None, residual):
        y, stream = block(x, given)
        total = x if given is None else x + given
        rms = norm is stand_ins.RMSNorm
        right = block.mixer(norm_definition(rms, total, block.norm.weight, block.norm.bias, eps=block.norm.eps))
        if mlp:
            total = total + right
            right = block.mlp(norm_definition(rms, total, block.norm2.weight, block.norm2.bias, eps=block.norm2.eps))
        close(y, right, 1e-10)
        close(stream, total, 1e-12)
    assert block.bfloat16()(x.bfloat16())[1].dtype == torch.float32
    assert block.allocate_inference_cache(3, 5)[1].shape == (3, 16, N)


def test_a_fused_block_needs_a_norm():
    with pytest.raises(TypeError, match='fused_add_norm needs LayerNorm or RMSNorm, got BatchNorm1d'):
        stand_ins.Block(8, stand_ins.Mamba, nn.Identity, nn.BatchNorm1d, fused_add_norm=True)


# ---- extensions ----

def scan_tensors(dtype, groups=2, delta_width=D):
    torch.manual_seed(0)
    return dict(u=randn(B, D, L, dtype=dtype), delta=0.5 * torch.rand(B, delta_width, L).to(dtype),
                A=-torch.rand(D, N).to(torch.promote_types(dtype, torch.float32)),
                B=randn(B, groups, N, L, dtype=dtype), C=randn(B, groups, N, L, dtype=dtype),
                D=torch.randn(D).to(torch.promote_types(dtype, torch.float32)),
                delta_bias=torch.rand(delta_width).to(torch.promote_types(dtype, torch.float32)))


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
each_dtype = pytest.mark.parametrize('dtype', TOLERANCE, ids=str)


@each_dtype
@pytest.mark.parametrize('has_z', [False, True])
@pytest.mark.parametrize('constant', [False, True])
def test_selective_scan_cuda(dtype, has_z, constant):
    x = scan_tensors(dtype)
    if constant:
        x['B'], x['C'] = (randn(D, N, dtype=x['A'].dtype) for _ in range(2))
    z = randn(B, D, L, dtype=dtype) if has_z else None
    scan, more = ('u', 'delta', 'A', 'B', 'C', 'D'), dict(z=z) if has_z else {}
    fwd, bwd = extensions.selective_scan_cuda.fwd, extensions.selective_scan_cuda.bwd
    out, saved, *rest = fwd(*(x[name] for name in scan), z, x['delta_bias'], True)
    right, last = scan_definition(**x, delta_softplus=True)
    close(out, right, TOLERANCE[dtype])
    assert saved.shape == (B, D, 1, 2 * N) and saved.is_contiguous() and saved.dtype == x['A'].dtype
    close(saved[:, :, -1, 1::2], last, TOLERANCE[dtype])
    assert len(rest) == has_z and out.dtype == dtype and not out.requires_grad

    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    _, grads = gradients(lambda **x: scan_definition(**x, delta_softplus=True)[0],
                         {name: exact(tensor) for name, tensor in {**x, **more}.items()})
    both = torch.full((B, 2 * D, L), 7., dtype=dtype)
    found = bwd(*(x[name] for name in scan), z, x['delta_bias'], dout, saved, out if has_z else None,
                both[:, D:] if has_z else None, True, has_z)
    assert len(found) == (9 if has_z else 7)
    for name, grad in zip((*scan, 'delta_bias', 'z'), found):
        assert grad.dtype == (z if name == 'z' else x[name]).dtype
        close(grad, grads[name], 2 * TOLERANCE[dtype], name)
    if has_z:
        close(rest[0], scan_definition(**x, **more, delta_softplus=True)[0], TOLERANCE[dtype])
        close(found[8], rest[0], 2e-2 if dtype == torch.bfloat16 else 1e-6)
        assert torch.equal(both[:, D:], found[7]) and (both[:, :D] == 7).all()  # in place
        assert bwd(*(x[name] for name in scan), z, x['delta_bias'], dout, saved, out, None, True, False)[7] is not both
    with pytest.raises(TypeError, match='positional'):
        fwd(**x, z=z, delta_softplus=True)


def test_scan_extensions_without_what_may_be_none():
    x = scan_tensors(torch.float64, groups=1)
    names = ('u', 'delta', 'A', 'B', 'C')
    out, saved = extensions.selective_scan_cuda.fwd(*(x[name] for name in names), None, None, None, False)
    dout = torch.ones_like(out)
    grads = extensions.selective_scan_cuda.bwd(*(x[name] for name in names), None, None, None, dout, saved, None, None,
                                               False, False)
    assert [grad is None for grad in grads] == [False] * 5 + [True] * 2
    core = extensions.selective_scan_cuda_core
    again, _ = core.fwd(*(x[name] for name in names), None, None, False, 1)
    assert torch.equal(again, out)
    assert [grad is None for grad in core.bwd(*(x[name] for name in names), None, None, dout, None, False, 1)] == [
        False] * 5 + [True] * 2
    long = [torch.ones(1, 2, 2049), torch.ones(1, 2, 2049), -torch.ones(2, N), *2 * [torch.ones(1, 1, N, 2049)]]
    assert core.fwd(*long, None, None, False, 1)[1].shape == (1, 2, 2, 2 * N)


@each_dtype
@pytest.mark.parametrize('out_float', [False, True])
@pytest.mark.parametrize('delta_width', [D, 2])
def test_vmambas_extensions(dtype, out_float, delta_width):
    x = scan_tensors(dtype, delta_width=delta_width)
    order = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
    tensors = [x[name] for name in order]

    def definition(delta, delta_bias, **x):
        repeats = D // delta_width
        return scan_definition(**x, delta=delta.repeat_interleave(repeats, dim=1), delta_softplus=True,
                               delta_bias=delta_bias.repeat_interleave(repeats))[0]

    oflex = extensions.selective_scan_cuda_oflex
    out, saved = oflex.fwd(*tensors, True, 1, out_float)
    assert out.dtype == (torch.promote_types(dtype, torch.float32) if out_float else dtype)
    right, grads = gradients(definition, {name: exact(tensor) for name, tensor in x.items()})
    close(out, right[0], 1e-5 if out_float else TOLERANCE[dtype])
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    for name, grad in zip(order, oflex.bwd(*tensors, dout, saved, True, 1), strict=True):
        assert grad.dtype == x[name].dtype and grad.shape == x[name].shape
        close(grad, grads[name], 2 * TOLERANCE[dtype], name)
    if not out_float:
        for ours, right in zip(extensions.selective_scan_cuda_core.fwd(*tensors, True, 1), (out, saved)):
            assert torch.equal(ours, right)


@pytest.mark.parametrize('version', ['1.0', '1.1', '1.2', '1.6'])
@pytest.mark.parametrize('has_bias,silu', [(False, False), (True, True)])
def test_causal_conv1d_cuda(version, has_bias, silu):
    torch.manual_seed(0)
    extension = extensions.causal_conv1d_cuda
    x, weight, bias = randn(B, 2 * D, L)[:, :D], randn(D, 4), randn(D) if has_bias else None
    leaves = dict(x=x, weight=weight, **(dict(bias=bias) if has_bias else {}))
    (right, ), grads = gradients(lambda **x: convolution(**x, activation='silu' if silu else None), leaves)
    dout = torch.linspace(-1, 1, right.numel(), dtype=torch.float64).view(right.shape)
    both = torch.full((B, 2 * D, L), 7., dtype=torch.float64)
    dx = both[:, :D]
    if version == '1.6':
        out = torch.empty_like(x)
        assert extension.causal_conv1d_fwd(x, weight, bias, None, None, out, None, silu) is None
        found = [dx, torch.zeros_like(weight), torch.zeros_like(bias) if has_bias else None, None]
        assert extension.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, *found, silu) is None
    else:
        middle = {'1.0': (), '1.1': (None, ), '1.2': (None, None, None)}[version]
        out = extension.causal_conv1d_fwd(x, weight, bias, *middle, silu)
        more = (False, ) if version == '1.2' else ()
        found = extension.causal_conv1d_bwd(x, weight, bias, dout, *middle, dx, *more, silu)
        assert len(found) == (4 if version == '1.2' else 3)
    close(out, right, 1e-12)
    for name, grad in zip(leaves, found):
        close(grad, grads[name], 1e-12, name)
    assert (found[2] is not None) == has_bias and (len(found) == 3 or found[3] is None)
    close(dx, grads['x'], 1e-12)
    assert (both[:, D:] == 7).all()
    state = randn(B, D, 5)
    right_state = state.clone()
    right = stand_ins.causal_conv1d_update(x[..., 0], right_state, weight, bias, 'silu' if silu else None)
    if version == '1.6':
        out = torch.empty_like(x[..., 0])
        assert extension.causal_conv1d_update(x[..., 0], state, weight, bias, out, silu, None, None) is None
    else:
        out = extension.causal_conv1d_update(x[..., 0], state, weight, bias, silu, *([] if version < '1.2' else [None]))
    assert torch.equal(out, right) and torch.equal(state, right_state)


def test_convolutions_with_states():
    """The functions of causal_conv1d.cpp_functions, which mamba_ssm 2.3 calls."""
    torch.manual_seed(0)
    x, weight, bias, before = randn(B, D, L), randn(D, 4), randn(D), randn(B, D, 3)

    def definition(x, weight, bias, before):
        return convolution(x, weight, bias, 'silu', before), torch.cat([before, x], dim=-1)[..., -3:]

    leaves = dict(x=x, weight=weight, bias=bias, before=before)
    (right, right_final), grads = gradients(definition, leaves)
    final = torch.zeros(B, D, 3, dtype=torch.float64)
    out = stand_ins.causal_conv1d_fwd_function(x, weight, bias, None, before, final, True)
    close(out, right, 1e-12)
    close(final, right_final, 0)
    dout, dfinal = (torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape) for y in (out, final))
    found = stand_ins.causal_conv1d_bwd_function(x, weight, bias, dout, None, before, dfinal, None, True, True)
    for name, grad in zip(leaves, found, strict=True):
        close(grad, grads[name], 1e-12, name)
    assert stand_ins.causal_conv1d_bwd_function(x, weight, None, dout, None, before, None, None, False, True)[2:] == (
        None, None)
    state = randn(B, D, 3)
    right = stand_ins.causal_conv1d_update(x[..., 0], state.clone(), weight, bias, 'silu')
    assert torch.equal(stand_ins.causal_conv1d_update_function(x[..., 0], state, weight, bias, True, None, None), right)


def test_gradients_of_several_sequences():
    torch.manual_seed(0)
    leaves = dict(x=randn(B, D, L), weight=randn(D, 4), bias=randn(D))
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1], [-1, 3, 3, 3, 3, 3, 4, 4, 4]])
    (y, ), grads = gradients(lambda **x: stand_ins.causal_conv1d_fn(**x, seq_idx=seq_idx, activation='silu'), leaves)
    dout = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    found = extensions.causal_conv1d_cuda.causal_conv1d_bwd(*leaves.values(), dout, seq_idx, None, True)
    for name, grad in zip(leaves, found, strict=True):
        close(grad, grads[name], 1e-12, name)


def test_wrong_numbers_of_arguments():
    x, weight = torch.ones(1, 2, 3), torch.ones(2, 4)
    extension = extensions.causal_conv1d_cuda
    for name, args in (('causal_conv1d_fwd', (x, weight, None, None, None, True)),
                       ('causal_conv1d_bwd', (x, weight, None, x, None, None, None, True)),
                       ('causal_conv1d_update', (x, x, weight, None, True, None, None, None, None))):
        with pytest.raises(TypeError, match=f'causal_conv1d_cuda.{name} of causal_conv1d 1.0 to 1.7 takes no'):
            getattr(extension, name)(*args)
    with pytest.raises(ValueError, match='out must be given with z'):
        extensions.selective_scan_cuda.bwd(x, x, -torch.ones(2, 1), *2 * [torch.ones(1, 1, 1, 3)], None, x, None, x,
                                           None, None, None, False, False)


def test_the_activation_may_be_the_fourth_argument():
    """As causal_conv1d 1.0 has it, and VideoMamba's and SegMamba's layers call it."""
    x, weight, bias = randn(B, D, L), randn(D, 4), randn(D)
    close(stand_ins.causal_conv1d_fn(x, weight, bias, 'silu'), convolution(x, weight, bias, 'silu'), 1e-12)
