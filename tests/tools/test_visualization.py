"""Tests of the pictures: they show what the models compute, and the commands that draw them run."""
import sys
from pathlib import Path

import demo
import draw
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.backbones.archs import SEARCHED
from mmlocalmamba.directions import scan_index, scan_tables
from mmlocalmamba.layers.ssm import DirectionalSSM
from mmlocalmamba.ops import directional_scan
from mmlocalmamba.visualization import (
    draw_directions,
    draw_gates,
    draw_receptive_fields,
    draw_scan_orders,
    read_by,
    receptive_fields,
    scan_readings,
    scattn_gates,
    square_of_share,
)

ROOT = Path(__file__).resolve().parents[2]
PLAIN = dict(arch=dict(embed_dims=16, num_layers=1, d_state=2), img_size=24, patch_size=4, window_pad='none')


def backbone(**kwargs):
    torch.manual_seed(0)
    return LocalVim(**PLAIN, **kwargs).eval()


def test_receptive_field_of_a_convolution_is_its_kernel():
    class Convolution(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return (self.conv(x), )

    field, = receptive_fields(Convolution(), torch.rand(2, 3, 9, 9))
    rows, cols = np.nonzero(field)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (3, 5, 3, 5)
    assert field.sum() == pytest.approx(1)


@pytest.mark.parametrize('direction', ['h', 'v_flip', 'w3'])
def test_receptive_field_of_one_scan_is_what_was_read_before(direction):
    model = backbone(directions=[direction], scattn=False, out_type='featmap')
    field, = receptive_fields(model, torch.rand(1, 3, 24, 24))
    tokens = field.reshape(6, 4, 6, 4).sum((1, 3)).flatten()
    order = scan_index(direction, 6, 6).tolist()
    until = order.index(3 * 6 + 3)
    assert not tokens[order[until + 1:]].any()
    assert tokens[order[:until + 1]].all()


def test_receptive_fields_need_maps():
    with pytest.raises(ValueError, match='out_type="featmap"'):
        receptive_fields(backbone(directions=['h']), torch.rand(1, 3, 24, 24))


def test_square_of_share():
    field = np.zeros((8, 8))
    field[4:6, 4:6] = 1  # the middle token of stride 2
    assert square_of_share(field, 1.0, stride=2) == (5, 5, 2)
    field[0, 0] = 4
    assert square_of_share(field, 0.5, stride=2) == (5, 5, 2)
    assert square_of_share(field, 1.0, stride=2) == (5, 5, 10)


def test_gates_are_what_scattn_multiplies_with():
    model = backbone(directions=['h', 'w2_flip'])
    scattn = model.layers[0].mixer.scattn
    nn.init.zeros_(scattn.channel_select.weight)
    scattn.channel_select.bias.data = torch.linspace(-2, 2, 32)
    (name, gates), = scattn_gates(model, torch.rand(2, 3, 24, 24))
    assert name == 'layers.0' and list(gates) == ['h', 'w2_flip']
    for gate in gates.values():
        np.testing.assert_allclose(gate, torch.linspace(-2, 2, 32).sigmoid().numpy(), rtol=1e-5)
    assert not scattn._forward_pre_hooks


def test_gates_of_each_direction_on_their_own():
    """By hand: y of the block's scans, gated one direction at a time, averaged over the images."""
    model = backbone(directions=['h', 'v'])
    images, seen = torch.rand(2, 3, 24, 24), []
    model.layers[0].mixer.scattn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    (_, gates), = scattn_gates(model, images)
    for k, name in enumerate(('h', 'v')):
        with torch.no_grad():
            expected = torch.cat([model.layers[0].mixer.scattn.gate(y[:, k]) for y in seen]).mean((0, 1))
        np.testing.assert_allclose(gates[name], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize('in_scan_order', [False, True])
def test_what_a_token_reads_is_the_derivative_of_the_scan(in_scan_order):
    """By the values that are scanned, with step sizes, B and C held fixed, and without the skip connection."""
    torch.manual_seed(0)
    names, N, R, D = ['h', 'w2_flip', 'v'], 2, 3, 4
    ssm, tables = DirectionalSSM(D, 3, N, R), scan_tables(names, 3, 5)
    nn.init.zeros_(ssm.D)
    x = torch.randn(1, 3, tables.src.shape[1], D) if in_scan_order else torch.randn(1, 15, D)
    projected = torch.einsum('bktd,kod->bkto' if in_scan_order else 'bld,kod->bklo', x, ssm.x_proj_weight)
    dt, B, C = projected.detach().split((R, N, N), dim=-1)
    u = x.clone().requires_grad_()
    y = directional_scan(u, dt, -ssm.A_log.exp(), B, C, None, tables, ssm.dt_proj_bias, True, in_scan_order,
                         ssm.dt_proj_weight)
    with torch.no_grad():
        found = read_by(ssm, x, tables, in_scan_order, token=8)
    for k in range(3):
        gradients = torch.stack([torch.autograd.grad(y[0, k, 8, d], u, retain_graph=True)[0][0][..., d]
                                 for d in range(D)])
        if in_scan_order:
            gradients = gradients[:, k, tables.inv[k].long()]
        torch.testing.assert_close(found[k], gradients.abs().mean(0))
        assert 0 < (found[k] > 0).sum() <= 15


@pytest.mark.parametrize('build', [
    lambda: backbone(directions=['h', 'v_flip'], scattn=False),
    lambda: backbone(directions=['h', 'v_flip'], scattn=False, cls_token='middle', rope=False),
    lambda: LocalVMamba(dict(embed_dims=[8, 16], depths=[1, 1], d_state=1), directions=['h', 'v_flip'])])
def test_a_token_reads_what_comes_before_it(build):
    for name, rows in scan_readings(build(), torch.rand(1, 3, 24, 24), (9, 13)):
        h, w = rows['h'].shape
        row, column = 9 * h // 24, 13 * w // 24
        before = {'h': np.arange(h * w).reshape(h, w) <= row * w + column,
                  'v_flip': np.arange(h * w).reshape(w, h).T >= column * h + row}
        assert set(rows) == set(before) and h == w == (3 if name == 'stages.1.blocks.0' else 6)
        for direction, read in rows.items():
            assert ((read > 0) == before[direction]).all(), (name, direction)


def test_there_is_nothing_to_read_in_a_search():
    with pytest.raises(ValueError, match='LocalVim mixes its directions in a search: derive directions first'):
        scan_readings(backbone(directions='search'), torch.rand(1, 3, 24, 24), (0, 0))


def test_gates_need_scattn():
    with pytest.raises(ValueError, match='scattn=False'):
        scattn_gates(backbone(directions=['h'], scattn=False), torch.rand(1, 3, 24, 24))


def test_directions_are_drawn_where_they_are_chosen():
    chosen = SEARCHED['localvim']
    axes = draw_directions(chosen).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ['h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip']
    drawn = {(round(x), names[round(y)]) for x, y in axes.collections[0].get_offsets().tolist()}
    assert drawn == {(block, name) for block, row in enumerate(chosen) for name in row}


@pytest.mark.parametrize('stages, names, middles, borders', [
    ((2, 3, 2), ['stage 1', 'stage 2', 'stage 3'], [0.5, 3, 5.5], [1.5, 4.5]),
    ((1, 5, 1), ['S1', 'S2', 'S3'], [0, 3, 6], [0.5, 5.5]),
    (None, [], [], []),
])
def test_stages_are_named_above_their_blocks(stages, names, middles, borders):
    axes = draw_directions([['h', 'w2']] * 7, stages=stages).axes[0]
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == list(zip(names, middles))
    assert [line.get_xdata()[0] for line in axes.lines] == borders


def test_pictures_have_a_panel_each():
    fields = receptive_fields(LocalVMamba('nano', out_indices=(0, 1)), torch.rand(1, 3, 32, 32))
    panels = draw_receptive_fields(fields, ['first', 'second'], [4, 8]).axes
    assert [axes.get_title() for axes in panels[:2]] == ['first', 'second']
    assert [axes.get_title() for axes in draw_scan_orders(['h', 'w2'], 4, 6).axes] == ['h', 'w2']
    gates = scattn_gates(LocalVMamba('nano'), torch.rand(1, 3, 32, 32))
    mean, *_ = draw_gates(gates).axes
    assert [label.get_text() for label in mean.get_yticklabels()] == ['h', 'h_flip', 'w2', 'w2_flip']


@pytest.mark.parametrize('arguments', [
    'receptive-field localvmamba-nano_digits --size 32 32 --images .',
    'receptive-field upernet_localvim-nano_digits --size 32 48 --images .',
    'gates mask-rcnn_localvmamba-nano_digits checkpoint.pth --size 32 32 --images image.png',
    'attention localvim-nano_digits --size 32 32 --images image.png --blocks 0 5',
    'attention mask-rcnn_localvmamba-nano_digits checkpoint.pth --size 32 64 --images image.png --point 3 60',
    'directions localvim-t_8xb128_in1k',
    'scans --directions h w3 --size 6 6 --image image.png',
    'scans --distances --size 6 6',
], ids=lambda arguments: ' '.join(arguments.split()[:2]))
def test_commands(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (20, 30, 3), dtype=np.uint8)).save('image.png')
    torch.save(dict(state_dict={f'backbone.{name}': value for name, value in LocalVMamba(
        'nano', out_indices=(0, 1, 2, 3)).state_dict().items()}), 'checkpoint.pth')
    command, *arguments = arguments.split()
    if command != 'scans':
        arguments[0] = str(ROOT / 'configs' / f'{arguments[0]}.py')
    draw.main([command, *arguments, '--out', 'picture.png'])
    assert min(Image.open('picture.png').size) > 200


@pytest.mark.parametrize('arguments, message', [
    ('scans --directions h w0', "'w0'"),
    ('scans --size 0 6', '--size needs two numbers >= 1, got [0, 6]'),
    ('gates config.py --images missing', '--images: [Errno 2] there is no such picture'),
    ('attention config.py --images image.png --size 32 32 --point 3 32', 'point (3, 32) is outside of the image'),
    ('attention config.py --images image.png --size 32 32 --blocks 6', 'blocks must be numbers from 0 to 5, got [6]'),
])
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (20, 30)).save('image.png')
    Path('config.py').write_text(f'_base_ = {str(ROOT / "configs/localvim-nano_digits.py")!r}')
    with pytest.raises(SystemExit):
        draw.main([*arguments.split(), '--out', 'picture.png'])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('measure', [receptive_fields, scattn_gates])
