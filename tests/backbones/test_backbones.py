import copy
import json
import threading

import pytest
import torch

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.directions import scan_tables
from mmlocalmamba.layers import SCAttn, rotary_tables
from mmlocalmamba.layers.mixers import _Mixer
from mmlocalmamba.ops import rotate

VMAMBA = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 2, 1], d_state=2)
VIM = dict(embed_dims=16, num_layers=3, d_state=2)
FOUR = ['h', 'v_flip', 'w2', 'w3_flip']


def vmamba(**kwargs):
    torch.manual_seed(0)
    return LocalVMamba(**{**dict(arch=VMAMBA, directions=FOUR, out_indices=(0, 1, 2, 3)), **kwargs})


def vim(**kwargs):
    torch.manual_seed(0)
    return LocalVim(**{**dict(arch=VIM, directions=FOUR, img_size=32, patch_size=4, out_type='featmap',
                              out_indices=(0, 2)), **kwargs})


@pytest.mark.parametrize('H,W', [(4, 4), (4, 37), (33, 5), (32, 32), (47, 61)])
@pytest.mark.parametrize('window_pad', ['zero', 'none'])
def test_vmamba_on_any_size(H, W, window_pad):
    outs = vmamba(window_pad=window_pad)(torch.randn(2, 3, H, W))
    assert isinstance(outs, tuple)
    h, w = H // 4, W // 4
    for out, channels in zip(outs, VMAMBA['embed_dims']):
        assert out.shape == (2, channels, h, w) and torch.isfinite(out).all()
        h, w = (h + 1) // 2, (w + 1) // 2


