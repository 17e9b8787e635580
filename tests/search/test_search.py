"""The relaxed choice of directions, and what it saves."""
import itertools

import pytest
import torch

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.directions import scan_tables
from mmlocalmamba.files import write_whole
from mmlocalmamba.layers import LocalVimMixer, LocalVMambaMixer
from mmlocalmamba.layers import ssm as layers_ssm
from mmlocalmamba.search import CANDIDATES, MixedScan
from mmlocalmamba.search.results import (
    alphas_csv,
    find_alphas,
    relative_entropy,
    result_json,
    search_result,
    top_directions,
    unchanged,
)
from mmlocalmamba.search.supernet import inclusion_probabilities, relax, systematic_sample

MIXERS = [LocalVimMixer, LocalVMambaMixer]
SIZE = (4, 6)


def mixer(kind, sampling, candidates=CANDIDATES, channels=8, scattn=True, **options):
    torch.manual_seed(0)
    names, relaxed, arguments = relax(kind, candidates, sampling=sampling, **options)
    built = relaxed(channels, names, d_state=2, scattn=scattn, **arguments)
    assert isinstance(built, kind)
    torch.manual_seed(1)
    for parameter in built.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def run(model, x, size=SIZE):
    tables = scan_tables(model.directions, *size)
    return model(x, tables) if isinstance(model, LocalVimMixer) else model(x, size, tables)


def step(model, seed=0):
    """Output and gradients of one training step."""
    torch.manual_seed(3)
    x = torch.randn(2, SIZE[0] * SIZE[1], 8)
    torch.manual_seed(seed)
    y = run(model, x)
    return y.detach(), torch.autograd.grad(y.square().sum(), list(model.parameters()))


@pytest.mark.parametrize('p', [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.5, 0.4, 0.06, 0.04], [0., 1., 0., 0.]])
@pytest.mark.parametrize('samples', [1, 2, 3, 4])
def test_inclusion_probabilities(p, samples):
    p = torch.tensor(p)
    if int((p > 0).sum()) < samples:
        p = (p + 1e-6) / (1 + 4e-6)
    included = inclusion_probabilities(p, samples)
    assert included.sum() == pytest.approx(samples) and (included <= 1).all() and (included > 0).sum() >= samples
    free = included < 1 - 1e-6
    if (free & (p > 0)).any():  # proportional, and what is capped is likelier than that
        scale = (included / p)[free & (p > 0)]
        torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-5, atol=0)
        assert (p[~free].double() * scale[0] >= 1 - 1e-6).all()


@pytest.mark.parametrize('samples', [1, 2, 3])
def test_single_path_is_unbiased_by_enumeration(samples):
    """Output and gradient, over all orders and starting points, equal those of the full sum."""
    torch.manual_seed(0)
    full = MixedScan(4)
    full.alphas.data = torch.tensor([0.3, -0.5, 1.2, 0.1], dtype=torch.float64)
    y = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    target = torch.randn(1, 3, 5, dtype=torch.float64)

    def moments(weights, features):
        out = full(features, weights)
        gradient, = torch.autograd.grad((out * target).sum(), full.alphas, retain_graph=True)
        return out.detach(), gradient

    p = full.probabilities()
    expected = moments(p, y)
    included = inclusion_probabilities(p.detach(), samples)
    total, orders = [0., 0.], list(itertools.permutations(range(4)))
    for order in orders:
        order = torch.tensor(order)
        # The drawn set changes only where a point crosses a border.
        borders = torch.cat([torch.tensor([0., 1.]).double(), included[order].cumsum(0) % 1]).sort().values
        for low, high in zip(borders, borders[1:]):
            if high - low < 1e-12:
                continue
            drawn = systematic_sample(included, samples, order, (low + high) / 2)
            assert len(set(drawn.tolist())) == samples
            values = moments(p[drawn] / included[drawn], y[:, drawn])
            total = [a + (high - low) * b for a, b in zip(total, values)]
    for a, b in zip(total, expected):
        torch.testing.assert_close(a / len(orders), b)


