"""Weights by name: what the table says, and downloads from a file server on the loopback."""
import dataclasses
import errno
import resource

import pytest
import torch
from file_server import saved, serving
from processes import ROOT, port
from test_loading import log, official_of  # noqa: F401  a fixture

from mmlocalmamba import create_model, files, list_models
from mmlocalmamba.backbones import LocalVim
from mmlocalmamba.weights import load_checkpoint, released, to_official
from mmlocalmamba.weights.released import NAMED, Weights

RELEASED = {name: weights for name, weights in NAMED.items() if not weights.packaged}
TINY = 'localvim_nano.test'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('http_proxy', raising=False)
    return tmp_path / 'home/hub/checkpoints'


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_model('localvim_nano', img_size=32, patch_size=4, num_classes=7).eval()


@pytest.fixture
def served(model, cache, monkeypatch):
    """A released name whose file, in the authors' names, a server has; the server's list of what was asked for."""
    content = saved(dict(model=to_official(model.state_dict())[0], epoch=3))
    with serving({'tiny.ckpt': content}) as (address, asked):
        state = model.state_dict()
        monkeypatch.setitem(NAMED, TINY, Weights(
            'localvim-nano_test', f'{address}/tiny.ckpt', model='localvim_nano',
            options=dict(img_size=32, patch_size=4), num_classes=7, tensors=len(state),
            values=sum(value.numel() for value in state.values()),
            source='https://example.org', licence='MIT', reported={'top-1': 12.3}))
        yield asked


# ---- the table ----

@pytest.mark.parametrize('name', [name for name, weights in RELEASED.items() if weights.model])
def test_tensors_and_values_are_those_of_the_model(name):
    weights = RELEASED[name]
    with torch.device('meta'):
        state = create_model(name).state_dict()
    assert (weights.tensors, weights.values) == (len(state), sum(value.numel() for value in state.values()))


@pytest.mark.parametrize('name', RELEASED)
def test_every_entry_says_whose_weights_they_are(name):
    weights = RELEASED[name]
    assert weights.file.startswith('https://') and weights.source.startswith('https://github.com/')
    assert weights.reported and all(10 < value < 90 for value in weights.reported.values())
    assert released.find(files.SCHEME + name) == released.find(files.SCHEME + weights.config) \
        == released.find(weights.file) == (name, weights)
    line = weights.describe(name)
    assert weights.source in line and str(next(iter(weights.reported.values()))) in line


def test_the_page_lists_them():
    page = (ROOT / 'docs/weights.md').read_text()
    for name, weights in RELEASED.items():
        figures = ', '.join(f'{metric} {value}' for metric, value in weights.reported.items())
        assert f'| `{name}` | {figures} |\n' in page


def test_no_two_files_have_one_place_in_the_cache():
    assert len({files.cached(weights.file) for weights in RELEASED.values()}) == len(RELEASED)


def test_directions_of_a_name():
    """Files of LocalMamba's authors do not say them, their names do."""
    assert RELEASED['localvim_tiny'].directions() == LocalVim('tiny').requirements()['directions']
    assert RELEASED['vmamba_tiny'].directions() is None  # the file shows them


# ---- downloads ----