@pytest.mark.parametrize('H,W', [(4, 4), (4, 37), (33, 5), (32, 32), (47, 61)])
@pytest.mark.parametrize('cls_token', ['none', 'middle'])
def test_vim_on_any_size(H, W, cls_token):
    outs = vim(cls_token=cls_token, rope=cls_token == 'none')(torch.randn(2, 3, H, W))
    assert isinstance(outs, tuple) and len(outs) == 2
    for out in outs:
        assert out.shape == (2, 16, -(-H // 4), -(-W // 4)) and torch.isfinite(out).all()


@pytest.mark.parametrize('kwargs', [dict(out_type='avg_featmap', out_indices=-1),
                                    dict(out_type='cls_token', cls_token='middle', rope=False, out_indices=-1)])
def test_vim_pooled(kwargs):
    (out, ) = vim(**kwargs)(torch.randn(2, 3, 20, 28))
    assert out.shape == (2, 16)


@pytest.mark.parametrize('window_pad', ['zero', 'none'])
@pytest.mark.parametrize('build', [vmamba, vim])
def test_mixers_get_the_tables_of_their_directions(build, window_pad):
    """Incomplete windows, at a size at which two windows leave pads."""
    model, seen = build(window_pad=window_pad, directions=[['h', f'w{index + 2}'] for index in range(3)]
                        if build is vim else FOUR), []
    for module in model.modules():
        if isinstance(module, _Mixer):
            module.register_forward_pre_hook(lambda mixer, inputs: seen.append((mixer.directions, inputs[-1])))
    model(torch.randn(1, 3, 20, 28))
    sizes = [(5, 7), (3, 4), (2, 2), (2, 2), (1, 1)] if build is vmamba else [(5, 7)] * 3
    for (names, tables), size in zip(seen, sizes, strict=True):
        for table, expected in zip(tables, scan_tables(names, *size, pad=window_pad == 'zero'), strict=True):
            assert torch.equal(table, expected)


def test_vim_residual_features_contain_the_stream():
    image = torch.randn(1, 3, 32, 32)
    mixer, residual = (vim(out_feature=feature).eval()(image)[-1] for feature in ('mixer', 'residual'))
    assert not torch.allclose(mixer, residual)


@pytest.mark.parametrize('build', [vmamba, vim])
def test_image_smaller_than_a_patch(build):
    with pytest.raises(ValueError, match='3x9 pixels is smaller than a patch of 4'):
        build()(torch.randn(1, 3, 3, 9))


@pytest.mark.parametrize('build', [vmamba, vim])
def test_a_transposed_image_swaps_h_and_v(build):
    """Holds for every H and W only if 'v' is right on rectangles. Convolutions and positions are made symmetric."""
    first, second = (build(directions=[name], **(dict(rope=False) if build is vim else {})).eval()
                     for name in ('h', 'v'))
    for model in (first, second):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            value = torch.randn_like(parameter) * 0.1
            if 'conv2d.weight' in name or 'projection.weight' in name:
                value = value + value.transpose(-1, -2)
            elif name == 'pos_embed':
                value = torch.zeros_like(parameter)
            elif 'downsample' in name and value.shape[-1] % 4 == 0:
                # PatchMerging holds (channel, row, column)
                grid = value.view(*value.shape[:-1], -1, 2, 2)
                value = (grid + grid.transpose(-1, -2)).flatten(-3)
            parameter.data = value
    image = torch.randn(1, 3, 24, 40)
    for a, b in zip(first(image), second(image.transpose(-1, -2))):
        torch.testing.assert_close(a, b.transpose(-1, -2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('build', [vmamba, vim])
def test_forward_writes_nothing_and_threads_agree(build):
    model = build().eval()
    images = [torch.randn(1, 3, 24, 24), torch.randn(1, 3, 16, 40)]
    state = {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()}
    expected = [model(image) for image in images]
    assert state == {name: {key: id(value) for key, value in vars(module).items()}
                     for name, module in model.named_modules()}
    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: model(images[i % 2])})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)  # an exception in a thread is nobody else's
    for i, outs in results.items():
        for out, reference in zip(outs, expected[i % 2]):
            torch.testing.assert_close(out, reference)


@pytest.mark.parametrize('build', [vmamba, vim])
def test_items_of_a_batch_are_independent(build):
    model, images = build().eval(), torch.randn(3, 3, 20, 28)
    for alone, together in zip(model(images[1:2]), model(images)):
        torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('build', [vmamba, vim])
def test_every_parameter_gets_a_gradient_also_with_checkpointing(build):
    image, grads = torch.randn(2, 3, 24, 20), []
    for with_cp in (False, True):
        model = build(with_cp=with_cp, drop_path_rate=0.)
        sum(out.square().sum() for out in model(image)).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and torch.isfinite(grad).all(), name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize('build', [vmamba, vim])
def test_search_has_a_logit_per_candidate(build):
    model = build(directions='search', arch={**(VMAMBA if build is vmamba else VIM)})
    alphas = [parameter for name, parameter in model.named_parameters() if name.endswith('mixed_scan.alphas')]
    assert len(alphas) == len(model.directions) and all(alpha.shape == (8, ) for alpha in alphas)
    sum(out.square().sum() for out in model(torch.randn(1, 3, 16, 16))).backward()
    assert all(alpha.grad.abs().sum() > 0 for alpha in alphas)


@pytest.mark.parametrize('build', [vmamba, vim])
def test_bfloat16_autocast(build):
    model = build()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = model(torch.randn(2, 3, 20, 20))
        sum(out.float().square().sum() for out in outs).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


FROZEN = {  # what each number adds
    vmamba: (['patch_embed.'], ['stages.0.', 'norm0.'], ['stages.1.', 'norm1.'], ['stages.2.', 'norm2.'],
             ['stages.3.', 'norm3.']),
    vim: (['patch_embed.', 'pos_embed', 'cls_token'], ['layers.0.', 'out_norms.0.'], ['layers.1.'],
          ['layers.2.', 'out_norms.1.']),
}


@pytest.mark.parametrize('build', [vmamba, vim])
@pytest.mark.parametrize('after', ['construction', 'init_weights', 'train', 'deepcopy'])
def test_frozen_stages(build, after):
    """As in mmdet's Swin: stages with their output norms, and modules stay in eval mode."""
    for stages in range(-1, len(FROZEN[build])):
        model = build(frozen_stages=stages, **(dict(cls_token='middle', rope=False) if build is vim else {}))
        if after == 'init_weights':
            model.init_weights()
        elif after == 'train':
            model.eval()
            model.train()
        elif after == 'deepcopy':
            model = copy.deepcopy(model)
        prefixes = tuple(prefix for added in FROZEN[build][:stages + 1] for prefix in added)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(prefixes), (stages, name)
        if after in ('train', 'deepcopy'):
            for name, module in model.named_modules():
                frozen = bool(prefixes) and f'{name}.'.startswith(prefixes) and bool(list(module.parameters()))
                if frozen or list(module.parameters(recurse=False)):
                    assert module.training != frozen, (stages, name)


def test_the_last_norm_is_frozen_with_everything():
    for stages, frozen in ((2, False), (3, True)):
        model = vim(out_type='avg_featmap', out_indices=-1, frozen_stages=stages)
        assert model.norm.weight.requires_grad != frozen


@pytest.mark.parametrize('build', [vmamba, vim])
def test_there_is_no_norm_eval(build):
    """There is no BatchNorm that it could have kept from learning."""
    with pytest.raises(TypeError, match='norm_eval'):
        build(norm_eval=True)


@pytest.mark.parametrize('H, W', [(16, 16), (17, 31), (8, 40)])
@pytest.mark.parametrize('patch, stride', [(8, 8), (8, 4), (8, 3), (8, 1)])
def test_patches_cover_the_image(H, W, patch, stride):
    model = vim(patch_size=patch, stride=stride, img_size=(H, W), out_indices=-1).eval()
    rows, columns = model.grid
    assert (rows - 1) * stride + patch >= H > (rows - 2) * stride + patch or rows == 1
    assert (columns - 1) * stride + patch >= W > (columns - 2) * stride + patch
    assert model(torch.randn(1, 3, H, W))[0].shape[2:] == model.grid == model.token_grid(H, W)
    assert model.pos_embed.shape[1] == rows * columns


@pytest.mark.parametrize('stride', [0, -1, 9])
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(ValueError, match=f'stride must be from 1 to patch_size 8, got {stride}'):
        vim(patch_size=8, stride=stride)


@pytest.mark.parametrize('build,blocks', [(vmamba, 5), (vim, 3)])
def test_layer_depth_grows_from_input_to_output(build, blocks):
    model = build()
    depths = {}
    for name, _ in model.named_parameters():
        depth, count = model.get_layer_depth(f'backbone.{name}', 'backbone.')
        assert 0 <= depth < count == blocks + 2
        depths.setdefault(depth, []).append(name)
    assert sorted(depths) == list(range(blocks + 2))
    assert all('norm' in name for name in depths[blocks + 1])


@pytest.mark.parametrize('kwargs,message', [
    (dict(arch='huge'), "unknown arch 'huge': known are nano, tiny, small"),
    (dict(arch=dict(d_state=1)), 'lacks embed_dims'),
    (dict(out_indices=(0, 9)), 'out of range'),
    (dict(out_indices=(1, 1)), 'each once'),
    (dict(frozen_stages=77), 'frozen_stages'),
    (dict(directions=[]), 'directions must be a list'),
    (dict(directions=['h', 'x']), "unknown scan 'x'"),
    (dict(directions=[['h']] * 2), 'has 2 entries, but the backbone has'),
    (dict(directions=[[], ['h'], ['h']]), 'entries, but|must be a list of scan names'),
    (dict(directions='nowhere.json'), "directions='nowhere.json' is neither 'search' nor a file"),
    (dict(window_pad='reflect'), 'window_pad must be one of'),
    (dict(scattn=dict(reduction=1000)), 'reduction=1000 leaves no channel'),
])
@pytest.mark.parametrize('build', [vmamba, vim])
def test_bad_arguments(build, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize('kwargs,message', [
    (dict(cls_token='front'), 'cls_token must be one of'),
    (dict(out_type='cls_token', out_indices=-1), "^out_type='cls_token' needs cls_token='middle' or 'vim'$"),
    (dict(arch=dict(embed_dims=18, num_layers=3)), 'rope needs embed_dims divisible by 4, got 18'),
    (dict(cls_token='middle', rope=True), 'rope=True does not go with'),
    (dict(out_type='avg_featmap', out_indices=0), 'pools the last block only'),
    (dict(out_feature='sum'), 'out_feature must be one of'),
])
def test_bad_arguments_of_vim(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vim(**kwargs)


@pytest.mark.parametrize('kwargs,message', [
    (dict(arch=dict(embed_dims=[8], depths=[1], patch_embed='overlap')),
     "patch_embed must be one of patch, conv, got 'overlap'"),
    (dict(arch=dict(embed_dims=[8], depths=[1], downsample='pool')),
     "downsample must be one of merge, conv, got 'pool'"),
    (dict(arch='nano_v2', patch_size=8), "patch_embed='conv' takes patch_size 1, 2 or 4, got 8"),
])
def test_bad_arguments_of_vmamba(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LocalVMamba(**{'directions': ['h'], **kwargs})


@pytest.mark.parametrize('build', [vmamba, vim])
def test_init_cfg_is_kept(build):
    cfg = dict(type='Pretrained', checkpoint='nowhere.pth')
    assert build(init_cfg=cfg).init_cfg == cfg


def test_directions_from_a_file(tmp_path):
    blocks = [['h', 'w5'], ['v'], ['h_flip', 'v', 'w2']]
    for content in (blocks, dict(directions=blocks, epoch=3)):
        path = tmp_path / 'directions.json'
        path.write_text(json.dumps(content))
        assert vim(directions=str(path)).directions == [tuple(block) for block in blocks]
    path.write_text('{"directions": ')
    with pytest.raises(ValueError, match='directions.json is not JSON'):
        vim(directions=str(path))
    path.write_text('{"alphas": []}')
    with pytest.raises(ValueError, match="has no entry 'directions'; it has alphas"):
        vim(directions=str(path))


def test_mamba_initialisation_is_kept():
    ssm = vmamba().stages[0].blocks[0].mixer.ssm
    dt = torch.nn.functional.softplus(ssm.dt_proj_bias)
    assert 0.9e-3 <= dt.min() and dt.max() <= 1.1e-1 and dt.std() > 0
    torch.testing.assert_close(ssm.A_log.exp(), torch.tensor([1., 2.]).expand_as(ssm.A_log))


def test_scattn_weighs_channels_and_tokens():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 10, 16)
    channel, both = SCAttn(16), SCAttn(16, reduction=4, spatial=True)
    assert channel.gate(x).shape == (2, 4, 1, 16)
    assert both.gate(x).shape == (2, 4, 10, 16)
    for module in (channel, both):
        gate = module.gate(x)
        assert (gate > 0).all() and (gate < 1).all()
        torch.testing.assert_close(module(x), x * gate)
        torch.testing.assert_close(module(x)[:, 2], module(x[:, 2]))
    # Within a direction the spatial weight is one number per token: it scales all channels of the token alike.
    ratio = both.gate(x) / channel_part(both, x)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


def channel_part(module, x):
    x_global = torch.nn.functional.gelu(module.global_reduce(module.norm(x).mean(-2, keepdim=True)))
    return module.channel_select(x_global).sigmoid()


@pytest.mark.parametrize('H,W', [(14, 14), (9, 20)])
def test_rotary_embedding_is_a_rotation_at_any_size(H, W):
    x = torch.randn(2, H * W, 16)
    turned = rotate(x, *rotary_tables(H, W, 16, 14, x.device))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    # Moving by one row at the pre-training size turns every pair of the first half by its own fixed angle.
    cos, sin = rotary_tables(14, 14, 16, 14, x.device)
    angle = torch.atan2(sin, cos).view(14, 14, 16)
    step = (angle[1:, :, :8] - angle[:-1, :, :8] + torch.pi) % (2 * torch.pi)
    torch.testing.assert_close(step, step[:1, :1].expand_as(step), atol=1e-4, rtol=0)
