"""Properties of a backbone of any kind on any image: hypothesis draws both."""
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mmlocalmamba import directions as scans
from mmlocalmamba.backbones import LocalVim, LocalVMamba

# The same examples every time: a failure belongs to a change, not to a throw of the dice.
SETTINGS = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MAX_TOKENS = 96
DEPTH = 3

NAMES = st.builds(lambda name, K, flip: name.replace('<K>', str(K)) + flip, st.sampled_from(list(scans._SCANS)),
                  st.integers(1, 12) | st.just(100), st.sampled_from(['', '_flip']))
LISTS = st.lists(NAMES, min_size=1, max_size=4)
INDICES = st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True)


@st.composite
def vmambas(draw, **common):
    arch = dict(embed_dims=[8, 12], depths=[1, DEPTH - 1], d_state=draw(st.integers(1, 2)))
    return LocalVMamba(arch, out_indices=draw(INDICES), frozen_stages=draw(st.integers(-1, 2)), **common)


@st.composite
def vims(draw, **common):
    kind = draw(st.sampled_from(['featmap', 'avg_featmap', 'cls_token']))
    cls_token = draw(st.sampled_from(['none', 'middle'])) if kind != 'cls_token' else 'middle'
    return LocalVim(
        dict(embed_dims=8, num_layers=DEPTH, d_state=draw(st.integers(1, 2))), img_size=draw(st.integers(4, 40)),
        out_type=kind, out_indices=draw(INDICES) if kind == 'featmap' else -1, cls_token=cls_token,
        rope=cls_token == 'none' and draw(st.booleans()), out_feature=draw(st.sampled_from(['mixer', 'residual'])),
        frozen_stages=draw(st.integers(-1, DEPTH)), **common)


@st.composite
def cases(draw, kind):
    """A backbone, an image batch for it, and whether to run under autocast."""
    torch.manual_seed(draw(st.integers(0, 3)))
    patch = draw(st.integers(1, 4))
    model = draw((vmambas if kind is LocalVMamba else vims)(
        patch_size=patch, directions=draw(LISTS | st.lists(LISTS, min_size=DEPTH, max_size=DEPTH)),
        scattn=draw(st.sampled_from([True, False, dict(reduction=2, spatial=True)])),
        window_pad=draw(st.sampled_from(['zero', 'none'])), with_cp=draw(st.booleans())))
    H, W = (draw(st.integers(patch, MAX_TOKENS * patch)) for _ in range(2))
    images = torch.randn(draw(st.integers(1, 3)), 3, H, W)
    if draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    return model.train(draw(st.booleans())), images, draw(st.booleans())


def grid(model, images):
    """Tokens of the first stage: LocalVim completes the last patch, LocalVMamba leaves it out."""
    return [side // model.patch_size if isinstance(model, LocalVMamba) else -(-side // model.patch_size)
            for side in images.shape[2:]]


def shapes(model, images):
    h, w = grid(model, images)
    if isinstance(model, LocalVim):
        pooled = model.out_type != 'featmap'
        return [(len(images), 8)] if pooled else [(len(images), 8, h, w)] * len(model.out_indices)
    sizes = [(8, h, w), (12, -(-h // 2), -(-w // 2))]
    return [(len(images), *sizes[index]) for index in model.out_indices]


def run(model, images, autocast):
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        return model(images)


@pytest.mark.parametrize('kind', [LocalVMamba, LocalVim])
def test_outputs_and_gradients(kind):
    """Right shapes, finite values, gradients where they are wanted and nowhere else."""
    @settings(max_examples=40, **SETTINGS)
    @given(cases(kind), st.data())
    def check(case, data):
        model, images, autocast = case
        images.requires_grad = data.draw(st.booleans())
        for parameter in model.parameters():
            if data.draw(st.integers(0, 3)) == 0:
                parameter.requires_grad = False
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        event('all frozen' if not wanted else 'trained')
        outs = run(model, images, autocast)
        assert isinstance(outs, tuple) and [tuple(out.shape) for out in outs] == shapes(model, images)
        assert all(out.isfinite().all() for out in outs)
        loss = sum(out.float().square().mean() for out in outs)
        last = kind is LocalVim and DEPTH - 1 in model.out_indices or kind is LocalVMamba and 1 in model.out_indices
        assert loss.requires_grad or not last or not wanted and not images.requires_grad
        if loss.requires_grad:
            loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                assert name not in wanted or not last, f'{name} has no gradient'
            else:
                assert name in wanted and parameter.grad.isfinite().all(), name
        assert (images.grad is not None) == images.requires_grad
        assert images.grad is None or images.grad.isfinite().all()

    check()


def mixes_rows():
    """Return True if NaN in a row of a product in 16 bits reach another row.

    oneDNN's do on processors with AMX where rows are no multiple of 64 bytes
    (https://github.com/uxlfoundation/oneDNN/issues/5717).
    """
    rows = torch.ones(74, 48, dtype=torch.bfloat16)
    rows[37] = float('nan')
    return int((rows @ torch.ones(48, 16, dtype=torch.bfloat16)).isnan().any(1).sum()) > 1


@pytest.mark.parametrize('kind', [LocalVMamba, LocalVim])
def test_items_of_a_batch_are_independent(kind):
    """No value of another item of the batch, NaN included, changes a bit of an output or a gradient."""
    mixed = mixes_rows()

    @settings(max_examples=20, **SETTINGS)
    @given(cases(kind))
    def check(case):
        model, images, autocast = case
        model.eval()
        results = []
        for other in (1., -3. if autocast and mixed else float('nan')):
            batch = torch.cat([images[:1], torch.full_like(images[:1], other), images[1:]]).requires_grad_()
            kept = [index for index in range(len(batch)) if index != 1]
            outs = [out[kept] for out in run(model, batch, autocast)]
            sum(out.float().square().mean() for out in outs).backward()
            results.append([*outs, batch.grad[kept]])
            if other == 1.:
                assert not batch.grad[1].any()
        for first, second in zip(*results):
            assert torch.equal(first, second)

    check()