def test_downloaded_once_and_converted(served, model, cache, log):  # noqa: F811
    found = create_model(TINY, pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(found(images), model(images))
    assert TINY in list_models(pretrained=True)
    lines = '\n'.join(message for message, _ in log)
    assert 'downloading http://127.0.0.1' in lines and "converted from LocalVim's names" in lines
    assert 'licence: MIT, reported at https://example.org: top-1 12.3' in lines
    assert 'do not name their scan directions' not in lines  # the name does
    features = create_model(TINY, pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(model.head(features(images)), model(images))
    assert len(create_model(TINY, pretrained=True, features_only=True, out_indices=(1, 3))(images)) == 2
    assert served == ['tiny.ckpt'] and [path.name for path in cache.iterdir()] == ['tiny.ckpt']


@pytest.mark.parametrize('there', [True, False])
def test_the_entry_that_the_figures_are_of(there, model, cache, monkeypatch):
    """If the file has it; another may still be asked for."""
    weights = to_official(model.state_dict())[0]
    average = {f'module.{name}': value + 1 for name, value in weights.items()}
    content = dict(model=weights, **(dict(model_ema=average) if there else {}))
    with serving({'tiny.ckpt': saved(content)}) as (address, _):
        monkeypatch.setitem(NAMED, TINY, Weights('localvim-nano_test', f'{address}/tiny.ckpt', model='localvim_nano',
                                                 key='model_ema'))
        loaded = load_checkpoint(files.SCHEME + TINY)
        own = load_checkpoint(files.SCHEME + TINY, key='model')
        by_address = load_checkpoint(f'{address}/tiny.ckpt')
    positions = model.state_dict()['backbone.pos_embed']
    assert torch.equal(loaded['state_dict']['backbone.pos_embed'], positions + there)
    assert torch.equal(own['model']['backbone.pos_embed'], positions)
    assert torch.equal(by_address['state_dict']['backbone.pos_embed'], positions)


@pytest.mark.parametrize('spelling', ['name', 'config', 'address', 'file'])
def test_every_spelling_comes_under_our_names(spelling, served, model, cache):
    weights = NAMED[TINY]
    if spelling == 'file':
        load_checkpoint(files.SCHEME + TINY)
    name = dict(name=files.SCHEME + TINY, config=files.SCHEME + weights.config, address=weights.file,
                file=f'{files.SCHEME}{cache}/tiny.ckpt')[spelling]
    loaded = load_checkpoint(name)['state_dict']
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    needed = loaded._metadata['backbone']
    assert needed['grid'] == [8, 8] and ('directions' in needed) == (spelling != 'file')


def test_directions_of_a_name_are_compared(served):
    other = LocalVim('nano', img_size=32, patch_size=4, directions=['h', 'v'] * 2)
    with pytest.raises(RuntimeError, match='directions: its weights were trained with'):
        other.load_pretrained(files.SCHEME + TINY)
    other.load_pretrained(files.SCHEME + TINY, allow=['directions'])


def test_a_file_that_was_downloaded_by_hand(served, cache):
    """It lies where the error about a missing network says."""
    served_file = files.cached(NAMED[TINY].file)
    create_model(TINY, pretrained=True)
    assert served_file == str(cache / 'tiny.ckpt')
    create_model(TINY, pretrained=True)
    assert served == ['tiny.ckpt']


WRONG = {
    'a page': ((b'<!DOCTYPE html><html>sign in</html>', {'Content-Type': 'text/html; charset=utf-8'}),
               'the answer is a web page, not a file'),
    'a page without a type': ((b'\n <html>moved</html>', {}), 'the answer is a web page'),
    'interrupted': ((b'x' * 3_000_000, {'Content-Length': '9000000'}),
                    r'ended after 3,000,000 of 9,000,000 bytes|IncompleteRead'),
    'too small': ((b'x' * 100, {}), r'has 100 bytes, but the weights alone are [\d,]+'),
    'too small, of unknown length': ((b'x' * 100, {'Content-Length': None}), 'has 100 bytes, but the weights alone'),
}


@pytest.mark.parametrize('case', WRONG)
def test_what_is_not_the_file_is_not_kept(case, served, cache, monkeypatch):
    answer, message = WRONG[case]
    with serving({'tiny.ckpt': answer}) as (address, _):
        monkeypatch.setitem(NAMED, TINY, dataclasses.replace(NAMED[TINY], file=f'{address}/tiny.ckpt'))
        with pytest.raises(RuntimeError, match=f'http://.*/tiny.ckpt was not fetched.*({message})') as raised:
            create_model(TINY, pretrained=True)
    said = str(raised.value)
    assert '\n' not in said and f'by other means and save it as {cache}/tiny.ckpt' in said
    assert not list(cache.iterdir())


@pytest.mark.parametrize('address', ['http://127.0.0.1:{port}/a.pth', 'http://no-such-host.invalid/a.pth'])
def test_without_a_network(address, cache):
    address = address.format(port=port())
    with pytest.raises(RuntimeError, match='a.pth was not fetched .*Check the address and the network') as raised:
        files.load_checkpoint(address)
    assert '\n' not in str(raised.value) and not list(cache.iterdir())


def test_no_such_file_on_the_server(served, cache):
    with serving({}) as (address, _), pytest.raises(RuntimeError, match='was not fetched .*404'):
        files.fetch(f'{address}/a.pth')
    assert not list(cache.iterdir())


def test_a_disk_that_is_full_before(served, cache, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('U', (), dict(free=10)))
    with pytest.raises(RuntimeError, match='was not saved in .* bytes are needed, 10 are free.*set TORCH_HOME'):
        create_model(TINY, pretrained=True)
    assert not list(cache.iterdir())


def test_a_disk_that_becomes_full(served, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match='was not saved in .*Free space there, or set TORCH_HOME') as raised:
            create_model(TINY, pretrained=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.__cause__.errno in (errno.EFBIG, errno.ENOSPC) and not list(cache.iterdir())


def test_a_cache_that_cannot_be_written(served, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'file'))
    with pytest.raises(RuntimeError, match='was not saved in .*set TORCH_HOME to another folder'):
        create_model(TINY, pretrained=True)


def test_a_part_of_a_file_in_the_cache_is_named(served, cache):
    """Of a program that writes what it downloads at once."""
    cache.mkdir(parents=True)
    (cache / 'tiny.ckpt').write_bytes(b'PK' * 100)
    with pytest.raises(RuntimeError, match='tiny.ckpt has 200 bytes, but .*: remove it, and it is downloaded again'):
        create_model(TINY, pretrained=True)


def test_a_damaged_file_in_the_cache_is_named(served, cache):
    cache.mkdir(parents=True)
    (cache / 'tiny.ckpt').write_bytes(b'PK' * 1_000_000)
    with pytest.raises(RuntimeError, match=f'tiny.ckpt was not loaded.*remove {cache}/tiny.ckpt'):
        create_model(TINY, pretrained=True)


def test_weights_that_are_not_complete(model, served, cache):
    cache.mkdir(parents=True)
    weights = to_official(model.state_dict())[0]
    torch.save(dict(model=dict(list(weights.items())[3:]), filling=torch.rand(1_000_000)), cache / 'tiny.ckpt')
    with pytest.raises(RuntimeError, match=r'tiny.ckpt holds \d+ tensors .*, but the model has \d+ .*: remove'):
        create_model(TINY, pretrained=True)


@pytest.mark.parametrize('name', ['localvim_huge', 'nowhere.ckpt'])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(FileNotFoundError, match='localvim_tiny.*vmamba_base'):
        load_checkpoint(files.SCHEME + name)

