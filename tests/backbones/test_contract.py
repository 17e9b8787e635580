"""The contract of every backbone: each registered architecture and kind of use passes this one file."""
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.backbones.archs import LOCAL_VIM, LOCAL_VMAMBA
from mmlocalmamba.layers import DropPath, SCAttn
from mmlocalmamba.layers.mixers import _Mixer

FOUR = ['h', 'v_flip', 'w2', 'w3_flip']
# Every kind of model, small: name -> (class, arguments).
KINDS = {
    'vmamba': (LocalVMamba, dict(out_indices=(0, 1))),
    'vmamba-search': (LocalVMamba, dict(directions='search')),
    'vmamba-plain': (LocalVMamba, dict(directions=['h', 'v', 'h_flip', 'v_flip'], scattn=False, window_pad='none')),
    'vmamba-v2': (LocalVMamba, dict(
        arch=dict(embed_dims=[8, 16], depths=[1, 2], d_state=1, expand=1., gate=False, conv_bias=False, mlp_ratio=2.,
                  patch_embed='conv', downsample='conv'), out_indices=(0, 1))),
    'vim': (LocalVim, dict(out_type='featmap', out_indices=(0, 2))),
    'vim-residual': (LocalVim, dict(out_type='featmap', out_feature='residual', out_indices=(0, 2))),
    'vim-pooled': (LocalVim, dict(scattn=dict(spatial=True))),
    'vim-class-token': (LocalVim, dict(cls_token='middle', rope=False, out_type='cls_token')),
    'vim-class-token-of-vim': (LocalVim, dict(cls_token='vim', rope=False, out_type='cls_token')),
    'vim-search': (LocalVim, dict(directions=dict(sampling='single_path', samples=2))),
}
# Of the authors' classifiers, heads of 1000 classes included.
PARAMS = {(LocalVim, 'tiny'): 7_994_152, (LocalVim, 'small'): 27_783_784,
          (LocalVMamba, 'tiny'): 25_527_160, (LocalVMamba, 'small'): 49_748_536}
ARCHS = [*((LocalVim, arch) for arch in LOCAL_VIM), *((LocalVMamba, arch) for arch in LOCAL_VMAMBA)]


def build(kind, **more):
    torch.manual_seed(0)
    cls, arguments = KINDS[kind]
    if cls is LocalVMamba:
        small = dict(arch=dict(embed_dims=[8, 16], depths=[1, 2], d_state=2))
    else:
        small = dict(arch=dict(embed_dims=16, num_layers=3, d_state=2), img_size=32, patch_size=4)
    return cls(**{**small, 'directions': FOUR, 'drop_path_rate': 0., **arguments, **more})


def image(H=20, W=28, batch=2):
    return torch.randn(batch, 3, H, W, generator=torch.Generator().manual_seed(1))


def loss_of(outs):
    return sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs)


def gradients(model, x):
    model.zero_grad()
    loss_of(model(x)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize('kind', KINDS)
def test_channels_and_strides_of_outputs_are_told(kind):
    model, x = build(kind), image(32, 48)
    outs = model(x)
    assert [out.shape[1] for out in outs] == model.out_channels
    assert len(model.out_strides) == len(outs)
    for out, stride in zip(outs, model.out_strides):
        assert out.ndim == 2 or out.shape[-2:] == (32 // stride, 48 // stride)


@pytest.mark.parametrize('cls,arch', ARCHS, ids=lambda value: getattr(value, '__name__', value))
def test_architectures_are_those_of_the_paper(cls, arch):
    """Built without memory for their weights."""
    with torch.device('meta'):
        model = cls(arch)
    assert {parameter.device.type for parameter in model.parameters()} == {'meta'}
    depth = len(model.directions)
    assert depth == sum(isinstance(module, _Mixer) for module in model.modules())
    known = PARAMS.get((cls, arch))
    if known is not None:
        width = model.embed_dims if cls is LocalVim else model.embed_dims[-1]
        assert sum(parameter.numel() for parameter in model.parameters()) + 1000 * (width + 1) == known


@pytest.mark.parametrize('kind', KINDS)
def test_weights_are_made_by_init_weights(kind):
    """Also those of a model that was built on the meta device, and of one whose memory holds anything."""
    with torch.device('meta'):
        model = build(kind)
    model.to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float('nan'))
    torch.manual_seed(5)
    model.init_weights()
    other = build(kind)
    torch.manual_seed(5)
    other.init_weights()
    for (name, parameter), (_, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert parameter.isfinite().all(), name
        torch.testing.assert_close(parameter, expected, msg=name, rtol=0, atol=0)
    ssm = next(module.ssm for module in model.modules() if isinstance(module, _Mixer))
    dt = nn.functional.softplus(ssm.dt_proj_bias)
    assert 0.9e-3 <= dt.min() and dt.max() <= 1.1e-1 and dt.std() > 0  # Mamba's step sizes
    torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1., ssm.A_log.shape[-1] + 1).expand_as(ssm.A_log))
    assert all(out.isfinite().all() for out in model(image()))


