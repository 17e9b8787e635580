"""init_cfg: whose weights a file holds, which of them are taken, what they need, and what the report says."""
import http.client
import logging
import math
import urllib.error
from unittest import mock

import pytest
import torch
from synthetic import state_dict as synthetic
from test_official import SMALL, official_of, random_weights, run, vim_shapes, vmamba_shapes
from torch import nn

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.layers import resize_pos_embed, resized_rotary_tables, rotary_tables
from mmlocalmamba.weights import from_official, load_checkpoint

VMAMBA = ['h', 'v', 'h_flip', 'v_flip']
VMAMBA_ARCH = dict(embed_dims=[8, 16], depths=[1, 2], d_state=3)


def float32(weights):
    return {name: value.float() for name, value in weights.items()}


def vim(**kwargs):
    return LocalVim(dict(embed_dims=16, num_layers=2, d_state=3),
                    **{**dict(img_size=224, directions=['h', 'h_flip'], scattn=False, cls_token='vim', rope=False,
                              out_type='cls_token'), **kwargs})


def vmamba(**kwargs):
    return LocalVMamba(VMAMBA_ARCH, **{**dict(directions=VMAMBA, scattn=False), **kwargs})


@pytest.fixture
def log(monkeypatch):
    """Messages that are logged while weights are loaded: (message, level)."""
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append((record.getMessage(), record.levelno))

    logger = logging.getLogger('mmlocalmamba')
    monkeypatch.setattr(logger, 'handlers', [Keep()])
    monkeypatch.setattr(logger, 'propagate', False)
    monkeypatch.setattr(logger, 'level', logging.INFO)
    logger.manager._clear_cache()
    return lines


def load(model, tmp_path, checkpoint, **options):
    torch.save(checkpoint, tmp_path / 'x.pth')
    model.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'), **options)
    model.init_weights()
    return model


def detector_of(official, taps):
    """The state dict of a detector: a backbone without classifier, with output norms, and other parts."""
    weights = {f'backbone.{name}': value for name, value in official.items()
               if not name.startswith(('head.', 'classifier.', 'norm.', 'norm_f.'))}
    weights.update({f'backbone.{name}.{leaf}': torch.randn(size) for name, size in taps.items()
                    for leaf in ('weight', 'bias')})
    return {**weights, 'neck.lateral_convs.0.conv.weight': torch.randn(4, 8, 1, 1),
            'rpn_head.rpn_cls.bias': torch.ones(3)}


DETECTORS = {
    'LocalVim': (lambda: official_of(SMALL['LocalVim']())[0], {'outnorm_0': 16, 'outnorm_1': 16},
                 lambda: SMALL['LocalVim'](out_type='featmap', out_indices=(0, 1))),
    'LocalVMamba': (lambda: official_of(SMALL['LocalVMamba']())[0], {'outnorm0': 8, 'outnorm2': 32},
                    lambda: SMALL['LocalVMamba'](out_indices=(0, 2))),
    'VMamba': (lambda: float32(random_weights(vmamba_shapes(8, [1, 2], N=3))), {'outnorm0': 8, 'outnorm1': 16},
               lambda: vmamba(out_indices=(0, 1))),
}


@pytest.mark.parametrize('family', DETECTORS)
@pytest.mark.parametrize('way', ['init_cfg', 'tool', 'wrapped'])
def test_detectors_of_the_authors(tmp_path, family, way):
    official, taps, build = DETECTORS[family]
    weights = detector_of(official(), taps)
    ours, unmatched = from_official(weights)
    assert not unmatched and all(ours[name] is weights[name] for name in weights if not name.startswith('backbone.'))
    checkpoint = dict(state_dict=weights, meta=dict(epoch=12))
    if way == 'wrapped':
        checkpoint = dict(state_dict={f'module.module.{name}': value for name, value in weights.items()})
    elif way == 'tool':
        torch.save(checkpoint, tmp_path / 'theirs.pth')
        assert run(tmp_path / 'theirs.pth', tmp_path / 'ours.pth').returncode == 0
        checkpoint = torch.load(tmp_path / 'ours.pth')
        assert set(checkpoint['state_dict']) == set(ours)
    model = load(build(), tmp_path, checkpoint)
    taken = {f'backbone.{name}': value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, ours[name]) for name, value in taken.items())
    assert {name for name in ours if name.startswith('backbone.')} == set(taken)