def test_a_backbone_keeps_its_modes_also_after_an_error(measure):
    backbone = LocalVMamba(dict(embed_dims=[8, 16], depths=[1, 1], d_state=1), directions=['h', 'v']).train()
    backbone.stages[0].eval()
    modes = [module.training for module in backbone.modules()]
    measure(backbone, torch.randn(1, 3, 8, 8))
    assert [module.training for module in backbone.modules()] == modes
    backbone.stages[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(backbone, torch.randn(1, 3, 8, 8))
    assert [module.training for module in backbone.modules()] == modes


@pytest.mark.parametrize('name, picture, line', [
    ('mask-rcnn_localvmamba-nano_digits', 'detections.png', 'boxes: AP 0.'),
    ('upernet_localvmamba-nano_digits', 'segmentation.png', 'pixels: mIoU '),
])
@pytest.mark.slow
def test_the_demo_evaluates_and_draws(name, picture, line, configuration, tmp_path, monkeypatch, capsys):
    cfg = configuration(name)
    cfg.dump(tmp_path / 'config.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'last.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'last.pth'))
    monkeypatch.setattr(sys, 'argv', ['demo.py', str(tmp_path / 'config.py'), str(tmp_path), '--rows', '1'])
    demo.main()
    assert line in capsys.readouterr().out
    assert Image.open(tmp_path / picture).width > 1000 and (tmp_path / 'metrics.json').is_file()


def test_the_demo_wants_a_detector_or_segmentor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['demo.py', str(ROOT / 'configs/localvim-nano_digits.py'), str(tmp_path)])
    with pytest.raises(SystemExit):
        demo.main()
    assert 'neither a detector nor a segmentor: its scope is mmpretrain' in capsys.readouterr().err
