import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.convert import find_state_dict, from_official, to_official

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / 'data'
TOOL = ROOT / 'tools' / 'model_converters' / 'official_to_mmlocalmamba.py'

SMALL = {
    'LocalVim': lambda **kwargs: LocalVim(dict(embed_dims=16, num_layers=2, d_state=2), img_size=32, patch_size=8,
                                          directions=[['h', 'w2'], ['v', 'w2_flip']], **kwargs),
    'LocalVMamba': lambda **kwargs: LocalVMamba(dict(embed_dims=[8, 16, 32], depths=[1, 1, 1], d_state=2),
                                                directions=['h', 'w2'], **kwargs),
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


@pytest.mark.parametrize('name,build', [('local_vim_tiny', lambda: LocalVim('tiny')),
                                        ('local_vssm_tiny', lambda: LocalVMamba('tiny'))])
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


def test_patch_merging_is_permuted_as_the_authors_unfold():
    """A weight that picks one pixel of one channel picks the same one in both layouts."""
    from mmcv.cnn.bricks.transformer import PatchMerging
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
    extra = dict(out_indices=(0, 1)) if arch == 'LocalVMamba' else dict(out_type='featmap', out_indices=(0, 1))
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
    other = official_of(SMALL['LocalVim' if arch == 'LocalVMamba' else 'LocalVMamba']())[0]
    torch.save(other, tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match='not of this backbone'):
        SMALL[arch](init_cfg=cfg).init_weights()


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
    with pytest.raises(ValueError, match="no entry 'ema'"):
        find_state_dict(weights, 'ema')