@pytest.mark.parametrize('change, message', [
    ({'layers.0.norm.bias': torch.zeros(16)},
     r'has LayerNorm \(layers.0.norm.bias\).*cannot compute the same$'),
    ({'layers.1.mixer.A_log_0': None},
     r'layers.1.mixer.ssm.A_log: the checkpoint has directions \[1\], expected 0 to 1'),
])
def test_vims_that_have_no_counterpart(tmp_path, change, message):
    weights = {**official_of(SMALL['LocalVim']())[0], **change}
    with pytest.raises(ValueError, match=f'x.pth: .*{message}'):
        load(SMALL['LocalVim'](), tmp_path, {name: value for name, value in weights.items() if value is not None})


def test_vmambas_between_the_versions_are_refused(tmp_path):
    weights = {**official_of(SMALL['LocalVMamba']())[0], 'layers.0.downsample.1.weight': torch.zeros(2, 2, 2, 2)}
    with pytest.raises(ValueError, match=r'between versions 0 and 2: .* of 2x2 \(layers.0.downsample.1.weight\)'):
        load(SMALL['LocalVMamba'](), tmp_path, weights)


@pytest.mark.parametrize('arch, lost, message', [
    ('LocalVim', ['layers.1.mixer.A_log_0', 'layers.1.mixer.A_log_1'], 'layers.1.mixer.ssm.A_log'),
    ('LocalVim', ['layers.0.mixer.A_log_0', 'layers.0.mixer.A_log_1'], 'layers.0.mixer.ssm.A_log'),
    ('LocalVMamba', ['layers.0.blocks.0.op.dt_projs_bias'], 'stages.0.blocks.0.mixer.ssm.dt_proj_bias'),
    ('LocalVMamba', ['layers.0.blocks.0.op.A_logs'], 'stages.0.blocks.0.mixer.ssm.A_log'),
])
def test_parts_of_the_state_space_are_missing(tmp_path, arch, lost, message):
    weights = official_of(SMALL[arch]())[0]
    for name in lost:
        del weights[name]
    with pytest.raises(RuntimeError, match=f'1 missing in the file: {message}'):
        load(SMALL[arch](), tmp_path, weights)
    torch.save(weights, tmp_path / 'theirs.pth')
    result = run(tmp_path / 'theirs.pth', tmp_path / 'ours.pth')
    assert result.returncode == 1 and 'missing: backbone.' in result.stderr


def test_no_word_on_the_number_of_directions():
    weights = official_of(SMALL['LocalVMamba']())[0]
    op = 'layers.1.blocks.0.op.'
    for name in ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias'):
        del weights[op + name]
    with pytest.raises(ValueError, match=f'{op}A_logs: the number of scan directions is unknown'):
        from_official(weights)


@pytest.mark.parametrize('arch', SMALL)
def test_the_report_counts_and_groups(tmp_path, log, arch):
    official, ours = official_of(SMALL[arch]())
    own = len(SMALL[arch]().state_dict())
    load(SMALL[arch](), tmp_path, official)
    message, level = log[-1]
    assert f'{own} of {own} weights of {arch.split()[0]} come from {tmp_path}/x.pth' in message and level == 20
    lost = [name for name in ours if '.scattn.' in name]
    wrong = next(name for name in ours if name.endswith('out_proj.weight'))
    partial = {name: value for name, value in ours.items() if name not in lost}
    partial.update({wrong: torch.zeros(3), 'backbone.surprise': torch.zeros(1)})
    load(SMALL[arch](), tmp_path, partial, strict=False)
    message, level = log[-1]
    assert f'{own - len(lost) - 1} of {own} weights' in message and level == 30
    assert f'{len(lost)} missing in the file:\n' in message and '1 in the file only: surprise' in message
    assert f'1 of another shape: {wrong[len("backbone."):]} ((3,) in the file, (' in message
    blocks = len(lost) // 6
    block = 'layers.*' if arch == 'LocalVim' else 'stages.*.blocks.*'
    if arch == 'LocalVim':
        assert f'    {block}.mixer.scattn.norm.weight ({blocks})\n' in message
    assert len([line for line in message.splitlines() if 'scattn' in line]) == 6
    two = [name for name in ours if name.endswith(('patch_embed.projection.weight', 'patch_embed.projection.bias'))]
    load(SMALL[arch](), tmp_path, {name: value for name, value in ours.items() if name not in two}, strict=False)
    assert '2 missing in the file: patch_embed.projection.weight, patch_embed.projection.bias' in log[-1][0]


