"""FLOPs: our ops' handles, whole models of the three tasks, the paper's figures."""
import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import get_flops
import pytest
import torch
from mmengine.analysis import FlopAnalyzer, complexity_analysis
from mmengine.config import Config
from torch import nn

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.ops import BACKEND_VARIABLE, available_backends
from mmlocalmamba.ops.flops import HANDLES, SCAN, check_all_known, scan_flops

ROOT = Path(__file__).resolve().parents[2]

ARCH = dict(embed_dims=8, num_layers=1, d_state=2, expand=2, dt_rank=3)


def count(name, shape, convention='exact', **backbone):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.model.backbone.update(backbone)
    model = get_flops.build(cfg)
    exact = get_flops.count_flops(model, shape)
    return exact if convention == 'exact' else get_flops.as_in_the_paper(exact, model, shape)


@pytest.mark.parametrize('backend', ['cpu', 'chunked'])
@torch.no_grad()
def test_a_scan_by_hand(backend, monkeypatch):
    """H=5, W=6 with windows of 2: 36 steps, of which 6 are pads."""
    reason = available_backends(torch.zeros(1))[backend]
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    steps, D, N, R, C, K = 36, 16, 2, 3, 8, 2
    vim = LocalVim(ARCH, img_size=(20, 24), patch_size=4, directions=['w2', 'w2_flip'], scattn=False, rope=False).eval()
    analyzer = FlopAnalyzer(vim, torch.zeros(1, 3, 20, 24)).set_op_handle(**HANDLES)
    mixer = analyzer.by_module()['layers.0.mixer']
    expected = K * steps * D * (R + 2 * N) + K * steps * R * D + scan_flops(K, steps, D, N)
    assert analyzer.by_operator('layers.0.mixer.ssm')[SCAN] == scan_flops(K, steps, D, N) == K * steps * D * (9 * N + 1)
    # MMEngine reads the cost of an einsum from NumPy's report, which has four digits.
    assert analyzer.by_module()['layers.0.mixer.ssm'] == pytest.approx(expected, rel=1e-3)
    convolution = mixer - expected - 30 * C * 3 * D
    assert convolution == pytest.approx(K * steps * D * 4, rel=0.15)  # the last taps may run over the end


@torch.no_grad()
def test_projections_of_localvmamba_act_on_tokens():
    """They see no pads; the scans do."""
    arch = dict(embed_dims=[8], depths=[1], d_state=2, dt_rank=3)
    vmamba = LocalVMamba(arch, patch_size=4, directions=['w2', 'v'], scattn=False).eval()
    analyzer = FlopAnalyzer(vmamba, torch.zeros(1, 3, 20, 24)).set_op_handle(**HANDLES)
    projections = 2 * 30 * 16 * (3 + 2 * 2) + 2 * 30 * 3 * 16
    assert analyzer.by_module()['stages.0.blocks.0.mixer.ssm'] == pytest.approx(
        projections + scan_flops(2, 36, 16, 2), rel=1e-3)


# GFLOPs as the paper's tables have them; other sizes and tasks are in research/tables.md.
@pytest.mark.parametrize('name, convention, paper', [
    ('localvim-t_8xb128_in1k', 'paper', 1.5),
    ('localvmamba-t_8xb128_in1k', 'exact', 5.7),
    ('vim-s_8xb128_in1k', 'paper', 5.1),
    ('vmamba-t_8xb128_in1k', 'exact', 5.6),
])
def test_the_papers_classifiers(name, convention, paper):
    flops = count(name, (224, 224), convention).flops
    assert flops[''] / 1e9 == pytest.approx(paper, rel=0.03)


