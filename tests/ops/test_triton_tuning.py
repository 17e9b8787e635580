"""The file with the block sizes of the Triton kernels. Tests of the kernels themselves are in test_triton.py."""
import json
import warnings

import pytest
import torch

from mmlocalmamba import __main__ as main
from mmlocalmamba.ops import library
from mmlocalmamba.ops.backends.triton import tune, tuning

CPU = torch.device('cpu')
FORWARD = tuning.CANDIDATES['forward']
KEY = tuning.Key('interpreter', 'forward', 16, 'bfloat16')


@pytest.fixture(autouse=True)
def path(tuning_file):
    return tuning_file


def choose(kernel='forward', d_state=16, dtype=torch.bfloat16):
    return tuning.choose(kernel, CPU, d_state, dtype)


def test_candidates():
    for choices in tuning.CANDIDATES.values():
        assert len(set(choices)) == len(choices)
        for choice in choices:
            # A group may not reach over the end of a chunk; Triton takes powers of two.
            assert library.CHUNK % choice.group == 0
            assert choice.channels & (choice.channels - 1) == choice.warps & (choice.warps - 1) == 0


def test_place(monkeypatch, path):
    assert tuning.path() == str(path)
    monkeypatch.setenv(tuning.CACHE_VARIABLE, '')
    monkeypatch.setenv('XDG_CACHE_HOME', '/xdg')
    assert tuning.path() == '/xdg/mmlocalmamba/tuning.json'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', '/home/me')
    assert tuning.path() == '/home/me/.cache/mmlocalmamba/tuning.json'


def test_without_a_file():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert choose() == FORWARD[0] and choose('backward') == tuning.CANDIDATES['backward'][0]
    assert len(tuning.in_force(CPU)) == 2 and all('(built in)' in line for line in tuning.in_force(CPU))


def test_the_file_counts_for_its_key_only(path):
    tuning.save({KEY: FORWARD[3], KEY._replace(gpu='another'): FORWARD[2]})
    assert choose() == FORWARD[3]
    for other in (choose(d_state=8), choose(dtype=torch.float32)):
        assert other == FORWARD[0]
    assert choose('backward') == tuning.CANDIDATES['backward'][0]
    lines = tuning.in_force(CPU)
    assert lines[0] == f'forward, d_state 16, bfloat16: {FORWARD[3]} ({path})' and 'otherwise' in lines[1]
    with tuning.forced('forward', FORWARD[1]):
        assert choose() == FORWARD[1]
    assert choose() == FORWARD[3]


def test_the_file_is_added_to():
    other = KEY._replace(gpu='another')
    tuning.save({KEY: FORWARD[3], other: FORWARD[2]})
    tuning.save({KEY: FORWARD[1]})
    assert tuning.saved() == {KEY: FORWARD[1], other: FORWARD[2]}


def test_the_file_is_read_once(path):
    assert choose() == FORWARD[0]
    path.parent.mkdir()
    path.write_text('never looked at')
    assert choose() == FORWARD[0]


def entry(**changes):
    return {**KEY._asdict(), **FORWARD[1]._asdict(), **changes}


@pytest.mark.parametrize('content,reason', [
    ('', 'JSONDecodeError'),
    ('{"format": 2, "choices": [{"gpu', 'JSONDecodeError'),
    (b'\xff\xfe', 'UnicodeDecodeError'),
    ('[' * 100000, 'RecursionError'),
    ([1, 2], 'TypeError'),
    (dict(format=2), "KeyError: 'choices'"),
    (dict(format=0, choices=[]), 'its format is 0, not 2'),
    (dict(format=2, choices=[entry(channels=48)]), f'{FORWARD[1]._replace(channels=48)} is not a candidate'),
    (dict(format=2, choices=[entry(channels=None)]), 'is not a candidate of the forward kernel'),
    (dict(format=2, choices=[entry(warps='many')]), 'TypeError'),
    (dict(format=2, choices=[entry(), entry(kernel='sideways')]), "KeyError: 'sideways'"),
    (dict(format=2, choices=[entry(gpu=[])]), 'TypeError'),
    (dict(format=2, choices=[dict(channels=32)]), "KeyError: 'gpu'"),
    (None, 'IsADirectoryError'),
], ids=lambda x: repr(x)[:40])
def test_a_damaged_or_foreign_file_is_ignored(path, content, reason):
    path.parent.mkdir()
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning) as caught:
        assert choose() == FORWARD[0]
        assert choose() == FORWARD[0]
    message, = (str(warning.message) for warning in caught)  # once
    assert message.startswith(f'{path} is ignored') and reason in message and 'python -m mmlocalmamba tune' in message
    if content is not None:
        tuning.save({KEY: FORWARD[2]})
        assert choose() == FORWARD[2]


def test_numbers_are_those_of_the_candidates(path):
    path.parent.mkdir()
    path.write_text(json.dumps(dict(format=2, choices=[entry(channels=32.0)])))
    assert type(choose().channels) is int


def test_noise_does_not_choose():
    first, second, third = FORWARD[:3]
    assert tune._fastest({first: [1., 1.], second: [.99, .99], third: [2., .51]}) == first
    assert tune._fastest({first: [1., 1.], second: [1.2, .7], third: [.1, float('inf')]}) == second


def test_shapes():
    assert [len(tune.tuning_shapes(quick)) for quick in (True, False)] == [2, 8]
    assert tune.tuning_shapes(False)[3] == dict(batch=64, H=7, W=7, width=1536, rank=48)
    assert tune.tuning_shapes(False)[4] == dict(batch=2, H=200, W=333, width=192, rank=6)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without GPU')
def test_no_gpu(monkeypatch, path):
    monkeypatch.setattr('sys.argv', ['mmlocalmamba', 'tune', '--quick'])
    with pytest.raises(SystemExit, match='There is no GPU'):
        main.main()
    assert not path.exists()


@pytest.mark.parametrize('arguments', [['--states', '0'], ['--dtypes', 'float64'], ['--states', 'many']])
def test_bad_arguments(monkeypatch, capsys, arguments):
    monkeypatch.setattr('sys.argv', ['mmlocalmamba', 'tune', *arguments])
    with pytest.raises(SystemExit):
        main.main()
    assert f"'{arguments[1]}'" in capsys.readouterr().err


def test_a_device_without_index_is_the_current_one(monkeypatch):
    """Two GPUs are current in turn."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, device))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'GPU {device}')
    for index in (0, 1):
        monkeypatch.setattr(torch.cuda, 'current_device', lambda index=index: index)
        assert tuning.gpu(torch.device('cuda')) == tuning.gpu(torch.device('cuda', index)) \
            == f'GPU {index}, compute capability 9.{index}'
    tuning._gpu.cache_clear()
