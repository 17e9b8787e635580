"""The cache of tensors that are derived from image table_cache."""
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmlocalmamba import table_cache
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.directions import scan_tables
from mmlocalmamba.layers import rotary_tables

MAKERS = {
    'scan': lambda H, W: tuple(scan_tables(['h', 'w3_flip'], H, W)),
    'rotary': lambda H, W: rotary_tables(H, W, 8, 14, 'cpu'),
}


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(table_cache, '_captured', {})
    table_cache.clear()
    yield
    table_cache.clear()


def test_the_page_names_the_limit():
    page = (Path(__file__).parents[1] / 'docs/jobs.md').read_text()
    assert f'the cache of scan tables holds at most {table_cache.MAX_BYTES >> 20} MiB' in page


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_made_once_and_usable_in_training_after_inference(make):
    with torch.inference_mode():
        first = make(6, 5)
    assert not any(x.is_inference() for x in first)
    assert all(a is b for a, b in zip(make(6, 5), first, strict=True))
    assert make(5, 6)[0] is not first[0]


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_no_fake_tensor_stays(make):
    """torch.export runs models on tensors without values. The next eager call must not return one of them."""
    with FakeTensorMode():
        make(4, 3)
    assert table_cache.cached_bytes() == 0
    real = make(4, 3)
    assert all(type(x) is torch.Tensor for x in real)
    with FakeTensorMode():
        assert not any(type(x) is torch.Tensor for x in make(4, 3))
    assert all(a is b for a, b in zip(make(4, 3), real))


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_default_dtype_plays_no_part(make, dtype):
    expected = make(7, 9)
    table_cache.clear()
    torch.set_default_dtype(dtype)
    try:
        made = make(7, 9)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(made, expected):
        assert a.dtype == b.dtype and torch.equal(a, b)


TRANSFORMS = {
    'grad': lambda f: torch.func.grad(lambda x: f(x).sum()),
    'vmap of grad': lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x[None]).sum())),
    'vmap': lambda f: lambda x: torch.func.vmap(f)(x[None])[0],
    'jacrev': lambda f: torch.func.jacrev(lambda x: f(x).flatten(1).mean(1)),
    'jvp': lambda f: lambda x: torch.func.jvp(f, (x, ), (torch.ones_like(x), ))[1],
    'jacfwd': lambda f: torch.func.jacfwd(lambda scale: f(torch.ones(1, 3, 6, 5) * scale).sum()),
    'inference': lambda f: torch.inference_mode()(f),
    'default device': None,
}


@pytest.mark.parametrize('name', TRANSFORMS)
@pytest.mark.parametrize('kind', [LocalVMamba, LocalVim])
def test_the_first_call_may_be_in_any_mode(kind, name, monkeypatch):
    """Tables are made when a model first meets a size. Nothing of a mode stays in the cache."""
    forward_mode = name in ('jvp', 'jacfwd')
    monkeypatch.setenv('MMLOCALMAMBA_BACKEND', 'reference' if forward_mode else 'chunked')
    arch = (dict(embed_dims=[4], depths=[1], d_state=2) if kind is LocalVMamba else
            dict(embed_dims=8, num_layers=1, d_state=2))
    torch.manual_seed(0)
    model = kind(arch, patch_size=2, directions=['h', 'w2_flip'], **({} if kind is LocalVMamba else dict(img_size=8)))
    model.eval()
    x = torch.tensor(0.5) if name == 'jacfwd' else torch.randn(2, 3, 6, 5)

    def run():
        if name == 'default device':
            with torch.device('meta'):
                return model(x)[-1].detach()
        return TRANSFORMS[name](lambda x: model(x)[-1])(x).detach()

    first = run()
    again = run()  # with the tables of the first call
    table_cache.clear()
    model(torch.ones(1, 3, 6, 5) if name == 'jacfwd' else x)
    assert torch.equal(first, again) and torch.equal(first, run())
    model(torch.randn(1, 3, 8, 5))


def test_bytes_are_bounded_and_recently_used_entries_stay(monkeypatch):
    make = MAKERS['scan']
    make(8, 8)
    one = table_cache.cached_bytes()
    monkeypatch.setattr(table_cache, 'MAX_BYTES', 3 * one)
    table_cache.clear()
    first, second = make(8, 8), make(4, 16)
    for size in range(1, 30):
        assert make(8, 8)[0] is first[0]  # used again and again
        make(size, 2)
        assert table_cache.cached_bytes() <= 3 * one
    assert make(4, 16)[0] is not second[0]
    monkeypatch.setattr(table_cache, 'MAX_BYTES', 1)
    kept = make(9, 9)
    assert make(9, 9)[0] is kept[0]  # the newest stays, whatever its size


def test_entries_that_fill_the_cache_exactly_stay(monkeypatch):
    def get(key):
        return table_cache.cached(lambda device, traced: (torch.zeros(10), ), 'cpu', key)[0]

    monkeypatch.setattr(table_cache, 'MAX_BYTES', 80)
    first, second = get('first'), get('second')
    assert get('first') is first and get('second') is second
    get('third')
    assert table_cache.cached_bytes() == 80 and get('first') is not first
    monkeypatch.setattr(table_cache, 'MAX_BYTES', 1)
    get('fourth')
    assert table_cache.cached_bytes() == 40


def test_makers_are_told_of_tracing():
    seen = []

    def make(device, traced):
        seen.append((device, traced))
        return (torch.zeros(1), )

    with FakeTensorMode():
        table_cache.cached(make, 'cpu', 'x')
    table_cache.cached(make, 'cpu', 'x')
    assert seen == [(torch.device('cpu'), True), (torch.device('cpu'), False)]


def test_threads_get_the_same_values():
    expected = {size: MAKERS['scan'](size, 5) for size in range(1, 9)}
    table_cache.clear()
    wrong = []

    def work():
        for size in list(range(1, 9)) * 20:
            if not all(torch.equal(a, b) for a, b in zip(MAKERS['scan'](size, 5), expected[size])):
                wrong.append(size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Cuda:
    """Replace the functions of CUDA that the cache calls; tensors stay on the CPU."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.recorded = 'first', False, []
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
        monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: (device.index, self.stream)[1])
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: self.capturing)
        monkeypatch.setattr(torch.Tensor, 'record_stream', lambda x, stream: self.recorded.append(stream))

    def get(self, key, device='cuda'):
        return table_cache.cached(lambda device, traced: (device, torch.zeros(10))[1:], device, key)[0]


def test_a_device_without_an_index_is_the_current_one(monkeypatch):
    cuda = Cuda(monkeypatch)
    assert cuda.get('x') is cuda.get('x', 'cuda:1')
    assert cuda.get('x') is not cuda.get('x', 'cuda:0')


def test_tables_used_on_another_stream_are_recorded_there(monkeypatch):
    cuda = Cuda(monkeypatch)
    cuda.get('x'), cuda.get('x')
    assert cuda.recorded == []
    cuda.stream = 'second'
    cuda.get('x')
    assert cuda.recorded == ['second']


def test_tables_in_a_captured_graph_stay(monkeypatch):
    cuda = Cuda(monkeypatch)
    cuda.capturing = True
    with pytest.raises(RuntimeError, match=r"for \('x',\) yet. Run the model once at this size, then capture"):
        cuda.get('x')
    cuda.capturing = False
    table = cuda.get('x')
    cuda.capturing = True
    assert cuda.get('x') is table
    cuda.capturing = False
    table_cache.clear()
    assert cuda.get('x') is table