def test_paper_convention_by_hand():
    """It replaces the blocks of LocalVim, and theirs only, in every module that holds them."""
    name, shape = 'upernet_localvim-nano_digits', (64, 72)
    exact, paper = (count(name, shape, convention).flops for convention in get_flops.CONVENTIONS)
    L, C, D, K, N, R, taps = 8 * 9, 64, 128, 4, 4, 4, 4
    gate = 2 * D * (D // 8)
    steps = [72, 72, 80, 80]  # h, h_flip and windows of 2: 8 x 10
    call = [(T + taps - 1) * D * taps + T * D * (R + 2 * N) + T * R * D + K * T * D * (5 * N + 2) + gate for T in steps]
    block = 3 * L * C * D + 5 * L * C + K * (gate + 5 * L * D) + sum(call)
    blocks = [key for key in exact if key.endswith('.mixer')]
    assert len(blocks) == 6 and all(paper[key] == block for key in blocks)
    difference = sum(block - exact[key] for key in blocks)
    assert paper[''] - exact[''] == paper['backbone'] - exact['backbone'] == difference != 0
    assert paper['decode_head'] == exact['decode_head'] > 0


def test_detectors_count_every_part():
    name, shape = 'mask-rcnn_localvmamba-nano_digits', (64, 96)
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    model = get_flops.build(cfg)
    flops = get_flops.count_flops(model, shape).flops
    convolution = 64 * 64 * 9 + 64 * (model.rpn_head.rpn_cls.out_channels + model.rpn_head.rpn_reg.out_channels)
    levels = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert flops['rpn_head'] == sum(h * w for h, w in levels) * convolution
    proposals = cfg.model.test_cfg.rpn.max_per_img
    linears = [m for m in model.roi_head.bbox_head.modules() if isinstance(m, nn.Linear)]
    assert flops['roi_head.bbox_head'] == proposals * sum(m.weight.numel() for m in linears)
    parts = ('backbone', 'neck', 'rpn_head', 'roi_head')
    assert all(flops[part] > 0 for part in parts) and flops[''] == sum(flops[part] for part in parts)


@pytest.mark.parametrize('model', [
    lambda: LocalVim('nano', img_size=32, patch_size=4, directions=['h', 'w3', 'v_flip']),
    lambda: LocalVim('nano', img_size=32, patch_size=4, cls_token='middle', rope=False, out_type='cls_token'),
    lambda: LocalVMamba('nano', directions=['w7', 'h']),
])
@torch.no_grad()
def test_backends_cost_the_same(model, monkeypatch):
    """Native ops, which hold several of PyTorch's each, and the PyTorch backend."""
    reason = available_backends(torch.zeros(1))['cpu']
    if reason:
        pytest.skip(reason)
    counts, model = {}, model().eval()
    for backend in ('cpu', 'chunked'):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        analyzer = FlopAnalyzer(model, torch.zeros(1, 3, 32, 32)).set_op_handle(**HANDLES)
        counts[backend] = analyzer.unsupported_ops_warnings(False).by_operator()
        check_all_known(analyzer.unsupported_ops())
    assert counts['cpu'][SCAN] == counts['chunked'][SCAN]
    # Taps over the end of PyTorch's padded convolution, and the digits of MMEngine's einsum.
    assert counts['cpu'].total() == pytest.approx(counts['chunked'].total(), rel=0.005)


def test_the_reference_is_not_traced(monkeypatch):
    """It has no op to count."""
    expected = count('localvim-nano_digits', (32, 32)).flops['']
    monkeypatch.setenv(BACKEND_VARIABLE, 'reference')
    assert count('localvim-nano_digits', (32, 32)).flops[''] == expected


def test_nothing_of_ours_is_left_out(monkeypatch):
    with pytest.raises(NotImplementedError, match='FLOPs of mmlocalmamba::surprise are not known: add a handle'):
        check_all_known(['aten::silu', 'mmlocalmamba::surprise'])
    for name in HANDLES:
        monkeypatch.delitem(complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS, name, raising=False)
    monkeypatch.setattr(get_flops, 'HANDLES', {})
    monkeypatch.setattr(get_flops, 'check_all_known', lambda names: None)
    with pytest.raises(RuntimeError, match=r'the scans of backbone.layers.0.mixer.ssm were not counted'):
        count('localvim-nano_digits', (32, 32))


def run(capsys, *args):
    tool = ROOT / 'tools' / 'get_flops.py'
    with mock.patch.object(sys, 'argv', [str(tool), *args]):
        runpy.run_path(str(tool), run_name='__main__')
    return capsys.readouterr().out


def test_command_line(capsys):
    config = str(ROOT / 'configs' / 'localvim-nano_digits.py')
    output = json.loads(run(capsys, config, '--shape', '32', '32', '--modules', '1', '--json'))
    assert output['shape'] == [32, 32] and output['convention'] == 'exact'
    assert output['flops'] == sum(module['flops'] for module in output['modules'].values())
    assert output['params'] == sum(module['params'] for module in output['modules'].values())
    text = run(capsys, config, '--shape', '32', '32', '--convention', 'paper', '--modules')
    assert 'backbone.layers' in text and '32x32, paper:' in text


@pytest.mark.slow
def test_counters_of_others_count_ours():
    """The packages' own get_flops ask MMEngine's counter, which leaves out ops that it does not know."""
    from mmengine.analysis import get_model_complexity_info
    cfg = Config.fromfile(ROOT / 'configs/localvim-t_8xb128_in1k.py')
    model = get_flops.build(cfg)
    ours = get_flops.count_flops(model, (64, 64)).flops['backbone']
    theirs = get_model_complexity_info(model.backbone, (3, 64, 64), show_table=False, show_arch=False)['flops']
    assert theirs == ours > 1e8
