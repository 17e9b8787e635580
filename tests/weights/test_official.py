import argparse
import json
import runpy
import sys
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.nn import functional as F

from mmlocalmamba import backbones
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.files import load_checkpoint
from mmlocalmamba.ops import selective_scan
from mmlocalmamba.weights import find_state_dict, from_official, to_official

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / 'data'
TOOL = ROOT / 'tools' / 'model_converters' / 'official_to_mmlocalmamba.py'

SMALL = {
    'LocalVim': lambda **kwargs: LocalVim(dict(embed_dims=16, num_layers=2, d_state=2), img_size=32, patch_size=8,
                                          directions=[['h', 'w2'], ['v', 'w2_flip']], **kwargs),
    'LocalVMamba': lambda **kwargs: LocalVMamba(dict(embed_dims=[8, 16, 32], depths=[1, 1, 1], d_state=2),
                                                directions=['h', 'w2'], **kwargs),
    'LocalVMamba v2': lambda **kwargs: LocalVMamba(
        dict(embed_dims=[8, 16, 32], depths=[1, 1, 1], d_state=1, expand=1., gate=False, conv_bias=False, mlp_ratio=2.,
             patch_embed='conv', downsample='conv'), directions=['h', 'w2'], **kwargs),
}


def official_of(model, classes=3):
    weights = {f'backbone.{name}': torch.randn_like(value) for name, value in model.state_dict().items()}
    width = model.norm.normalized_shape[0] if isinstance(model, LocalVim) else model.embed_dims[-1]
    weights.update({'head.fc.weight': torch.randn(classes, width), 'head.fc.bias': torch.randn(classes)})
    official, unmatched = to_official(weights)
    assert not unmatched
    return official, weights


class Result(NamedTuple):
    returncode: int
    stderr: str


def run(*args):
    """The tool's main in this process: importing torch anew for every case would take minutes."""
    with mock.patch.object(sys, 'argv', [str(TOOL), *map(str, args)]):
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as stop:
            return Result(1 if isinstance(stop.code, str) else stop.code or 0, str(stop.code))
    return Result(0, '')


def vmamba_v2(arch, **kwargs):
    return LocalVMamba(arch, directions=['h', 'v', 'h_flip', 'v_flip'], scattn=False, **kwargs)


@pytest.mark.parametrize('name,build', [('local_vim_tiny', lambda: LocalVim('tiny')),
                                        ('local_vssm_tiny', lambda: LocalVMamba('tiny')),
                                        ('vmamba_v2_tiny', lambda: vmamba_v2('tiny_v2'))])
def test_key_contract_both_ways(name, build):
    """The authors' released names and shapes, pinned in data/, cover our model exactly, and come back as they were."""
    shapes = json.loads((DATA / f'{name}.json').read_text())['state_dict']
    official = {key: torch.randn(shape) for key, shape in shapes.items()}
    ours, unmatched = from_official(official)
    assert not unmatched
    with torch.device('meta'):
        own = build().state_dict()
    head = {key: value for key, value in ours.items() if key.startswith('head.')}
    assert set(head) == {'head.fc.weight', 'head.fc.bias'}
    assert {key[len('backbone.'):]: value.shape for key, value in ours.items() if key not in head} == \
        {key: value.shape for key, value in own.items()}
    back, unmatched = to_official(ours)
    assert not unmatched and {key: list(value.shape) for key, value in back.items()} == shapes
    assert all(torch.equal(back[key], value) for key, value in official.items() if not key.startswith('rope.'))


def mamba_shapes(mixer, suffix, D, N, R, taps=4):
    return {f'{mixer}.A{suffix}_log': (D, N), f'{mixer}.D{suffix}': (D, ),
            f'{mixer}.conv1d{suffix}.weight': (D, 1, taps), f'{mixer}.conv1d{suffix}.bias': (D, ),
            f'{mixer}.x_proj{suffix}.weight': (R + 2 * N, D),
            f'{mixer}.dt_proj{suffix}.weight': (D, R), f'{mixer}.dt_proj{suffix}.bias': (D, )}