def test_which_weights_are_taken_is_said(tmp_path, log, capsys):
    official, ours = official_of(SMALL['LocalVim']())
    average = {f'module.{name}': value + 1 for name, value in official.items() if not name.startswith('rope.')}
    checkpoint = dict(model=official, model_ema=average, optimizer=dict(state={}), epoch=3, ema_model=None)
    for options, shift in (({}, 0), (dict(key='model_ema'), 1)):
        model = load(SMALL['LocalVim'](), tmp_path, checkpoint, **options)
        assert torch.equal(model.pos_embed, ours['backbone.pos_embed'] + shift)
        taken, other = ('model', 'model_ema')[::1 - 2 * shift]
        assert f"taken from the entry '{taken}'; another is taken with key='{other}'" in log[-1][0]
    torch.save(checkpoint, tmp_path / 'theirs.pth')
    for options, shift in (((), 0), (('--key', 'model_ema'), 1)):
        capsys.readouterr()
        assert run(*options, tmp_path / 'theirs.pth', tmp_path / 'ours.pth').returncode == 0
        assert "another is taken with key='model" in capsys.readouterr().out
        converted = torch.load(tmp_path / 'ours.pth')['state_dict']
        assert torch.equal(converted['backbone.pos_embed'], ours['backbone.pos_embed'] + shift)
    model = load(SMALL['LocalVim'](), tmp_path, dict(model_ema=average))
    assert torch.equal(model.pos_embed, ours['backbone.pos_embed'] + 1) and 'another is taken' not in log[-1][0]
    with pytest.raises(ValueError, match="x.pth: .* no entry 'ema'; state dicts are under model, model_ema"):
        load(SMALL['LocalVim'](), tmp_path, checkpoint, key='ema')


@pytest.mark.parametrize('channels, told', [(384, True), (192, False)])
def test_the_shadowed_name_is_told(tmp_path, log, channels, told):
    arch = dict(embed_dims=channels, num_layers=1, d_state=1)
    build = lambda: LocalVim(arch, img_size=32, directions=['h', 'v'])  # noqa: E731
    load(build(), tmp_path, official_of(build())[0])
    assert ('localvim-s-nosearch' in log[-1][0]) == told
    assert 'do not name their scan directions' in log[-1][0]


VIM_GRIDS = {16: 14, 8: 27}


@pytest.mark.parametrize('here', VIM_GRIDS)
@pytest.mark.parametrize('theirs', VIM_GRIDS)
@pytest.mark.parametrize('way', ['authors', 'ours', 'tool'])
def test_vim_plus_is_no_vim(tmp_path, here, theirs, way):
    """Both have the same weights but for the number of positions, and positions can be resized."""
    weights = float32(random_weights(vim_shapes(16, 2, N=3, grid=VIM_GRIDS[theirs], classes=5)))
    if way == 'tool':
        torch.save(weights, tmp_path / 'theirs.pth')
        assert run(tmp_path / 'theirs.pth', tmp_path / 'ours.pth').returncode == 0
        weights = torch.load(tmp_path / 'ours.pth')
    elif way == 'ours':
        weights = vim(stride=theirs).state_dict()
    if here == theirs:
        assert load(vim(stride=here), tmp_path, weights).grid == (VIM_GRIDS[here], ) * 2
        return
    with pytest.raises(RuntimeError, match=f'stride: its weights were trained with {theirs}, here: {here}'):
        load(vim(stride=here), tmp_path, weights)
    load(vim(stride=here), tmp_path, weights, allow=['stride'])