@pytest.mark.parametrize('kind', MIXERS)
def test_single_path_approaches_the_full_sum(kind):
    """The same with a mixer's own draws; its output is linear in the sum (LocalVMamba's without its norm)."""
    full, sampled = mixer(kind, 'full'), mixer(kind, 'single_path', samples=2)
    if kind is LocalVMambaMixer:
        full.out_norm = sampled.out_norm = torch.nn.Identity()
    torch.manual_seed(3)
    x = torch.randn(1, SIZE[0] * SIZE[1], 8)
    with torch.no_grad():
        expected = run(full, x)
        mean = sum(run(sampled, x) for _ in range(250)) / 250
    assert (mean - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize('kind', MIXERS)
@pytest.mark.parametrize('scattn', [True, dict(spatial=True), False])
def test_everything_sampled_is_the_full_sum(kind, scattn):
    expected = step(mixer(kind, 'full', scattn=scattn))
    for options in (dict(sampling='single_path', samples=8), dict(sampling='partial_channel', reduction=1)):
        out, grads = step(mixer(kind, scattn=scattn, **options))
        torch.testing.assert_close(out, expected[0])
        for grad, other in zip(grads, expected[1]):
            torch.testing.assert_close(grad, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('kind', MIXERS)
def test_only_what_is_sampled_is_scanned(kind, monkeypatch):
    seen = []

    def scan(u, delta, A, B, C, D, tables, *args, **kwargs):
        seen.append((tables.src.shape[0], u.shape[-1]))
        return original(u, delta, A, B, C, D, tables, *args, **kwargs)

    original = layers_ssm.directional_scan
    monkeypatch.setattr(layers_ssm, 'directional_scan', scan)
    for options in (dict(sampling='full'), dict(sampling='single_path', samples=3),
                    dict(sampling='partial_channel', reduction=4)):
        model = mixer(kind, **options)
        step(model)
        step(model.eval())  # evaluation scans everything
    assert seen == [(8, 16), (8, 16), (3, 16), (8, 16), (8, 4), (8, 16)]


def saved_bytes(kind, **options):
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = mixer(kind, candidates=[f'w{K}' for K in range(1, 33)], **options)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = run(model, torch.randn(8, 36, 8), (6, 6))
    del y
    return sum(sizes.values())


@pytest.mark.parametrize('kind', MIXERS)
def test_sampling_saves_memory(kind):
    """Return the bytes that a step with 32 candidates keeps for its backward pass."""
    full = saved_bytes(kind, sampling='full')
    assert saved_bytes(kind, sampling='single_path', samples=2) < full / 6
    assert saved_bytes(kind, sampling='partial_channel', reduction=4) < full / 2


@pytest.mark.parametrize('build', [LocalVMamba, LocalVim])
@pytest.mark.parametrize('options', [dict(sampling='single_path', samples=2), dict(sampling='partial_channel')])
def test_backbones_sample_the_same_when_blocks_are_recomputed(build, options):
    arch = dict(embed_dims=[8, 16], depths=[1, 1], d_state=1) if build is LocalVMamba else dict(
        embed_dims=16, num_layers=2, d_state=1)
    image, grads = torch.randn(2, 3, 32, 32), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = build(arch, directions=dict(candidates=['h', 'v', 'w3', 'hilbert'], **options), with_cp=with_cp,
                      drop_path_rate=0.)
        state = {name: {key: id(value) for key, value in vars(module).items()}
                 for name, module in model.named_modules()}
        (model(image)[-1] * torch.linspace(0, 1, model(image)[-1].numel()).view_as(model(image)[-1])).sum()
        assert state == {name: {key: id(value) for key, value in vars(module).items()}
                         for name, module in model.named_modules()}
        torch.manual_seed(1)
        out = model(image)[-1]
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.isfinite(grad).all(), name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize('directions,message', [
    (dict(candidates=['h', 'x']), "unknown scan 'x'"),
    (dict(candidates=[]), 'must be a list of different scan names'),
    (dict(candidates=['h', 'h']), 'must be a list of different scan names'),
    (dict(candidates='h'), 'must be a list of different scan names'),
    (dict(sampling='some'), "sampling must be one of .*, got 'some'"),
    (dict(sampling='single_path', samples=9), 'samples must be 1 to 8'),
    (dict(reduction=0), 'reduction must be at least 1'),
    (dict(sample=3), 'a direction search has no options sample: it takes candidates'),
])
def test_bad_searches(directions, message):
    with pytest.raises(ValueError, match=message):
        LocalVMamba('nano', directions=directions)


def test_top_directions_keep_the_order_of_the_candidates():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert top_directions(p, 'abcd', 2) == [['b', 'd'], ['a', 'b']]
    assert top_directions(p, 'abcd', 3) == [['b', 'c', 'd'], ['a', 'b', 'c']]
    with pytest.raises(ValueError, match='k=5 directions cannot be chosen from 4 candidates: a, b, c, d'):
        top_directions(p, 'abcd', 5)
    assert relative_entropy(p)[1] == pytest.approx(1)
    assert relative_entropy(torch.tensor([[1., 0., 0.]]))[0] == pytest.approx(0)
    assert unchanged([['a', 'b'], ['c']], [['b', 'c'], ['c']]) == pytest.approx(2 / 3)


def test_blocks_are_found_in_their_order():
    state = {f'm.stages.{i}.blocks.{j}.mixer.mixed_scan.alphas': torch.full((3, ), 10. * i + j)
             for i, j in [(2, 10), (2, 9), (0, 0), (10, 0)]}
    assert [int(value[0]) for value in find_alphas(state).values()] == [0, 29, 30, 100]
    with pytest.raises(ValueError, match='no direction search in here'):
        find_alphas({'x': torch.zeros(1)})


def test_result_is_json_and_csv():
    import csv
    import io
    import json
    alphas = torch.tensor([[0., 2., 1.], [3., 0., 1.]])
    result = search_result(alphas, ['h', 'v', 'w2'], ['one', 'two'], 2, dict(seed=3))
    back = json.loads(result_json(result))
    assert back == result and back['directions'] == [['v', 'w2'], ['h', 'w2']] and back['provenance'] == dict(seed=3)
    rows = list(csv.DictReader(io.StringIO(alphas_csv([1, 2], [alphas, alphas], ['h', 'v', 'w2'], ['one', 'two']))))
    assert len(rows) == 12 and rows[1] == dict(step='1', block='one', direction='v', alpha='2',
                                               probability=f'{alphas.double().softmax(1)[0, 1]:.8g}')


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'x.json'
    write_whole(str(path), 'old')

    def fail(*args):
        raise OSError('disk is gone')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError):
        write_whole(str(path), 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
