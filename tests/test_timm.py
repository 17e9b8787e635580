"""The models in timm: what timm asks of a model (its own tests are not in its wheel), and what is built on timm.

TorchScript is left out.
"""
import json
import math
import re

import pytest
import torch
from processes import ROOT
from torch import nn

from mmlocalmamba import create_model, list_models
from mmlocalmamba.weights import to_official
from mmlocalmamba.weights.released import NAMED

timm = pytest.importorskip('timm', reason='needs timm: pip install -r requirements/dev.txt')
import mmlocalmamba.timm  # noqa: E402, F401

SMALL_VIM = dict(arch=dict(embed_dims=32, num_layers=4, d_state=2))
# Every kind of model: name -> further arguments.
KINDS = {'localvim_nano': {}, 'localvmamba_nano': {}, 'vim_tiny': SMALL_VIM,
         'vmamba_tiny': dict(arch=dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 2, 1], d_state=2))}
each_kind = pytest.mark.parametrize('name', KINDS)


def make(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**KINDS[name], **options})


def images(side=64, batch=1, channels=3):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def test_every_name_is_registered():
    assert set(list_models()) <= set(timm.list_models())
    classifiers = {name for name in list_models(pretrained=True) if NAMED[name].model}
    assert classifiers <= set(timm.list_models(pretrained=True))


@each_kind
def test_forward_also_with_checkpointing(name):
    model, x = make(name, drop_path_rate=0.), images(batch=2)
    out = model(x)
    assert out.shape == (2, 1000) and not out.isnan().any()
    model.train().set_grad_checkpointing()
    assert any(getattr(module, 'with_cp', False) for module in model.modules())
    again = model(x)
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)
    again.sum().backward()
    model.set_grad_checkpointing(False)
    assert not any(getattr(module, 'with_cp', False) for module in model.modules())


@each_kind
def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=42).train()
    out = model(images(batch=2))
    out.mean().backward()
    assert out.shape == (2, 42)
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@each_kind
def test_logits_are_those_of_our_own_model(name):
    model = make(name, num_classes=7).eval()
    own = create_model(name, num_classes=7, **KINDS[name]).eval()
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), own(images()))


@each_kind
def test_what_the_configuration_says_is_so(name):
    model = make(name).eval()
    cfg, x = model.default_cfg, images(224)
    names = model.state_dict()
    assert f'{cfg["classifier"]}.weight' in names and f'{cfg["first_conv"]}.weight' in names
    assert model.num_classes == 1000 and model.get_classifier().weight.shape == (1000, model.num_features)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    if model.num_prefix_tokens:
        assert features.shape == (1, 1 + math.prod(cfg['pool_size']), model.num_features)
    else:
        assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert pooled.shape == (1, model.head_hidden_size)

    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), features)
    model.reset_classifier(5, 'avg')
    assert model(x).shape == (1, 5)
    unpooled = make(name, num_classes=0, global_pool='').eval()
    assert unpooled(x).shape == features.shape


@each_kind
def test_features_only(name):
    model, x = make(name, features_only=True).eval(), images(96)
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) == 4
    for out, width, stride in zip(model(x), channels, strides, strict=True):
        assert out.shape == (1, width, 96 // stride, 96 // stride) and not out.isnan().any()
    last, = make(name, features_only=True, out_indices=(-1, ))(x)
    assert last.shape[1] == channels[-1]


@each_kind
@pytest.mark.parametrize('fmt', ['NCHW', 'NHWC'])
def test_intermediates(name, fmt):
    model, x = make(name).eval(), images(96)
    final, maps = model.forward_intermediates(x, output_fmt=fmt)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info) >= 3
    axis = 1 if fmt == 'NCHW' else 3
    for found, info in zip(maps, model.feature_info):
        assert found.shape[axis] == info['num_chs'] and found.shape[2] == 96 // info['reduction']
    for indices, options in (((0, 2), dict(stop_early=True)), (2, {}), ((-1, ), dict(intermediates_only=True))):
        found = model.forward_intermediates(x, indices=indices, output_fmt=fmt, **options)
        found = found if options.get('intermediates_only') else found[1]
        expected = maps[-indices:] if isinstance(indices, int) else [maps[i] for i in indices]
        assert all(map(torch.equal, found, expected))
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    if not model.num_prefix_tokens:
        torch.testing.assert_close(normed, final)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], final)


def test_intermediates_with_the_class_token():
    model = make('vim_tiny').eval()
    final, pairs = model.forward_intermediates(images(), indices=1, norm=True, return_prefix_tokens=True)
    (found, token), = pairs
    assert torch.equal(token, final[:, :1]) and torch.equal(found.flatten(2).transpose(1, 2), final[:, 1:])