def vim_shapes(channels, depth, N=16, patch=16, grid=14, classes=1000):
    """Names of hustvl/Vim's classifiers with a middle class token (bimamba v2): models_mamba.py, mamba_simple.py."""
    D, R = 2 * channels, -(-channels // 16)
    shapes = {'cls_token': (1, 1, channels), 'pos_embed': (1, grid ** 2 + 1, channels),
              'patch_embed.proj.weight': (channels, 3, patch, patch), 'patch_embed.proj.bias': (channels, )}
    for i in range(depth):
        mixer = f'layers.{i}.mixer'
        shapes.update({f'{mixer}.in_proj.weight': (2 * D, channels), **mamba_shapes(mixer, '', D, N, R),
                       **mamba_shapes(mixer, '_b', D, N, R), f'{mixer}.out_proj.weight': (channels, D),
                       f'layers.{i}.norm.weight': (channels, )})
    return {**shapes, 'norm_f.weight': (channels, ), 'head.weight': (classes, channels), 'head.bias': (classes, )}


def vmamba_shapes(channels, depths, N=16, classes=1000):
    """Names of MzeroMiko/VMamba's classifiers, version 0: vmamba.py of January 2024."""
    shapes = {'patch_embed.proj.weight': (channels, 3, 4, 4), 'patch_embed.proj.bias': (channels, ),
              'patch_embed.norm.weight': (channels, ), 'patch_embed.norm.bias': (channels, )}
    for i, depth in enumerate(depths):
        C, K = channels * 2 ** i, 4
        D, R = 2 * C, -(-C // 16)
        for j in range(depth):
            block = f'layers.{i}.blocks.{j}'
            ours = {'A_logs': (K * D, N), 'Ds': (K * D, ), 'in_proj.weight': (2 * D, C), 'conv2d.weight': (D, 1, 3, 3),
                    'conv2d.bias': (D, ), 'x_proj_weight': (K, R + 2 * N, D), 'dt_projs_weight': (K, D, R),
                    'dt_projs_bias': (K, D), 'out_norm.weight': (D, ), 'out_norm.bias': (D, ),
                    'out_proj.weight': (C, D)}
            shapes.update({f'{block}.ln_1.weight': (C, ), f'{block}.ln_1.bias': (C, ),
                           **{f'{block}.self_attention.{name}': shape for name, shape in ours.items()}})
        if i + 1 < len(depths):
            down = f'layers.{i}.downsample'
            shapes.update({f'{down}.reduction.weight': (2 * C, 4 * C), f'{down}.norm.weight': (4 * C, ),
                           f'{down}.norm.bias': (4 * C, )})
    return {**shapes, 'norm.weight': (C, ), 'norm.bias': (C, ), 'head.weight': (classes, C), 'head.bias': (classes, )}


def vmamba_v2_shapes(channels, depths, ratio, classes=1000, taps=()):
    """Names of MzeroMiko/VMamba, version 2: vmamba.py of March 2025. With taps, those of its Backbone_VSSM."""
    C, K = channels, 4
    shapes = {'patch_embed.0.weight': (C // 2, 3, 3, 3), 'patch_embed.0.bias': (C // 2, ),
              'patch_embed.2.weight': (C // 2, ), 'patch_embed.2.bias': (C // 2, ),
              'patch_embed.5.weight': (C, C // 2, 3, 3), 'patch_embed.5.bias': (C, ),
              'patch_embed.7.weight': (C, ), 'patch_embed.7.bias': (C, )}
    for i, depth in enumerate(depths):
        C = channels * 2 ** i
        D, R = int(ratio * C), -(-C // 16)
        for j in range(depth):
            block = f'layers.{i}.blocks.{j}'
            ours = {'A_logs': (K * D, 1), 'Ds': (K * D, ), 'in_proj.weight': (D, C), 'conv2d.weight': (D, 1, 3, 3),
                    'x_proj_weight': (K, R + 2, D), 'dt_projs_weight': (K, D, R), 'dt_projs_bias': (K, D),
                    'out_norm.weight': (D, ), 'out_norm.bias': (D, ), 'out_proj.weight': (C, D)}
            shapes.update({f'{block}.op.{name}': shape for name, shape in ours.items()})
            shapes.update({f'{block}.{name}': (C, )
                           for name in ('norm.weight', 'norm.bias', 'norm2.weight', 'norm2.bias')})
            shapes.update({f'{block}.mlp.fc1.weight': (4 * C, C), f'{block}.mlp.fc1.bias': (4 * C, ),
                           f'{block}.mlp.fc2.weight': (C, 4 * C), f'{block}.mlp.fc2.bias': (C, )})
        if i + 1 < len(depths):
            down = f'layers.{i}.downsample'
            shapes.update({f'{down}.1.weight': (2 * C, C, 3, 3), f'{down}.1.bias': (2 * C, ),
                           f'{down}.3.weight': (2 * C, ), f'{down}.3.bias': (2 * C, )})
    if taps:
        return {**shapes, **{f'outnorm{i}.{leaf}': (channels * 2 ** i, ) for i in taps for leaf in ('weight', 'bias')}}
    return {**shapes, 'classifier.norm.weight': (C, ), 'classifier.norm.bias': (C, ),
            'classifier.head.weight': (classes, C), 'classifier.head.bias': (classes, )}


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) + (name.endswith('norm.weight'))
            for name, shape in shapes.items()}


@pytest.mark.parametrize('config, shapes', [
    ('vim-t-midcls_8xb128_in1k', vim_shapes(192, 24)),
    ('vim-s-midcls_8xb128_in1k', vim_shapes(384, 24)),
    ('vim-t-midcls-plus_8xb128-30e_in1k', vim_shapes(192, 24, grid=27)),
    ('vim-s-midcls-plus_8xb128-30e_in1k', vim_shapes(384, 24, grid=27)),
    ('vmamba-t_8xb128_in1k', vmamba_shapes(96, [2, 2, 9, 2])),
    ('vmamba-s_8xb128_in1k', vmamba_shapes(96, [2, 2, 27, 2])),
    ('vmamba-b_8xb128_in1k', vmamba_shapes(128, [2, 2, 27, 2])),
    ('vmamba-t-v2_8xb128_in1k', vmamba_v2_shapes(96, [2, 2, 8, 2], 1)),
    ('vmamba-t-v2-s2l5_8xb128_in1k', vmamba_v2_shapes(96, [2, 2, 5, 2], 2)),
    ('vmamba-s-v2_8xb128_in1k', vmamba_v2_shapes(96, [2, 2, 15, 2], 2)),
    ('vmamba-s-v2-s1l20_8xb128_in1k', vmamba_v2_shapes(96, [2, 2, 20, 2], 1)),
    ('vmamba-b-v2_8xb128_in1k', vmamba_v2_shapes(128, [2, 2, 15, 2], 2)),
    ('vmamba-b-v2-s1l20_8xb128_in1k', vmamba_v2_shapes(128, [2, 2, 20, 2], 1)),
])
def test_key_contract_of_vim_and_vmamba(config, shapes):
    """Their published names and shapes cover our models exactly."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{config}.py').model.backbone
    with torch.device('meta'):
        own = getattr(backbones, cfg.pop('type').split('.')[1])(**cfg).state_dict()
        ours, unmatched = from_official({name: torch.empty(shape) for name, shape in shapes.items()})
    assert not unmatched
    head = {key: tuple(value.shape) for key, value in ours.items() if key.startswith('head.')}
    weight = next(shape for name, shape in shapes.items() if name in ('head.weight', 'classifier.head.weight'))
    assert head == {'head.fc.weight': weight, 'head.fc.bias': (1000, )}
    assert {key[len('backbone.'):]: value.shape for key, value in ours.items() if key not in head} == \
        {key: value.shape for key, value in own.items()}


@pytest.mark.parametrize('config, shapes', [
    ('mask-rcnn_vmamba-t-v2_1x_coco', vmamba_v2_shapes(96, [2, 2, 8, 2], 1, taps=range(4))),
    ('upernet_vmamba-b-v2_8xb2-160k_ade20k-512x512', vmamba_v2_shapes(128, [2, 2, 15, 2], 2, taps=range(4))),
])
def test_whole_detectors_and_segmentors_of_vmamba_both_ways(config, shapes):
    """Their backbone's names stand under ``backbone.``; necks and heads are mmdet's and mmseg's."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{config}.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        own = MODELS.build(cfg.model).state_dict()
        official = {f'backbone.{name}': torch.empty(shape) for name, shape in shapes.items()}
    official.update({name: value for name, value in own.items() if not name.startswith('backbone.')})
    assert any(name.startswith(('roi_head.', 'decode_head.')) for name in official)
    ours, unmatched = from_official(official)
    assert not unmatched
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in own.items()}
    back, unmatched = to_official(ours)
    assert not unmatched
    assert {name: value.shape for name, value in back.items()} == {name: v.shape for name, v in official.items()}


def test_linear_layers_of_vmamba_may_be_convolutions():
    """Version 2 computes on (B, C, H, W): files may hold its linear layers as 1x1 convolutions."""
    shapes = vmamba_v2_shapes(8, [1, 1], 1, classes=5)
    weights = random_weights(shapes)
    ends = ('in_proj.weight', 'out_proj.weight', 'fc1.weight', 'fc2.weight')
    linear = [name for name in shapes if name.endswith(ends)]
    assert len(linear) == 8
    ours, unmatched = from_official({**weights, **{name: weights[name][:, :, None, None] for name in linear}})
    expected, _ = from_official(weights)
    assert not unmatched and ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def vim_features(w, image, depth, stride=8):
    """hustvl/Vim as published (bimamba v2, middle class token, div2), up to the class token before the head."""
    x = F.conv2d(image, w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], stride=stride)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    token = w['cls_token'].expand(len(x), -1, -1)
    x = torch.cat([x[:, :middle], token, x[:, middle:]], dim=1) + w['pos_embed']
    residual = torch.zeros_like(x)
    for i in range(depth):
        residual = residual + x
        mixer = f'layers.{i}.mixer'
        norm = F.rms_norm(residual, residual.shape[-1:], w[f'layers.{i}.norm.weight'], 1e-5)
        xz = (norm @ w[f'{mixer}.in_proj.weight'].t()).transpose(1, 2)

        def scan(xz, b, mixer=mixer):
            x, z = xz.chunk(2, dim=1)
            taps = w[f'{mixer}.conv1d{b}.weight']
            x = F.silu(F.conv1d(F.pad(x, (taps.shape[-1] - 1, 0)), taps, w[f'{mixer}.conv1d{b}.bias'],
                                groups=len(taps)))
            R, N = w[f'{mixer}.dt_proj{b}.weight'].shape[1], w[f'{mixer}.A{b}_log'].shape[1]
            dt, B, C = (w[f'{mixer}.x_proj{b}.weight'] @ x).split([R, N, N], dim=1)
            return selective_scan(x, w[f'{mixer}.dt_proj{b}.weight'] @ dt, -w[f'{mixer}.A{b}_log'].exp(), B, C,
                                  w[f'{mixer}.D{b}'], z, w[f'{mixer}.dt_proj{b}.bias'], True, backend='reference')

        both = scan(xz, '') + scan(xz.flip(-1), '_b').flip(-1)
        x = (both.transpose(1, 2) / 2) @ w[f'{mixer}.out_proj.weight'].t()
    return F.rms_norm(residual + x, x.shape[-1:], w['norm_f.weight'], 1e-5)[:, middle]


def vmamba_features(w, image, depths):
    """MzeroMiko/VMamba, version 0, as published, for even sizes: the last map after its norm."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'])

    x = F.conv2d(image, w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], stride=4).permute(0, 2, 3, 1)
    x = norm(x, 'patch_embed.norm')
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f'layers.{i}.blocks.{j}'
            op = {name.rsplit('self_attention.')[1]: value for name, value in w.items()
                  if name.startswith(f'{block}.self_attention.')}
            y, z = (norm(x, f'{block}.ln_1') @ op['in_proj.weight'].t()).chunk(2, dim=-1)
            y = F.silu(F.conv2d(y.permute(0, 3, 1, 2), op['conv2d.weight'], op['conv2d.bias'], padding=1,
                                groups=y.shape[-1]))
            rows, columns = y.flatten(2), y.transpose(2, 3).flatten(2)
            D, R = op['dt_projs_weight'].shape[1:]
            N = op['A_logs'].shape[1]
            merged = 0
            for k, sequence in enumerate([rows, columns, rows.flip(-1), columns.flip(-1)]):
                part = slice(k * D, (k + 1) * D)
                dt, B, C = (op['x_proj_weight'][k] @ sequence).split([R, N, N], dim=1)
                out = selective_scan(sequence, op['dt_projs_weight'][k] @ dt, -op['A_logs'][part].exp(), B, C,
                                     op['Ds'][part], None, op['dt_projs_bias'][k], True, backend='reference')
                out = out.flip(-1) if k >= 2 else out
                merged = merged + (out.unflatten(2, y.transpose(2, 3).shape[2:]).transpose(2, 3).flatten(2) if k % 2
                                   else out)
            merged = merged.transpose(1, 2).unflatten(1, y.shape[2:])
            x = x + (norm(merged, f'{block}.self_attention.out_norm') * F.silu(z)) @ op['out_proj.weight'].t()
        if i + 1 < len(depths):
            down = f'layers.{i}.downsample'
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
            x = norm(x, f'{down}.norm') @ w[f'{down}.reduction.weight'].t()
    return norm(x, 'norm')


def converted_backbone(weights, model):
    ours, unmatched = from_official(weights)
    assert not unmatched
    model.load_state_dict({name[len('backbone.'):]: value for name, value in ours.items()
                           if name.startswith('backbone.')})
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize('stride, grid, cls_token, same', [
    (8, 4, 'middle', True), (8, 4, 'vim', True), (4, 7, 'vim', True),  # Vim+: patches overlap, on an odd grid
    (4, 7, 'middle', False)])
def test_vim_gives_the_same_numbers(stride, grid, cls_token, same):
    weights = random_weights(vim_shapes(16, 2, N=3, patch=8, grid=grid, classes=5))
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = converted_backbone(weights, LocalVim(
        dict(embed_dims=16, num_layers=2, d_state=3), img_size=32, patch_size=8, stride=stride,
        directions=['h', 'h_flip'], scattn=False, cls_token=cls_token, rope=False, out_type='cls_token'))
    expected = vim_features(weights, image.clone(), 2, stride)
    assert torch.allclose(model(image)[0], expected, rtol=1e-6, atol=1e-6) == same


@torch.no_grad()
def test_vmamba_gives_the_same_numbers():
    weights = random_weights(vmamba_shapes(8, [1, 2], N=3, classes=5))
    image = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    model = converted_backbone(weights, LocalVMamba(
        dict(embed_dims=[8, 16], depths=[1, 2], d_state=3), directions=['h', 'v', 'h_flip', 'v_flip'], scattn=False))
    expected = vmamba_features(weights, image, [1, 2])
    torch.testing.assert_close(model(image)[0].permute(0, 2, 3, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('extra, message', [
    ({'rope.freqs_cos': torch.zeros(16, 16)},
     r'^this is a Vim with rotary positions or without a class token: only the released models with a class token in '
     r'the middle \(midclstok, div2\) are converted; others combine their directions and tokens differently$'),
    ({'cls_token': None}, 'rotary positions or without a class token'),
    ({'layers.1.mixer.D_b': None}, r'layers.1.mixer.ssm.D: the checkpoint has directions \[0\], expected 0 to 1'),
])
def test_other_vims_are_refused(extra, message):
    weights = {**random_weights(vim_shapes(16, 2, N=2, patch=8, grid=4, classes=5)), **extra}
    with pytest.raises(ValueError, match=message):
        from_official({name: value for name, value in weights.items() if value is not None})


@pytest.mark.parametrize('arch', SMALL)
def test_names_that_only_look_alike_are_left_over(arch):
    official, ours = official_of(SMALL[arch]())
    strange = 'layers.x.y', 'backbone.stages.x.y'
    for convert, weights in ((from_official, official), (to_official, ours)):
        assert set(convert({**weights, **dict.fromkeys(strange, torch.zeros(1))})[1]) == set(strange)


@pytest.mark.parametrize('weights, example', [({}, 'nothing'), (dict(a=1, b=2, c=3, d=4), 'a, b, c')])
def test_of_no_family(weights, example):
    with pytest.raises(ValueError) as raised:
        from_official(weights)
    assert str(raised.value) == (
        "this is not a state dict of the authors' LocalVim or LocalVMamba, nor of Vim or VMamba: it has neither "
        'layers.0.mixer.A_log_0 nor layers.0.blocks.0.op.A_logs nor layers.0.mixer.A_b_log nor '
        f'layers.0.blocks.0.self_attention.A_logs, but e.g. {example}')


@pytest.mark.parametrize('arch', SMALL)
def test_supernets_both_ways(arch):
    """The logits of a search have three more axes there."""
    if arch == 'LocalVim':
        model, block = LocalVim(dict(embed_dims=16, num_layers=2, d_state=2), img_size=32, patch_size=8,
                                directions='search'), 'layers.1.mixer'
    else:
        model, block = LocalVMamba(dict(embed_dims=[8, 16], depths=[1, 2], d_state=2), directions='search'), \
            'layers.1.blocks.1.op'
    official, ours = official_of(model)
    logits = {name: tensor for name, tensor in official.items() if name.endswith('multi_scan.weights')}
    assert len(logits) == len(model.directions) and all(tensor.shape == (8, 1, 1, 1) for tensor in logits.values())
    assert f'{block}.multi_scan.weights' in logits
    back, unmatched = from_official(official)
    assert not unmatched and back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


class CfgNode(dict):
    """As in yacs, which need not be installed to read what it wrote."""


def test_released_files_load_with_all_they_hold(tmp_path):
    """Vim's checkpoints hold an argparse.Namespace, VMamba's a configuration of yacs; our names for all weights that
    are not understood are those of the file."""
    vim = {'model': random_weights(vim_shapes(16, 2, N=2, patch=8, grid=4, classes=5)), 'epoch': 3,
           'args': argparse.Namespace(lr=1e-3, model='vim')}
    config = CfgNode(MODEL=CfgNode(NAME='vssm_tiny'))
    config.__dict__['__immutable__'] = True
    vmamba = {'model': {**random_weights(vmamba_shapes(8, [1, 1], N=2, classes=5)), 'surprise': torch.zeros(1)},
              'max_accuracy': 82.2, 'config': config}
    yacs = types.ModuleType('yacs.config')
    yacs.CfgNode = CfgNode
    with mock.patch.dict(sys.modules, {'yacs': types.ModuleType('yacs'), 'yacs.config': yacs}), \
            mock.patch.object(CfgNode, '__module__', 'yacs.config'):
        torch.save(vmamba, tmp_path / 'vmamba.pth')
    torch.save(vim, tmp_path / 'vim.pth')
    assert load_checkpoint(tmp_path / 'vmamba.pth')['config'] == {'MODEL': {'NAME': 'vssm_tiny'}}
    result = run(tmp_path / 'vmamba.pth', tmp_path / 'ours.pth')
    assert result.returncode == 1 and 'not understood: surprise' in result.stderr
    assert run(tmp_path / 'vim.pth', tmp_path / 'ours.pth') == Result(0, '')
    LocalVim(dict(embed_dims=16, num_layers=2, d_state=2), img_size=32, patch_size=8, directions=['h', 'h_flip'],
             scattn=False, cls_token='middle', rope=False, out_type='cls_token',
             init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'ours.pth'))).init_weights()


def test_patch_merging_is_permuted_as_the_authors_unfold():
    """A weight that picks one pixel of one channel picks the same one in both layouts."""
    from mmlocalmamba.layers import PatchMerging
    channels = 3
    image = torch.randn(1, 4, 4, channels)
    official = torch.cat([image[:, 0::2, 0::2], image[:, 1::2, 0::2], image[:, 0::2, 1::2], image[:, 1::2, 1::2]], -1)
    weight, scale, bias = torch.randn(6, 4 * channels), torch.randn(4 * channels), torch.randn(4 * channels)
    expected = torch.nn.functional.layer_norm(official, (4 * channels, ), scale, bias) @ weight.t()
    model = LocalVMamba(dict(embed_dims=[3, 6], depths=[1, 1], d_state=1), directions=['h'], scattn=False)
    names = {f'layers.0.downsample.{key}': value for key, value in
             {'reduction.weight': weight, 'norm.weight': scale, 'norm.bias': bias}.items()}
    complete, _ = to_official(model.state_dict())
    ours, _ = from_official({**complete, **names})
    merging = PatchMerging(channels, 6)
    prefix = 'backbone.stages.0.downsample.'
    merging.load_state_dict({key[len(prefix):]: value for key, value in ours.items() if key.startswith(prefix)})
    result, size = merging(image.flatten(1, 2), (4, 4))
    torch.testing.assert_close(result.view(1, *size, -1), expected)


@pytest.mark.parametrize('arch', SMALL)
@pytest.mark.parametrize('wrap', [None, 'state_dict', 'model', 'state_dict_ema'])
def test_tool_both_ways(tmp_path, arch, wrap):
    official, ours = official_of(SMALL[arch]())
    torch.save(official if wrap is None else {wrap: official, 'epoch': 3}, tmp_path / 'official.pth')
    result = run(tmp_path / 'official.pth', tmp_path / 'ours.pth')
    assert result.returncode == 0, result.stderr
    converted = torch.load(tmp_path / 'ours.pth')['state_dict']
    assert set(converted) == set(ours) and all(torch.equal(converted[name], ours[name]) for name in ours)
    assert run('--to-official', tmp_path / 'ours.pth', tmp_path / 'back.pth').returncode == 0
    back = torch.load(tmp_path / 'back.pth')['state_dict']
    assert set(back) == set(official) and all(torch.equal(back[name], official[name]) for name in official)


@pytest.mark.parametrize('arch', SMALL)
def test_tool_writes_nothing_unless_all_matches(tmp_path, arch):
    official, _ = official_of(SMALL[arch]())
    bias = next(name for name in official if name.endswith('global_reduce.bias'))
    cases = {
        'not understood: surprise': {**official, 'surprise': torch.zeros(1)},
        'missing: backbone.': {name: value for name, value in official.items() if name != bias},
        'shape: backbone.': {**official, bias: torch.zeros(99)},
    }
    for message, weights in cases.items():
        torch.save(weights, tmp_path / 'official.pth')
        result = run(tmp_path / 'official.pth', tmp_path / 'ours.pth')
        assert result.returncode == 1 and message in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ['official.pth']


def test_tool_on_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / 'text.pth').write_text('hello')
    torch.save({'state_dict': {'conv.weight': torch.zeros(1)}}, tmp_path / 'other.pth')
    torch.save({'epoch': 1}, tmp_path / 'empty.pth')
    for name, message in (('text.pth', 'not a plain checkpoint'), ('other.pth', 'neither'),
                          ('empty.pth', 'no state dict'), ('nowhere.pth', 'No such file')):
        result = run(tmp_path / name, tmp_path / 'ours.pth')
        assert result.returncode == 1 and message in result.stderr, result.stderr


class Payload:

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path, )


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({'state_dict': {}, 'x': Payload(tmp_path / 'executed')}, tmp_path / 'evil.pth')
    assert run(tmp_path / 'evil.pth', tmp_path / 'ours.pth').returncode == 1
    model = SMALL['LocalVMamba'](init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'evil.pth')))
    with pytest.raises(RuntimeError, match='Files that execute code are refused'):
        model.init_weights()
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('arch', SMALL)
def test_pretrained_takes_both_formats(tmp_path, arch):
    official, ours = official_of(SMALL[arch]())
    bare = {name[len('backbone.'):]: value for name, value in ours.items() if name.startswith('backbone.')}
    for weights in (official, dict(model=official), dict(state_dict=ours), bare):
        torch.save(weights, tmp_path / 'x.pth')
        model = SMALL[arch](init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
        model.init_weights()
        for name, value in model.state_dict().items():
            assert torch.equal(value, bare[name]), name


@pytest.mark.parametrize('arch', SMALL)
def test_pretrained_into_another_task(tmp_path, arch):
    """A classifier's weights fill a detector's backbone, whose further output norms start afresh."""
    official, ours = official_of(SMALL[arch]())
    torch.save(official, tmp_path / 'x.pth')
    extra = dict(out_type='featmap', out_indices=(0, 1)) if arch == 'LocalVim' else dict(out_indices=(0, 1))
    model = SMALL[arch](init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')), **extra)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert f'backbone.{name}' not in ours or torch.equal(value, ours[f'backbone.{name}'])
    larger = SMALL[arch](init_cfg=None, **extra)
    larger.init_weights()


@pytest.mark.parametrize('arch', SMALL)
def test_pretrained_refuses_less_than_all(tmp_path, arch):
    official, _ = official_of(SMALL[arch]())
    dropped = next(name for name in official if name.endswith('in_proj.weight'))
    torch.save({name: value for name, value in official.items() if name != dropped}, tmp_path / 'x.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    with pytest.raises(RuntimeError, match=r'missing in the file: .*in_proj.weight[\s\S]*add strict=False'):
        SMALL[arch](init_cfg=cfg).init_weights()
    SMALL[arch](init_cfg=dict(**cfg, strict=False)).init_weights()
    torch.save({**official, 'surprise': torch.zeros(1)}, tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match='in the file only: surprise'):
        SMALL[arch](init_cfg=cfg).init_weights()
    other = official_of(SMALL['LocalVMamba' if arch == 'LocalVim' else 'LocalVim']())[0]
    torch.save(other, tmp_path / 'x.pth')
    for strict in (True, False):
        with pytest.raises(RuntimeError, match='x.pth holds a Local.*: it is not of this backbone, a Local'):
            SMALL[arch](init_cfg=dict(**cfg, strict=strict)).init_weights()


def test_localvim_s_link_is_known_to_be_wrong(tmp_path):
    """The authors' README links LocalVMamba-S's file for LocalVim-S."""
    with torch.device('meta'):
        weights = {f'backbone.{name}': value for name, value in LocalVMamba('small').state_dict().items()}
    official = {name: value for name, value in to_official(weights)[0].items() if 'out_proj' in name}
    official = {name: torch.zeros(value.shape) for name, value in official.items()}
    official.update({'layers.0.blocks.0.op.A_logs': torch.zeros(768, 16),
                     'layers.0.blocks.0.op.dt_projs_bias': torch.zeros(4, 192)})
    torch.save(dict(state_dict=official), tmp_path / 'local_vssm_small.ckpt')
    model = LocalVim('small', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'local_vssm_small.ckpt')))
    with pytest.raises(RuntimeError, match='local_vssm_small.ckpt holds a LocalVMamba of 2, 2, 27, 2 blocks.*'
                                           "It is the file of LocalVMamba-S, .* links for LocalVim-S as well"):
        model.init_weights()


def test_positions_of_another_grid_are_resized(tmp_path):
    official, _ = official_of(SMALL['LocalVim']())
    torch.save(official, tmp_path / 'x.pth')
    model = LocalVim(dict(embed_dims=16, num_layers=2, d_state=2), img_size=64, patch_size=8, directions=['h', 'w2'],
                     init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    model.init_weights()
    assert model.pos_embed.shape == (1, 64, 16)
    assert model.pos_embed.mean().item() == pytest.approx(official['pos_embed'].mean().item(), abs=0.1)


def test_find_state_dict():
    weights = {'module.a': torch.zeros(1)}
    assert set(find_state_dict(dict(other=weights), 'other')) == {'a'}
    with pytest.raises(ValueError, match="no entry 'ema'; state dicts are under none$"):
        find_state_dict(weights, 'ema')


