"""What other packages do to a model: hook, wrap, prune, quantise, shard, trace and count it.

Fused kernels read the weights of a module without calling it. Whatever somebody has done to the module must have its
effect all the same.
"""
import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from mmlocalmamba import table_cache
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.layers.ssm import DirectionalSSM
from mmlocalmamba.ops.flops import TOTALS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Two blocks have every kind of place that nano models have; one more costs time.
BACKBONES = {
    'vim': lambda: LocalVim(dict(embed_dims=16, num_layers=2, d_state=2), img_size=16, patch_size=4,
                            directions=['h', 'w2_flip'], drop_path_rate=0.),
    'vmamba': lambda: LocalVMamba(dict(embed_dims=[16, 24], depths=[1, 1], d_state=2), patch_size=4,
                                  directions=['h', 'w2_flip'], drop_path_rate=0.),
    'vmamba_v2': lambda: LocalVMamba(
        dict(embed_dims=[16, 24], depths=[1, 1], d_state=1, gate=False, conv_bias=False, mlp_ratio=2.,
             patch_embed='conv', downsample='conv'), patch_size=4, directions=['h', 'w2_flip'], drop_path_rate=0.)}
each_backbone = pytest.mark.parametrize('kind', BACKBONES)
each_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: str(dtype).removeprefix('torch.'))


def build(kind):
    """Return a backbone in which every leaf has a visible effect."""
    torch.manual_seed(0)
    model = BACKBONES[kind]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 if '.scattn.' in name else .3)
    return model


def image():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def run(model, dtype=torch.float32, backward=True):
    model = model.to(dtype)
    x = image().to(dtype).requires_grad_()
    out = model(x)[-1]
    if backward:
        out.float().square().sum().backward()
    return out.detach().float()


def leaves(kind):
    """Return the names of modules with parameters of their own, one of each kind of place."""
    places = {}
    for name, module in BACKBONES[kind]().named_modules():
        if name and next(module.parameters(recurse=False), None) is not None and not list(module.children()):
            places.setdefault(re.sub(r'\d+', '*', name), name)
    return list(places.values())


def parts(kind):
    """Return the names of modules that a forward pass calls, one of each kind of place."""
    places = {}
    for name, module in BACKBONES[kind]().named_modules():
        if name and not isinstance(module, nn.ModuleList) and not name.endswith('drop_path'):
            places.setdefault(re.sub(r'\d+', '*', name), name)
    return list(places.values())


# ---- calls ----

class Wrapped(nn.Module):
    """What adapters such as LoRA put in the place of a module."""

    def __init__(self, base, seen):
        super().__init__()
        self.base, self.seen = base, seen

    def forward(self, *args):
        self.seen()
        return self.base(*args)


def replace(model, name, new):
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, new)


def give_forward(model, name, seen):
    module = model.get_submodule(name)
    forward = module.forward

    def counted(*args):
        seen()
        return forward(*args)

    module.forward = counted


def give_class(model, name, seen):
    module = model.get_submodule(name)

    class Counted(type(module)):
        def forward(self, *args):
            seen()
            return super().forward(*args)

    module.__class__ = Counted


def hook(kind):
    return lambda model, name, seen: getattr(model.get_submodule(name), kind)(lambda *_: seen())


WATCHES = {
    **{kind: hook(f'register_{kind}') for kind in ('forward_hook', 'forward_pre_hook', 'full_backward_hook',
                                                   'full_backward_pre_hook')},
    'forward': give_forward, 'subclass': give_class,
    'wrapper': lambda model, name, seen: replace(model, name, Wrapped(model.get_submodule(name), seen)),
}