@each_kind
def test_pruned(name):
    model, x = make(name).eval(), images(96)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers((0, -2), prune_norm=True) == [0, len(maps) - 2]
    for found, expected in zip(model.forward_intermediates(x, (0, -1), intermediates_only=True), (maps[0], maps[-2])):
        assert torch.equal(found, expected)
    final = model.forward_features(x)
    assert torch.equal(final if final.dim() == 4 else final[:, 1:], maps[-2] if final.dim() == 4 else
                       maps[-2].flatten(2).transpose(1, 2))
    assert final.shape[-1 if model.num_prefix_tokens else 1] == model.num_features
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (1, 3)


@each_kind
def test_no_weight_decay_and_layer_decay_are_those_of_the_openmmlab_door(name):
    model = make(name)
    free = model.no_weight_decay()
    assert {key.rpartition('.')[2] for key in free} >= {'A_log', 'D', 'dt_proj_bias'} and free < set(model.state_dict())
    # As in configs/_base_/runtime.py: nothing of one axis, no bias and no norm.
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and any(part in key for part in ('A_log', '.ssm.D', 'bias', 'pos_embed', 'cls_token')):
            assert key in free, key
        elif parameter.dim() > 1:
            assert key not in free, key
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    depths = {key: model.backbone.get_layer_depth(key, 'backbone.') for key in layers if key.startswith('backbone.')}
    order = sorted({depth for depth, _ in depths.values()})
    assert all(layers[key] == order.index(depth) for key, (depth, _) in depths.items())
    assert layers['head.fc.weight'] == max(layers.values()) == len(order)
    scales = {group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=.5)}
    assert scales == {.5 ** distance for distance in range(len(order) + 1)}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) < len(set(layers.values())) or name.startswith(('localvim', 'vim'))


@each_kind
@pytest.mark.parametrize('train', [False, True])
def test_torch_fx(name, train):
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    options = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(),
                   param_shapes_constant=True)
    model, x = make(name, num_classes=42, drop_path_rate=0.).train(train), images(batch=2)
    expected = model(x)
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    graph = create_feature_extractor(model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:],
                                     tracer_kwargs=options).train(train)
    out, = graph(x).values()
    assert torch.equal(out, expected)
    out.mean().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


# ---- weights ----

@pytest.mark.parametrize('name', [name for name in list_models(pretrained=True) if NAMED[name].packaged])
def test_packaged_weights(name):
    model, own = timm.create_model(name, pretrained=True).eval(), create_model(name, pretrained=True).eval()
    x = images(model.default_cfg['input_size'][-1])
    torch.testing.assert_close(model(x), own(x))
    data = timm.data.resolve_data_config(model=model)
    assert data['mean'] == data['std'] == (.5, .5, .5)


@pytest.mark.parametrize('classes', [0, 5])
def test_pretrained_with_other_channels_and_classes(classes):
    model = timm.create_model('localvim_nano.digits', pretrained=True, in_chans=1, num_classes=classes)
    own = create_model('localvim_nano.digits', pretrained=True)
    torch.testing.assert_close(model.backbone.patch_embed.projection.weight,
                               own.backbone.patch_embed.projection.weight.sum(1, keepdim=True))
    assert torch.equal(model.backbone.pos_embed, own.backbone.pos_embed)
    assert model(images(32, channels=1)).shape[1] == (classes or 64)


def test_pretrained_features():
    model = timm.create_model('localvim_nano.digits', pretrained=True, features_only=True)
    own = create_model('localvim_nano.digits', pretrained=True)
    assert torch.equal(model.model.backbone.pos_embed, own.backbone.pos_embed)


def test_a_name_without_weights_is_refused():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for localvmamba_nano'):
        timm.create_model('localvmamba_nano', pretrained=True)


@each_kind
def test_weights_go_to_openmmlab_and_back_bit_for_bit(name, tmp_path):
    pytest.importorskip('mmengine')
    from mmengine.registry import MODELS, DefaultScope

    from mmlocalmamba import models
    kind, arguments = models._MODELS[name]
    trained = make(name, num_classes=7).train()
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-3)
    trained(images(batch=2)).square().mean().backward()
    optimizer.step()
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'timm.pth')
    backbone = {'type': f'mmlocalmamba.{kind.__name__}', **arguments, **KINDS[name],
                'init_cfg': dict(type='Pretrained', checkpoint=str(tmp_path / 'timm.pth'))}
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        import mmlocalmamba.openmmlab.models  # noqa: F401
        there = MODELS.build(backbone)
        there.init_weights()
    own = {key.removeprefix('backbone.'): value for key, value in trained.state_dict().items()}
    assert all(torch.equal(value, own[key]) for key, value in there.state_dict().items())
    torch.save(dict(state_dict={**{f'backbone.{key}': value for key, value in there.state_dict().items()},
                                'head.fc.weight': own['head.fc.weight'], 'head.fc.bias': own['head.fc.bias']}),
               tmp_path / 'mmengine.pth')
    back = make(name, num_classes=7, checkpoint_path=str(tmp_path / 'mmengine.pth'))
    assert all(map(torch.equal, back.state_dict().values(), trained.state_dict().values()))