def test_vim_plus_needs_the_class_token_of_vim(tmp_path):
    weights = float32(random_weights(vim_shapes(16, 2, N=3, grid=27, classes=5)))
    with pytest.raises(RuntimeError, match='cls_token: its weights were trained with vim, here: None'):
        load(vim(stride=8, cls_token='middle'), tmp_path, weights)
    load(vim(cls_token='middle'), tmp_path, float32(random_weights(vim_shapes(16, 2, N=3, classes=5))))


def test_resized_positions_are_told(tmp_path, log):
    load(vim(img_size=64), tmp_path, float32(random_weights(vim_shapes(16, 2, N=3, classes=5))))
    assert ('LocalVim: positions of 14x14 tokens are resized to 4x4', 20) in log
    log.clear()
    load(vim(), tmp_path, float32(random_weights(vim_shapes(16, 2, N=3, classes=5))))
    assert not [message for message, _ in log if 'were resized' in message]


@pytest.mark.parametrize('build, shapes, wrong, message', [
    (vmamba, vmamba_shapes(8, [1, 2], N=3), ['h', 'h_flip', 'v', 'v_flip'],
     r'weights were trained with h, v, h_flip, v_flip in block 0, here: h, h_flip, v, v_flip in block 0 \(3 of'),
    (vim, vim_shapes(16, 2, N=3), ['h_flip', 'h'], 'trained with h, h_flip in block 0, here: h_flip, h in block 0'),
])
def test_directions_of_known_families(tmp_path, build, shapes, wrong, message):
    weights = float32(random_weights(shapes))
    right = load(build(), tmp_path, weights)
    with pytest.raises(RuntimeError, match=message):
        load(build(directions=wrong), tmp_path, weights)
    allowed = load(build(directions=wrong), tmp_path, weights, allow=['directions'])
    assert all(torch.equal(value, right.state_dict()[name]) for name, value in allowed.state_dict().items())


def test_directions_in_one_block_or_of_another_depth_are_named():
    theirs = vmamba(directions=[['h'], ['v'], ['h']]).state_dict()
    with pytest.raises(RuntimeError, match=r'trained with v in block 1, here: h in block 1 \(1 of 3 blocks differ\)'):
        vmamba(directions=['h']).load_state_dict(theirs)
    with pytest.raises(RuntimeError, match='trained with 3 blocks, here: 2 blocks'):
        LocalVMamba(dict(embed_dims=[8, 16], depths=[1, 1], d_state=3), directions=['h'],
                    scattn=False).load_state_dict(theirs)


def test_nothing_of_this_backbone_is_refused():
    """MMEngine passes its own strictness on to nobody: it would go on with random weights."""
    model = nn.Module()
    model.backbone, model.head = vim(), nn.Linear(2, 2)
    for strict in (False, True):
        with pytest.raises(RuntimeError, match='LocalVim: the checkpoint has no weight of it under "backbone."'
                           '.* If it holds other parts of the model, load it into these$'):
            model.load_state_dict({'backbone.conv.weight': torch.zeros(1)}, strict=strict)
    model.head.load_state_dict(nn.Linear(2, 2).state_dict())


NEAREST = {'h': 0, 'v': 1, 'h_flip': 2, 'v_flip': 3, 'w2': 0, 'w7_flip': 2}


@pytest.mark.parametrize('source', ['theirs', 'ours'])
def test_a_localvmamba_starts_from_a_vmamba(tmp_path, log, source):
    if source == 'ours':
        weights = ours = vmamba().state_dict()
    else:
        weights = float32(random_weights(vmamba_shapes(8, [1, 2], N=3)))
        ours = {name[len('backbone.'):]: value for name, value in from_official(weights)[0].items()}
    directions = [['h', 'v_flip', 'w7_flip', 'w2'], ['v', 'h', 'h_flip'], ['w2', 'v']]
    build = lambda: LocalVMamba(VMAMBA_ARCH, directions=directions)  # noqa: E731
    with pytest.raises(RuntimeError, match='directions: its weights were trained with h, v, h_flip, v_flip'):
        load(build(), tmp_path, weights)
    model = load(build(), tmp_path, weights, partial='vmamba')
    own = model.state_dict()
    new = [name for name in own if '.scattn.' in name]
    assert f'{len(own) - len(new)} of {len(own)} weights of LocalVMamba' in log[-1][0] and log[-1][1] == 20
    assert f'{len(new)} new, left as initialised:\n    stages.*.blocks.*.mixer.scattn.norm.weight (3)' in log[-1][0]
    blocks = ['stages.0.blocks.0', 'stages.1.blocks.0', 'stages.1.blocks.1']
    for name, value in own.items():
        if '.mixer.ssm.' in name:
            for k, scan in enumerate(directions[blocks.index(name.split('.mixer.')[0])]):
                assert torch.equal(value[k], ours[name][NEAREST[scan]]), (name, scan)
        elif name not in new:
            assert torch.equal(value, ours[name]), name