@pytest.mark.parametrize('kind', KINDS)
def test_on_the_meta_device_shapes_come_out(kind):
    with torch.device('meta'):
        model = build(kind).eval()
    shapes = [tuple(out.shape) for out in build(kind).eval()(image())]
    assert [tuple(out.shape) for out in model(image().to('meta'))] == shapes


@pytest.mark.parametrize('kind', KINDS)
def test_copies_equal_the_original(kind):
    model, x = build(kind).eval(), image()
    expected = model(x)
    other = build(kind).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not all(torch.equal(a, b) for a, b in zip(other(x), expected))
    assert not any(other.load_state_dict(model.state_dict()))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        for a, b in zip(copied(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert copy.deepcopy(model).training is False


@pytest.mark.parametrize('kind', KINDS)
def test_checkpointing_recomputes_and_changes_nothing(kind):
    calls = []
    grads = []
    for options in ({}, dict(with_cp=True)):
        model, count = build(kind, **options), [0]

        def add(*_, count=count):
            count[0] += 1

        mixers = [module for module in model.modules() if isinstance(module, _Mixer)]
        for mixer in mixers:
            mixer.in_proj.register_forward_hook(add)
        torch.manual_seed(2)
        grads.append(gradients(model, image().requires_grad_()))
        calls.append(count[0] / len(mixers))
    assert calls == [1, 2]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize('kind', ['vmamba', 'vmamba-plain', 'vim-pooled', 'vim-class-token'])
def test_drop_path_drops_in_training_alone(kind):
    """At a rate of (nearly) 1, what comes out is what comes out without any mixer."""
    model, x = build(kind), image()
    without = copy.deepcopy(model).eval()
    for module in without.modules():
        if isinstance(module, _Mixer):
            module.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
    drops = [module for module in model.modules() if isinstance(module, DropPath)]
    assert len(drops) >= 3
    for module in drops:
        module.drop_prob = 1 - 1e-7
    train, bare = model.train()(x), without(x)
    for dropped, expected, kept, whole in zip(train, bare, model.eval()(x), build(kind).eval()(x), strict=True):
        torch.testing.assert_close(dropped, expected)
        torch.testing.assert_close(kept, whole)
        assert not torch.allclose(kept, dropped, rtol=1e-3)


def test_rates_of_drop_path():
    assert [block.drop_path.drop_prob for stage in build('vmamba', drop_path_rate=0.2).stages
            for block in stage.blocks] == pytest.approx([0., 0.1, 0.2])
    model = build('vim-pooled', drop_path_rate=0.2)
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx([0., 0., 0.1])
    assert model.drop_path.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize('feature', ['mixer', 'residual'])
def test_what_vim_taps(feature):
    model, blocks = build('vim', out_feature=feature), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, out: blocks.append(out))
    outs = model(image())
    for out, norm, index in zip(outs, model.out_norms, model.out_indices, strict=True):
        x, residual = blocks[index]
        tapped = x if feature == 'mixer' else x + residual
        torch.testing.assert_close(out.flatten(2).transpose(1, 2), norm(tapped))


@pytest.mark.parametrize('kind', ['vmamba', 'vim', 'vim-pooled', 'vim-class-token-of-vim'])
@pytest.mark.slow
def test_compiled_at_two_sizes(kind):
    """As one graph each; the second size makes torch.compile trace with symbolic sizes."""
    torch._dynamo.reset()
    model = build(kind)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for H, W in ((12, 20), (33, 21)):
        results = []
        for function in (model, compiled):
            outs = function(image(H, W))
            grads = torch.autograd.grad(loss_of(outs), list(model.parameters()), allow_unused=True)
            results.append([*outs, *(grad for grad in grads if grad is not None)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', ['vmamba', 'vim', 'vim-class-token'])
@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.slow
def test_exported_graphs(kind, dynamic):
    """For one size the graph has none of our table operators; with free H and W, others run too. What eager code has
    cached stays real."""
    model = build(kind).eval()
    shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}, ) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(model, (image(32, 64), ), dynamic_shapes=shapes)
        names = [str(node.target) for node in program.graph.nodes]
        assert any('scan_tables' in name for name in names) == dynamic
        for size in ((32, 64), (48, 40)) if dynamic else ((32, 64), ):
            for a, b in zip(program.module()(image(*size)), model(image(*size)), strict=True):
                assert type(b) is torch.Tensor
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# SCAttn: a fused kernel may take its parameters only where nobody looks at its parts.

def attend(module, backend, monkeypatch):
    monkeypatch.setenv('MMLOCALMAMBA_BACKEND', backend)
    y = torch.randn(2, 3, 10, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    out = module.sum_directions(y)
    out.square().sum().backward()
    return out.detach(), y.grad


BACKENDS = ['', 'chunked', 'reference']


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('part', ['', 'norm', 'global_reduce', 'channel_select'])
@pytest.mark.parametrize('hook', ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook',
                                  'register_full_backward_pre_hook'])
def test_hooks_fire_on_every_part_of_scattn(part, hook, backend, monkeypatch):
    torch.manual_seed(0)
    module, calls = SCAttn(16), []
    expected = attend(module, backend, monkeypatch)
    getattr(module.get_submodule(part), hook)(lambda *_: calls.append(part))
    for a, b in zip(attend(module, backend, monkeypatch), expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert calls == [part]


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('change', ['prune', 'weight_norm', 'subclass'])
def test_changed_parts_of_scattn_count(change, backend, monkeypatch):
    torch.manual_seed(0)
    module = SCAttn(16)
    plain = attend(module, backend, monkeypatch)[0]
    if change == 'prune':
        prune.l1_unstructured(module.channel_select, 'weight', amount=0.9)
        module(torch.zeros(1, 16))  # the mask is applied before a call
        reference = SCAttn(16)
        reference.load_state_dict({**{name: value for name, value in module.state_dict().items()
                                      if not name.startswith('channel_select.weight')},
                                   'channel_select.weight': module.channel_select.weight})
    elif change == 'weight_norm':
        parametrizations.weight_norm(module.global_reduce)
        with torch.no_grad():
            module.global_reduce.parametrizations.weight.original0.mul_(30)
        reference = SCAttn(16)
        reference.load_state_dict({**{name: value for name, value in module.state_dict().items()
                                      if 'parametrizations' not in name},
                                   'global_reduce.weight': module.global_reduce.weight})
    else:
        class Loud(nn.Linear):
            def forward(self, x):
                return 20 * super().forward(x)

        with torch.no_grad():
            reference = copy.deepcopy(module)
            reference.channel_select.weight.mul_(20)
        module.channel_select.__class__ = Loud
    out = attend(module, backend, monkeypatch)[0]
    assert not torch.allclose(out, plain, rtol=1e-4)
    torch.testing.assert_close(out, attend(reference, backend, monkeypatch)[0], atol=1e-5, rtol=1e-4)