def test_files_of_the_authors_load(tmp_path):
    own = make('localvim_nano', num_classes=1000)
    weights, unknown = to_official(own.state_dict())
    assert not unknown
    torch.save(dict(state_dict=weights), tmp_path / 'official.pth')
    model = make('localvim_nano', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'official.pth'), custom_load=True))
    assert all(map(torch.equal, model.state_dict().values(), own.state_dict().values()))


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(make('localvmamba_nano').state_dict(), tmp_path / 'other.pth')
    with pytest.raises(RuntimeError, match='holds a LocalVMamba .* it is not of this backbone'):
        make('localvim_nano', pretrained=True, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'other.pth'), custom_load=True))
    with pytest.raises(ValueError, match='output_stride=16: strides of LocalVMamba'):
        make('localvmamba_nano', output_stride=16)


# ---- what is built on timm ----

def folder(model, path):
    """Save a model as timm does for the Hub, and mend config.json for transformers."""
    timm.models.save_for_hf(model, path, safe_serialization=True)
    config = json.loads((path / 'config.json').read_text())
    # timm 1.0.31 writes num_classes among the arguments, too, and transformers 5.24 then passes it twice.
    twice = 'num_classes' in config and 'num_classes' in config.get('model_args', {})
    config.get('model_args', {}).pop('num_classes', None)
    (path / 'config.json').write_text(json.dumps(config))
    return twice


def test_local_dir(tmp_path):
    model = make('localvmamba_nano', num_classes=3).eval()
    folder(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize('decoder', ['Unet', 'FPN', 'UPerNet', 'DPT'])
def test_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs segmentation_models_pytorch: pip install -r '
                              'requirements/dev.txt')
    encoder = 'localvim_nano' if decoder == 'DPT' else 'localvmamba_nano'
    torch.manual_seed(0)
    model = getattr(smp, decoder)(f'tu-{encoder}', encoder_weights=None, classes=5)
    out = model(images(64, batch=2))
    assert out.shape == (2, 5, 64, 64)
    out.mean().backward()
    assert model.encoder.model.get_parameter(
        'backbone.patch_embed.projection.weight' if decoder == 'DPT' else
        'model.backbone.patch_embed.projection.weight').grad.abs().sum() > 0


@pytest.mark.slow
def test_torchvision_detector():
    from collections import OrderedDict

    from torchvision.models.detection import FasterRCNN
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    class Backbone(nn.Module):
        out_channels = 32

        def __init__(self):
            super().__init__()
            self.body = make('localvmamba_nano', features_only=True)
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels,
                                             extra_blocks=LastLevelMaxPool())

        def forward(self, x):
            return self.fpn(OrderedDict((str(i), out) for i, out in enumerate(self.body(x))))

    detector = FasterRCNN(Backbone(), num_classes=3, min_size=96, max_size=128).train()
    optimizer = torch.optim.SGD(detector.parameters(), 1e-3)
    target = dict(boxes=torch.tensor([[8., 8., 60., 60.]]), labels=torch.tensor([1]))
    sum(detector([images(96)[0]], [target]).values()).backward()
    assert detector.backbone.body.model.backbone.patch_embed.projection.weight.grad.abs().sum() > 0
    optimizer.step()
    found, = detector.eval()([images(96)[0]])
    assert set(found) == {'boxes', 'labels', 'scores'}


@pytest.mark.slow
def test_transformers(tmp_path):
    transformers = pytest.importorskip('transformers', reason='needs transformers: pip install transformers==5.24.0')
    model = make('localvmamba_nano', num_classes=3).eval()
    twice = folder(model, tmp_path)
    assert twice or (timm.__version__, transformers.__version__) != ('1.0.31', '5.24.0'), 'docs say otherwise'
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(classifier(images()).logits, model(images()))
    backbone = transformers.TimmBackbone.from_pretrained(f'local-dir:{tmp_path}', out_indices=(1, 3)).eval()
    maps = backbone(images()).feature_maps
    expected = model.forward_intermediates(images(), (1, 3), intermediates_only=True)
    assert len(maps) == 2 and all(map(torch.equal, maps, expected))


SECTION = (ROOT / 'docs/inference.md').read_text().split('\n## Outside of OpenMMLab\n')[1].split('\n## ')[0]
BLOCKS = re.findall(r'^### (.+?)\n(?:(?!^### ).)*?```python\n(.*?)```', SECTION, flags=re.S | re.M)


@pytest.mark.slow
@pytest.mark.parametrize('title, code', BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_page_runs(title, code, tmp_path, monkeypatch):
    """In ten lines each, beside imports."""
    monkeypatch.chdir(tmp_path)
    for package in ('mmengine', 'segmentation_models_pytorch', 'transformers'):
        if package in code:
            pytest.importorskip(package, reason=f'needs {package}')
    assert len([line for line in code.splitlines() if line and not line.startswith(('import ', 'from '))]) <= 10
    exec(code, {})


def test_the_page_has_a_block_for_each():
    assert len(BLOCKS) == SECTION.count('```python') == 5