def test_a_partial_start_is_for_what_it_is_named_for(tmp_path):
    for weights in (official_of(SMALL['LocalVMamba']())[0], vmamba(scattn=True).state_dict(),
                    vmamba(directions=['h', 'h_flip', 'v', 'v_flip']).state_dict()):
        with pytest.raises(RuntimeError, match="'vmamba' starts a LocalVMamba from a VMamba, .* this is not one"):
            load(SMALL['LocalVMamba'](), tmp_path, weights, partial='vmamba')
    weights = float32(random_weights(vmamba_shapes(8, [1, 2], N=3)))
    del weights['patch_embed.norm.bias']
    with pytest.raises(RuntimeError, match='1 missing in the file: patch_embed.norm.bias'):
        load(vmamba(scattn=True), tmp_path, weights, partial='vmamba')
    with pytest.raises(ValueError, match="partial must be one of .*'vmamba'.*, got 'vim'"):
        load(vmamba(), tmp_path, weights, partial='vim')


def test_what_vmamba_t_fills_of_localvmamba_t(tmp_path, log):
    """In a detector, whose three more output norms are new as well."""
    load(LocalVMamba('tiny', out_indices=(0, 1, 2, 3)), tmp_path,
         synthetic(vmamba_shapes(96, [2, 2, 9, 2], classes=1)), partial='vmamba')
    assert '210 of 306 weights of LocalVMamba' in log[-1][0] and '96 new, left as initialised' in log[-1][0]


@pytest.mark.parametrize('error', [urllib.error.URLError('Name or service not known'), TimeoutError('timed out'),
                                   urllib.error.HTTPError('https://x.org/a.pth', 404, 'Not Found', {}, None),
                                   http.client.RemoteDisconnected('closed'), ConnectionResetError(104, 'reset')])
