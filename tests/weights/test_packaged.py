"""Safetensors files and the weights that come with the package."""
import sys
from pathlib import Path

import pytest
import torch

from mmlocalmamba import files
from mmlocalmamba.backbones import LocalVim
from mmlocalmamba.files import load_checkpoint

NANO = files.SCHEME + 'localvim-nano_digits'
# Bytes that a repository bears: a detector's file is the largest.
LARGEST, TOGETHER = 5e6, 8e6


def backbone(seed=0, **settings):
    torch.manual_seed(seed)
    return LocalVim('nano', img_size=32, patch_size=4, **settings)


def test_a_file_holds_what_was_saved(tmp_path):
    model = backbone()
    meta = dict(dataset_meta=dict(classes=('a', 'b')))
    files.save_safetensors(str(tmp_path / 'x.safetensors'), model.state_dict(), meta)
    loaded = load_checkpoint(tmp_path / 'x.safetensors')
    assert loaded['meta'] == dict(dataset_meta=dict(classes=('a', 'b')))
    assert loaded['state_dict'].keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        found = loaded['state_dict'][name]
        assert found.dtype == value.dtype
        torch.testing.assert_close(found, value, rtol=0 if value.ndim < 2 else 2 ** -11, atol=2 ** -25)
    assert loaded['state_dict']._metadata == model.state_dict()._metadata
    size = sum(value.numel() for value in model.state_dict().values())
    assert (tmp_path / 'x.safetensors').stat().st_size < 2.6 * size


def test_scan_directions_are_compared(tmp_path):
    """As with every other file of ours."""
    files.save_safetensors(str(tmp_path / 'x.safetensors'), backbone().state_dict())
    backbone(seed=1).load_pretrained(str(tmp_path / 'x.safetensors'))
    with pytest.raises(RuntimeError, match='directions'):
        backbone(directions=['h', 'h_flip', 'v', 'v_flip']).load_pretrained(str(tmp_path / 'x.safetensors'))


@pytest.mark.parametrize('value', [1e5, float('nan'), float('inf')])
def test_what_does_not_fit_is_not_written(value, tmp_path):
    with pytest.raises(ValueError, match='large: its largest value, .* does not fit into torch.float16'):
        files.save_safetensors(str(tmp_path / 'x.safetensors'), dict(large=torch.full((2, 2), value)))
    assert not list(tmp_path.iterdir())


def test_large_vectors_keep_their_bits(tmp_path):
    """Variances of a BatchNorm may be large."""
    files.save_safetensors(str(tmp_path / 'x.safetensors'), dict(variance=torch.tensor([1e6, 1.0000001])))
    assert torch.equal(files.load_safetensors(str(tmp_path / 'x.safetensors'))['state_dict']['variance'],
                       torch.tensor([1e6, 1.0000001]))


def test_tied_weights(tmp_path):
    shared = torch.ones(2, 3)
    files.save_safetensors(str(tmp_path / 'x.safetensors'), dict(a=shared, b=shared, c=shared.t()))
    found = files.load_safetensors(str(tmp_path / 'x.safetensors'))['state_dict']
    assert torch.equal(found['a'], found['b']) and found['c'].shape == (3, 2)


def test_errors(tmp_path, load=load_checkpoint):
    with pytest.raises(FileNotFoundError, match='localvim-nano_digits') as error:
        load('mmlocalmamba://localvim-huge')
    assert error.value.filename == 'mmlocalmamba://localvim-huge'
    with pytest.raises(FileNotFoundError, match='none.safetensors'):
        load(str(tmp_path / 'none.safetensors'))
    whole = Path(files.locate(NANO)).read_bytes()
    for content in (b'', b'x' * 100, whole[:len(whole) // 2]):
        (tmp_path / 'broken.safetensors').write_bytes(content)
        with pytest.raises(RuntimeError, match='broken.safetensors was not loaded: it is damaged'):
            load(str(tmp_path / 'broken.safetensors'))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(RuntimeError, match='pip install safetensors'):
        load_checkpoint(NANO)


def test_files_of_other_programs(tmp_path):
    from safetensors.torch import save_file
    save_file(backbone().state_dict(), tmp_path / 'plain.safetensors')
    model = backbone(seed=1)
    model.load_pretrained(str(tmp_path / 'plain.safetensors'))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in backbone().state_dict().items())


def test_the_files_are_small():
    sizes = [Path(files.locate(files.SCHEME + name)).stat().st_size for name in files.packaged_names()]
    assert max(sizes) < LARGEST and sum(sizes) < TOGETHER