@each_dtype
@pytest.mark.parametrize('watch', WATCHES)
@each_backbone
def test_whoever_watches_a_module_sees_its_calls(kind, watch, dtype):
    model = build(kind)
    expected, backward = run(copy.deepcopy(model), dtype, False), 'backward' in watch
    for name in leaves(kind) if watch == 'wrapper' else parts(kind):
        watched, calls = copy.deepcopy(model), []
        WATCHES[watch](watched, name, lambda calls=calls: calls.append(1))
        out = run(watched, dtype, backward)
        assert len(calls) == 1, name
        assert (out - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max(), name


@each_dtype
@each_backbone
def test_whoever_watches_all_modules_sees_every_leaf(kind, dtype):
    model, seen = build(kind), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(model, dtype, False)
    finally:
        handle.remove()
    assert {id(model.get_submodule(name)) for name in parts(kind)} <= {id(module) for module in seen}


# ---- weights ----

class Quadruple(nn.Module):
    def forward(self, x):
        return 4 * x


def change(model, name, how):
    """Change a leaf's first parameter, and return its name and effective value."""
    leaf = model.get_submodule(name)
    key = next(key for key, _ in leaf.named_parameters())
    old = getattr(leaf, key).detach().clone()
    if how == 'prune':
        prune.l1_unstructured(leaf, key, amount=.7)
        return key, old * getattr(leaf, f'{key}_mask')
    if how == 'weight_norm':
        nn.utils.weight_norm(leaf, key)
        with torch.no_grad():
            getattr(leaf, f'{key}_g').mul_(4)
    else:
        parametrize.register_parametrization(leaf, key, Quadruple())
    return key, 4 * old


@each_dtype
@pytest.mark.parametrize('how', ['prune', 'parametrize', pytest.param('weight_norm', marks=pytest.mark.filterwarnings(
    'ignore:`torch.nn.utils.weight_norm` is deprecated'))])
@each_backbone
def test_changed_weights_count(kind, how, dtype):
    model = build(kind)
    before = run(copy.deepcopy(model), dtype, False)
    for name in leaves(kind):
        plain, changed = copy.deepcopy(model), copy.deepcopy(model)
        key, value = change(changed, name, how)
        getattr(plain.get_submodule(name), key).data.copy_(value)
        expected, out = run(plain, dtype, False), run(changed, dtype)
        assert (out - expected).abs().mean() < .5 * (out - before).abs().mean(), name
        if how == 'weight_norm':
            run(changed, dtype)  # a second backward pass


# ---- tensors that hold others, as quantised and sharded weights do ----

class Halved(torch.Tensor):
    """A tensor that is kept as a half of itself. Our operators do not know it."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

    def __init__(self, half):
        self.half_of_it = half

    def __tensor_flatten__(self):
        return ['half_of_it'], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Halved(inner['half_of_it'])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function.namespace != 'mmlocalmamba'
        if function is torch.ops.aten.detach.default:
            return cls(args[0].half_of_it)
        args, kwargs = tree_map(lambda x: 2 * x.half_of_it if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


@each_dtype
@each_backbone
def test_tensors_that_hold_others(kind, dtype):
    model = build(kind).to(dtype).requires_grad_(False)
    for name in leaves(kind):
        leaf = model.get_submodule(name)
        if isinstance(leaf, DirectionalSSM):
            continue  # no layer that packages of others know
        held = copy.deepcopy(model)
        held.get_submodule(name).weight = nn.Parameter(Halved(leaf.weight / 2), requires_grad=False)
        expected, out = (each(image().to(dtype))[-1] for each in (model, held))
        assert (out - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max(), name


@each_backbone
def test_tensor_parallel(kind, tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    model = build(kind)
    expected = run(copy.deepcopy(model))
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        plan = {name: ColwiseParallel(output_layouts=Replicate()) for name, module in model.named_modules()
                if isinstance(module, nn.Linear)}
        parallelize_module(model, init_device_mesh('cpu', (1, )), plan)
        assert all(isinstance(model.get_submodule(name).weight, DTensor) for name in plan)
        torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=1e-3)
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated')
@each_backbone
def test_dynamic_quantisation_takes_every_linear_layer(kind):
    model = build(kind).eval()
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = [type(module) for module in quantised.modules() if type(module).__name__ == 'Linear']
    assert len(found) == count > 7 and set(found) == {torch.ao.nn.quantized.dynamic.Linear}
    with torch.no_grad():
        expected, out = model(image())[-1], quantised(image())[-1]
    assert 0 < (out - expected).abs().max() < .1 * expected.abs().max()


@each_backbone
def test_torchao(kind):
    torchao = pytest.importorskip('torchao.quantization', reason='needs torchao: pip install torchao')
    model = build(kind).eval()
    quantised = copy.deepcopy(model)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected, out = model(image())[-1], quantised(image())[-1]
    assert 0 < (out - expected).abs().max() < .1 * expected.abs().max()


@each_backbone
def test_peft(kind):
    peft = pytest.importorskip('peft', reason='needs peft: pip install peft')
    model = build(kind)
    expected = run(copy.deepcopy(model))
    targets = ['in_proj', 'out_proj', 'projection', 'global_reduce', 'channel_select']
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
    torch.testing.assert_close(run(adapted), expected, atol=1e-4, rtol=1e-3)
    grads = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.split('.lora_')[0].rpartition('.')[2] for name in grads} == set(targets)
    assert all(grad is not None for grad in grads.values())
    assert all(grad.abs().sum() > 0 for name, grad in grads.items() if 'lora_B' in name)


# ---- traces and counters ----

def kinds_of_nodes(model):
    graph = torch.jit.trace(model, image(), check_trace=False).inlined_graph
    return [node.kind() for node in graph.nodes()]


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:`torch.jit.trace', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('options', [{}, dict(rope='resized', img_size=32), dict(cls_token='middle', rope=False)],
                         ids=['plain', 'resized', 'token'])
@each_backbone
def test_traces_do_not_depend_on_what_was_traced_before(kind, options):
    """torch.jit.trace, as TensorBoard's add_graph uses it."""
    if kind != 'vim' and options:
        pytest.skip('options of LocalVim')
    table_cache.clear()
    arch = dict(embed_dims=16, num_layers=1, d_state=2)
    model = LocalVim(arch, **{'img_size': 16, 'patch_size': 4, 'directions': ['h', 'w2_flip'], **options}
                     ) if kind == 'vim' else build(kind)
    model.eval()
    first, second = kinds_of_nodes(model), kinds_of_nodes(model)
    with torch.no_grad():
        third = kinds_of_nodes(model)
    table_cache.clear()
    with torch.no_grad():
        fourth = kinds_of_nodes(model)
    assert first == second == third == fourth
    traced = torch.jit.trace(model, image())
    assert torch.equal(traced(image())[-1], model(image())[-1])
    assert not [key for key in table_cache._entries if any(isinstance(part, torch.Tensor) for part in key)]


def counted(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(x)[-1].square().sum().backward()
    return forward, {str(op).partition('.')[2]: count for op, count in counter.get_flop_counts()['Global'].items()
                     if str(op).startswith('mmlocalmamba.')}


@each_backbone
def test_torch_counts_all_flops(kind, monkeypatch):
    """As many as MMEngine's counter, with a multiply-add as two."""
    analysis = pytest.importorskip('mmengine.analysis')
    from mmlocalmamba.ops import available_backends
    from mmlocalmamba.ops.flops import HANDLES, SCAN
    if available_backends(torch.zeros(1))['cpu']:
        pytest.skip('other backends have no operators to count')
    model = build(kind)
    forward, ours = counted(model, image())
    with torch.no_grad():
        analyzer = analysis.FlopAnalyzer(model.eval(), image()).set_op_handle(**HANDLES)
        found = analyzer.unsupported_ops_warnings(False).by_operator()
    products = sum(count for name, count in found.items() if name not in (SCAN, 'layer_norm'))
    assert forward == pytest.approx(2 * products + found[SCAN], rel=1e-3) and found[SCAN] > 0
    # A product costs two in the backward pass; those of the step sizes are linear layers there.
    assert ours['directional_scan_backward'] == 2 * found[SCAN]
    assert 2 < ours['linear'] / (ours['directional_scan'] - found[SCAN] + 1) < 100
    if kind == 'vim':
        assert ours['directional_conv_backward'] == 2 * ours['directional_conv']


def test_every_operator_has_a_formula():
    from mmlocalmamba.ops.library import _ARGUMENTS
    assert set(TOTALS) >= {name for name in _ARGUMENTS if not name.endswith('_interpreted')}


@each_backbone
def test_any_module_can_be_checkpointed(kind):
    """MMEngine's turn_on_activation_checkpointing passes arguments on by position alone."""
    mmengine = pytest.importorskip('mmengine.runner.activation_checkpointing')
    model = build(kind)

    def step(model):
        x = image().requires_grad_()
        out = model(x)[-1]
        out.square().sum().backward()
        return out.detach(), x.grad

    expected = step(copy.deepcopy(model))
    for name in parts(kind):
        changed = copy.deepcopy(model)
        mmengine.turn_on_activation_checkpointing(changed, name)
        for a, b in zip(step(changed), expected):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=name)