def test_network_failures_are_no_damage(error, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    model = SMALL['LocalVim']()
    with mock.patch('mmlocalmamba.files.urlopen', side_effect=error), \
            pytest.raises(RuntimeError, match='https://x.org/a.pth was not fetched') as raised:
        model.load_pretrained('https://x.org/a.pth')
    assert 'damaged' not in str(raised.value) and str(error) in str(raised.value)


def tables_in_their_file(side, resized):
    """Return cosines and sines as the authors' code stores them for a model whose grid has this side."""
    cos, sin = rotary_tables(14, 14, 16, 14, torch.device('cpu')) if resized else \
        rotary_tables(side, side, 16, 14, torch.device('cpu'))
    if resized:
        cos, sin = (resize_pos_embed(table[None], (14, 14), (side, side))[0] for table in (cos, sin))
    return {'rope.freqs_cos': cos, 'rope.freqs_sin': sin}


def pixels_resized(table, old, new):
    """Cubic convolution with a = -0.75 in two passes, as bicubic resizing is defined, edges repeated; (L, C) tables."""

    def weights(n, m):
        matrix = torch.zeros(m, n, dtype=torch.float64)
        for i in range(m):
            centre = (i + 0.5) * n / m - 0.5
            for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
                d = abs(centre - tap)
                matrix[i, min(max(tap, 0), n - 1)] += \
                    (1.25 * d - 2.25) * d * d + 1 if d <= 1 else ((-0.75 * d + 3.75) * d - 6) * d + 3
        return matrix

    grid = table.double().unflatten(0, old)
    return torch.einsum('ih,jw,hwc->ijc', weights(old[0], new[0]), weights(old[1], new[1]), grid).flatten(0, 1)


@pytest.mark.parametrize('grid, H, W', [((14, 14), 14, 14), ((14, 14), 24, 24), ((14, 14), 9, 20), ((20, 24), 20, 24),
                                        ((20, 24), 14, 14), ((32, 32), 33, 50)])
def test_resized_rotations_are_what_their_code_makes(grid, H, W):
    """It keeps cosines and sines of 14x14 tokens, resizes them to a model's grid when weights are loaded, and from
    there to an image's."""
    C = 16
    frequencies = 10000. ** (-torch.arange(0, C // 2, 2, dtype=torch.float64) / (C // 2))
    angles = torch.outer(torch.arange(14, dtype=torch.float64), frequencies).repeat_interleave(2, dim=1)
    angles = torch.cat([angles[:, None].expand(14, 14, -1), angles[None].expand(14, 14, -1)], dim=-1).flatten(0, 1)
    found = resized_rotary_tables(H, W, C, 14, grid, 'cpu')
    exact = rotary_tables(H, W, C, 14, 'cpu')
    for table, result, rotation in zip((angles.cos(), angles.sin()), found, exact):
        for old, new in (((14, 14), grid), (grid, (H, W))):
            table = table if old == new else pixels_resized(table, old, new)
        torch.testing.assert_close(result.double(), table, atol=1e-5, rtol=0)
        assert torch.allclose(result, rotation, atol=1e-3) == (grid == (14, 14) == (H, W))


def test_a_model_with_resized_rotations(monkeypatch):
    """Equal to the other at 14x14 tokens, far from it elsewhere, and it is what is rotated by."""
    torch.manual_seed(0)
    arch = dict(embed_dims=16, num_layers=3, d_state=2)
    exact = LocalVim(arch, directions=['h', 'w2'], out_type='featmap').eval()
    resized = LocalVim(arch, directions=['h', 'w2'], out_type='featmap', rope='resized').eval()
    resized.load_state_dict(exact.state_dict())
    with torch.no_grad():
        at_home, away = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 384, 384)
        torch.testing.assert_close(resized(at_home)[0], exact(at_home)[0])
        assert not torch.allclose(resized(away)[0], exact(away)[0], atol=0.1)
        tables = resized_rotary_tables(24, 24, 16, 14, (14, 14), 'cpu')
        monkeypatch.setattr('mmlocalmamba.backbones.local_vim.rotary_tables', lambda *_: tables)
        torch.testing.assert_close(resized(away)[0], exact(away)[0])
    with pytest.raises(ValueError, match="rope must be one of .*'resized'.*, got 'learned'"):
        LocalVim(arch, directions=['h'], rope='learned')


@pytest.mark.parametrize('resized', [False, True])
def test_their_rotary_tables_show_how_they_were_made(tmp_path, resized):
    build = lambda **kwargs: LocalVim(dict(embed_dims=16, num_layers=2, d_state=2), img_size=256,  # noqa: E731
                                      directions=['h', 'w2'], **kwargs)
    weights = {**official_of(build())[0], **tables_in_their_file(16, resized)}
    load(build(rope='resized'), tmp_path, weights)
    if resized:
        with pytest.raises(RuntimeError, match='rope: its weights were trained with resized, here: None'):
            load(build(), tmp_path, weights)
        load(build(), tmp_path, weights, allow=['rope'])
    else:
        load(build(), tmp_path, weights)
    with pytest.raises(RuntimeError, match='rope'):
        build().load_state_dict(build(rope='resized').state_dict())
    build(rope='resized').load_state_dict(build().state_dict())


# ---- images of other channels ----

def embedding(kind, in_channels):
    torch.manual_seed(in_channels)
    return SMALL[kind](in_channels=in_channels)


@pytest.mark.parametrize('kind', SMALL)
@pytest.mark.parametrize('in_channels', [1, 4, 13])
@pytest.mark.parametrize('channels', ['sum', 'repeat'])
def test_weights_of_three_channels_for_others(kind, in_channels, channels, tmp_path, log):
    source = embedding(kind, 3).eval()
    model = load(embedding(kind, in_channels), tmp_path, source.state_dict(), channels=channels).eval()
    before, after = (part.patch_embed.projection.weight for part in (source, model))
    if channels == 'sum':
        expected = before.sum(1, keepdim=True).repeat(1, in_channels, 1, 1) / in_channels
    else:
        expected = torch.cat([before] * 5, dim=1)[:, :in_channels] * 3 / in_channels
    torch.testing.assert_close(after, expected)
    assert f'patch_embed.projection.weight: weights of {in_channels} channels' in log[-1][0]
    assert torch.equal(model.patch_embed.projection.bias, source.patch_embed.projection.bias)


def test_a_grey_image_gives_what_its_three_channels_gave(tmp_path):
    source = embedding('LocalVMamba', 3).eval()
    model = load(embedding('LocalVMamba', 1), tmp_path, source.state_dict(), channels='sum').eval()
    grey = torch.rand(1, 1, 32, 32)
    torch.testing.assert_close(model(grey), source(grey.expand(-1, 3, -1, -1)))


def test_other_channels_are_adapted_on_request_alone(tmp_path):
    weights = embedding('LocalVim', 3).state_dict()
    with pytest.raises(RuntimeError, match="patch_embed.*channels='sum' or channels='repeat' adapts it"):
        load(embedding('LocalVim', 1), tmp_path, weights)
    with pytest.raises(ValueError, match="channels must be one of .*'sum'.*got 'mean'"):
        load(embedding('LocalVim', 1), tmp_path, weights, channels='mean')
    load(embedding('LocalVim', 3), tmp_path, weights, channels='sum')  # nothing to adapt


# ---- the grid of learned positions ----

def positions(*grid, **options):
    """A LocalVim whose learned positions have this grid, and differ from each other."""
    torch.manual_seed(0)
    return LocalVim(dict(embed_dims=8, num_layers=1, d_state=1), img_size=(4 * grid[0], 4 * grid[1]), patch_size=4,
                    directions=['h'], **options)


def resized(model, old, new, tokens=0):
    return resize_pos_embed(model.pos_embed, old, new, tokens)


GRIDS = [((8, 8), (4, 16)), ((16, 64), (32, 32)), ((8, 18), (12, 12)), ((4, 6), (5, 9)), ((3, 5), (15, 1))]


@pytest.mark.parametrize('way', ['init_cfg', 'state dict', 'in a model'])
@pytest.mark.parametrize('old, new', GRIDS)
def test_positions_are_resized_from_their_own_grid(old, new, way, tmp_path, log):
    source, model = positions(*old), positions(*new)
    if way == 'init_cfg':
        load(model, tmp_path, source.state_dict())
    elif way == 'state dict':
        model.load_state_dict(source.state_dict())
    else:
        nn.ModuleDict(dict(backbone=model)).load_state_dict(nn.ModuleDict(dict(backbone=source)).state_dict())
    assert torch.equal(model.pos_embed, resized(source, old, new))
    lines = '\n'.join(message for message, _ in log)
    assert f'positions of {old[0]}x{old[1]} tokens are resized to {new[0]}x{new[1]}' in lines
    assert 'is assumed' not in lines


@pytest.mark.parametrize('cls_token', ['middle', 'vim'])
def test_positions_beside_a_class_token(cls_token, tmp_path):
    options = dict(cls_token=cls_token, rope=False, out_type='cls_token')
    source = positions(8, 8, **options)
    model = load(positions(4, 16, **options), tmp_path, source.state_dict())
    assert torch.equal(model.pos_embed, resized(source, (8, 8), (4, 16), 1))


def test_the_same_grid_is_left_alone(tmp_path, log):
    source = positions(4, 16)
    assert torch.equal(load(positions(4, 16), tmp_path, source.state_dict()).pos_embed, source.pos_embed)
    assert not [message for message, _ in log if 'resized' in message or 'assumed' in message]


@pytest.mark.parametrize('old, new, assumed', [
    ((4, 16), (4, 16), (4, 16)),  # as many as here: the grid is that of the model
    ((8, 8), (4, 16), (4, 16)),
    ((8, 8), (6, 5), (8, 8)),  # else a square
    ((4, 16), (6, 5), (8, 8)),
])
def test_what_is_assumed_of_a_file_that_does_not_say_it(old, new, assumed, tmp_path, log):
    source = positions(*old)
    model = load(positions(*new), tmp_path, dict(source.state_dict()))
    assert torch.equal(model.pos_embed, resized(source, assumed, new))
    lines = [message for message, _ in log if 'is assumed' in message]
    assert len(lines) == 1 and f'of its {old[0] * old[1]} positions: {assumed[0]}x{assumed[1]} is assumed' in lines[0]


def test_the_grid_can_be_told(tmp_path, log):
    source = positions(8, 18)
    model = load(positions(12, 12), tmp_path, dict(source.state_dict()), grid=(8, 18))
    assert torch.equal(model.pos_embed, resized(source, (8, 18), (12, 12)))
    assert not [message for message, _ in log if 'is assumed' in message]
    with pytest.raises(RuntimeError, match=r'pos_embed.*grid=\(ROWS, COLUMNS\) says how to resize it'):
        load(positions(12, 12), tmp_path, dict(positions(4, 6).state_dict()))
    load(positions(12, 12), tmp_path, dict(positions(4, 6).state_dict()), grid=[4, 6])
    with pytest.raises(ValueError, match=r'grid=\(5, 5\) has 25 positions, but .*x.pth has 24'):
        load(positions(12, 12), tmp_path, dict(positions(4, 6).state_dict()), grid=[5, 5])


def test_the_authors_positions_are_of_a_square(tmp_path):
    """Their images are; 14x14 into 7x28 is a resize."""
    source = float32(random_weights(vim_shapes(16, 2, N=3, classes=5)))
    model = load(vim(img_size=(112, 448)), tmp_path, source)
    expected = resize_pos_embed(source['pos_embed'], (14, 14), (7, 28), 1)
    assert model.grid == (7, 28) and torch.equal(model.pos_embed, expected)


# ---- checkpoints of other programs ----

def renamed(weights, prefix):
    return {f'{prefix}{name}': value for name, value in weights.items()}


OTHERS = {
    'lightning': lambda own: {'pytorch-lightning_version': '2.5', 'epoch': 3,
                              'state_dict': renamed(own, 'model.backbone.')},
    'lightning with a loss': lambda own: dict(state_dict={**renamed(own, 'model.backbone.'),
                                                          'criterion.weight': torch.ones(3)}),
    'model_state_dict': lambda own: dict(epoch=3, model_state_dict=renamed(own, 'backbone.')),
    'compiled': lambda own: renamed(own, '_orig_mod.backbone.'),
    'compiled in Lightning': lambda own: dict(state_dict=renamed(own, 'model._orig_mod.backbone.')),
    'compiled backbone': lambda own: dict(model=renamed(own, 'module.backbone._orig_mod.')),
    'compiled blocks': lambda own: renamed({name.replace('layers.0.', 'layers.0._orig_mod.'): value
                                            for name, value in own.items()}, 'backbone.'),
    'another name': lambda own: dict(state_dict={**renamed(own, 'student.encoder.'), 'queue': torch.ones(3)}),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_checkpoints_of_other_programs_are_taken(kind, tmp_path, log):
    source = vim()
    model = load(vim(), tmp_path, OTHERS[kind](source.state_dict()))
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))
    assert (kind == 'another name') == ('names that begin with student.encoder.' in log[-1][0])


def test_a_choice_is_left_to_the_user(tmp_path):
    """A checkpoint that holds several models is refused, and the message names the argument."""
    own, ema = vim().state_dict(), vim().state_dict()
    both = {**renamed(own, 'student.'), **renamed(ema, 'teacher.')}
    with pytest.raises(ValueError, match="several backbones: take one with prefix='student' or prefix='teacher'"):
        load(vim(), tmp_path, both)
    model = load(vim(), tmp_path, both, prefix='teacher')
    assert torch.equal(model.pos_embed, ema['pos_embed'])
    with pytest.raises(ValueError, match="others are taken with key='net'"):
        load(vim(), tmp_path, dict(net=own, optimizer={}))
    assert torch.equal(load(vim(), tmp_path, dict(net=own), key='net').pos_embed, own['pos_embed'])


def test_a_missing_file_names_those_that_are_there(tmp_path):
    for name in ('epoch_3.pth', 'best_accuracy_epoch_2.pth', 'my.py'):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"has best_accuracy_epoch_2\.pth, epoch_3\.pth: '.*/epoch_2.pth'"):
        load_checkpoint(str(tmp_path / 'epoch_2.pth'))
