"""The convolutions of mmlocalmamba.ops.stand_ins against the definition in float64.

The cases are those of causal_conv1d's own tests that do not need CUDA. The tolerances are smaller than there (3e-4 and
1e-3 absolute; 3e-3 and 5e-3; 1e-2 and 5e-2).
"""
import itertools

import pytest
import torch
from torch.nn import functional as F

from mmlocalmamba.ops.stand_ins import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)

BATCH, DIM = 2, 6
# Relative to the norm of the expected tensor. Gradients have the dtype of their inputs.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
each_itype = pytest.mark.parametrize('itype', TOLERANCE, ids=str)
each_width = pytest.mark.parametrize('width', [2, 3, 4])
each_activation = pytest.mark.parametrize('activation', [None, 'silu', 'swish'])


def definition(x, weight, bias=None, activation=None, before=None):
    """Compute one step after the other in float64; ``before`` holds the steps before the first."""
    x, weight = x.double(), weight.double()
    taps = weight.shape[1]
    x = torch.cat([x.new_zeros(*x.shape[:2], taps - 1) if before is None else before.double(), x], dim=-1)
    y = torch.stack([(x[..., t:t + taps] * weight).sum(-1) for t in range(x.shape[-1] - taps + 1)], dim=-1)
    y = y if bias is None else y + bias.double()[:, None]
    return y if activation is None else F.silu(y)


def close(ours, expected, tolerance, name=''):
    assert ours.shape == expected.shape, name
    error = (ours.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert error <= tolerance, f'{name}: relative error {error:.1e}'


def inputs(itype, length, width, has_bias, has_states, channel_last, dim=DIM):
    torch.manual_seed(0)
    leaves = dict(x=torch.randn(BATCH, length, dim + 3, dtype=itype)[..., 1:dim + 1].transpose(1, 2),
                  weight=torch.randn(dim, width))
    if not channel_last:
        leaves['x'] = torch.randn(BATCH, dim + 3, length, dtype=itype)[:, 1:dim + 1]
    if has_bias:
        leaves['bias'] = torch.randn(dim)
    if has_states:
        leaves['initial_states'] = torch.randn(BATCH, width - 1, dim, dtype=itype).transpose(1, 2)
    return {name: x.requires_grad_() for name, x in leaves.items()}


def check_gradients(leaves, ours, expected, tolerance):
    """Compare the gradients of a randomly weighted sum of the outputs."""
    names = list(leaves)
    weights = [torch.randn(y.shape, dtype=torch.float64) for y in expected]
    for name, grad, exact in zip(
            names, torch.autograd.grad(sum((y.double() * w).sum() for y, w in zip(ours, weights)), leaves.values()),
            torch.autograd.grad(sum((y * w).sum() for y, w in zip(expected, weights)), leaves.values())):
        close(grad, exact, tolerance, name)


@each_itype
@each_width
@each_activation
@pytest.mark.parametrize('has_bias,has_states,return_states,channel_last',
                         list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize('length', [1, 2, 37])
def test_convolution(itype, width, activation, has_bias, has_states, return_states, channel_last, length):
    leaves = inputs(itype, length, width, has_bias, has_states, channel_last)
    ours = causal_conv1d_fn(**leaves, return_final_states=return_states, activation=activation)
    before = leaves.get('initial_states')
    expected = [definition(leaves['x'], leaves['weight'], leaves.get('bias'), activation, before)]
    if return_states:
        whole = F.pad(leaves['x'], (width - 1, 0)) if before is None else torch.cat([before, leaves['x']], dim=-1)
        expected.append(whole[..., whole.shape[-1] - width + 1:].double())
    ours = ours if return_states else [ours]
    for y, exact in zip(ours, expected, strict=True):
        assert y.dtype == itype
        close(y, exact, TOLERANCE[itype])
    check_gradients(leaves, ours, expected, 2 * TOLERANCE[itype])


@each_itype
@pytest.mark.parametrize('length', [8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134,
                                    *(pytest.param(length, marks=pytest.mark.slow) for length in (2048, 4096))])
def test_lengths(itype, length):
    leaves = inputs(itype, length, 4, True, False, True, dim=65)
    ours = causal_conv1d_fn(**leaves, activation='silu')
    expected = definition(**leaves, activation='silu')
    close(ours, expected, TOLERANCE[itype])
    check_gradients(leaves, [ours], [expected], 2 * TOLERANCE[itype])


def test_final_states_are_written_where_they_are_wanted():
    x, weight = torch.randn(2, 3, 5), torch.randn(3, 4)
    out = torch.empty(2, 3, 3)
    _, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final is out and torch.equal(out, x[..., 2:])
    # What is returned belongs to the caller alone.
    _, final = causal_conv1d_fn(x, weight, initial_states=out, return_final_states=True)
    assert final.data_ptr() not in (x.data_ptr(), out.data_ptr())
    # Two halves are the whole.
    first, final = causal_conv1d_fn(x[..., :2], weight, return_final_states=True)
    second = causal_conv1d_fn(x[..., 2:], weight, initial_states=final)
    torch.testing.assert_close(torch.cat([first, second], dim=-1), causal_conv1d_ref(x, weight))


@each_itype
@each_width
@each_activation
@pytest.mark.parametrize('has_bias', [False, True])
@pytest.mark.parametrize('length', [8, 63, 64, 65, 257])
def test_sequences_in_one_batch(itype, width, activation, has_bias, length):
    """Each sequence is convolved alone, and what belongs to none comes out as zeros."""
    leaves = inputs(itype, length, width, has_bias, False, True)
    cuts = [[0, 1, 3, length], [0, length // 2, length - 1, length]]
    padded = length - 2  # the last steps of the second item belong to no sequence
    seq_idx = torch.zeros(BATCH, length, dtype=torch.int32)
    expected = []
    for b, cut in enumerate(cuts):
        parts = []
        for number, (start, stop) in enumerate(itertools.pairwise(cut)):
            seq_idx[b, start:stop] = number
            parts.append(definition(leaves['x'][b:b + 1, :, start:stop], leaves['weight'], leaves.get('bias'),
                                    activation))
        expected.append(torch.cat(parts, dim=-1))
    seq_idx[1, padded:] = -1
    expected[1] = torch.cat([definition(leaves['x'][1:, :, start:stop], leaves['weight'], leaves.get('bias'),
                                        activation) for start, stop in ((0, length // 2), (length // 2, padded))]
                            + [torch.zeros(1, DIM, 2, dtype=torch.float64)], dim=-1)
    expected = torch.cat(expected)
    ours = causal_conv1d_fn(**leaves, seq_idx=seq_idx, activation=activation)
    assert ours.dtype == itype and not ours[1, :, padded:].any()
    close(ours, expected, TOLERANCE[itype])
    check_gradients(leaves, [ours], [expected], 2 * TOLERANCE[itype])


def test_history_of_sequences_belongs_to_the_first():
    x, weight, before = torch.randn(1, 3, 6), torch.randn(3, 3), torch.randn(1, 3, 2)
    seq_idx = torch.tensor([[4, 4, 4, 7, 7, 7]])
    y = causal_conv1d_ref(x, weight, initial_states=before, seq_idx=seq_idx)
    expected = torch.cat([definition(x[..., :3], weight, before=before), definition(x[..., 3:], weight)], dim=-1)
    close(y, expected, 1e-6)


@pytest.mark.parametrize('seq_idx', [None, torch.tensor([[0, 0, 1, 1]])], ids=['one', 'two'])
def test_second_derivatives(seq_idx):
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                       for shape in ((1, 2, 4), (2, 3), (2, )))
    assert torch.autograd.gradgradcheck(lambda x, w, b: causal_conv1d_fn(x, w, b, seq_idx, activation='silu'),
                                        (x, weight, bias))


# ---- step by step ----

@each_itype
@each_width
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('has_bias,ring,gather', list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize('length', [1, 4, 5])
@pytest.mark.parametrize('extra', [0, 3])
def test_update(itype, width, activation, has_bias, ring, gather, length, extra):
    torch.manual_seed(0)
    size, batch = width - 1 + extra, 5
    x, weight = torch.randn(batch, length, DIM, dtype=itype).transpose(1, 2), torch.randn(DIM, width)
    bias = torch.randn(DIM) if has_bias else None
    entries = 3 * batch if gather else batch
    state = torch.randn(entries, size, DIM, dtype=itype).transpose(1, 2)
    indices = torch.randperm(entries)[:batch].int() if gather else None
    if gather:
        indices[2] = -1  # an item that is not there
    seen = torch.randint(0, 1024, (batch, ), dtype=torch.int32) if ring else None
    expected_state, expected = state.clone(), torch.zeros(batch, DIM, length, dtype=torch.float64)
    for b in range(batch):
        entry = b if indices is None else int(indices[b])
        if entry < 0:
            continue
        place = [int(seen[b] if ring else 0) + t for t in range(-size, length)]
        before = (torch.stack([state[entry, :, p % size] for p in place[:size]], dim=-1) if ring else state[entry])
        expected[b] = definition(x[b:b + 1], weight, bias, activation, before[None, :, size - width + 1:])[0]
        if ring:
            for t in range(length):
                expected_state[entry, :, place[size + t] % size] = x[b, :, t]
        else:
            expected_state[entry] = torch.cat([state[entry], x[b]], dim=-1)[:, length:]
    ours = causal_conv1d_update(x, state, weight, bias, activation, seen, indices)
    assert ours.dtype == itype
    close(ours, expected, TOLERANCE[itype])
    assert torch.equal(state, expected_state)
    if gather:
        assert not ours[2].any()


def test_steps_are_the_whole_convolution():
    x, weight, bias = torch.randn(2, 3, 7), torch.randn(3, 4), torch.randn(3)
    state = torch.zeros(2, 3, 4)
    steps = [causal_conv1d_update_ref(x[..., t], state, weight, bias, 'silu') for t in range(7)]
    assert steps[0].shape == (2, 3)
    torch.testing.assert_close(torch.stack(steps, dim=-1), causal_conv1d_fn(x, weight, bias, activation='silu'))


# ---- bad input, odd sizes ----

def test_empty():
    weight = torch.randn(3, 4)
    for shape in ((2, 3, 0), (0, 3, 5)):
        y, final = causal_conv1d_fn(torch.randn(shape), weight, return_final_states=True)
        assert y.shape == shape and final.shape == (shape[0], 3, 3)
    # A single tap has no history.
    x = torch.randn(2, 3, 5)
    y, final = causal_conv1d_fn(x, weight[:, :1], return_final_states=True)
    torch.testing.assert_close(y, x * weight[:, :1])
    assert final.shape == (2, 3, 0)


def test_autocast_changes_nothing():
    x, weight = torch.randn(2, 3, 9), torch.randn(3, 4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ours = causal_conv1d_fn(x, weight, activation='silu')
    close(ours, definition(x, weight, activation='silu'), 1e-6)


@pytest.mark.parametrize('change,error,message', [
    (dict(activation='gelu'), NotImplementedError, "activation must be None, silu or swish, got 'gelu'"),
    (dict(weight=torch.ones(4, 3)), ValueError,
     r'x must be \(B, D, L\) and weight \(D, W\), got \(2, 3, 5\) and \(4, 3\)'),
    (dict(bias=torch.ones(4)), ValueError, r'bias must have shape \(D,\) = \(3,\), got \(4,\)'),
    (dict(x=torch.ones(2, 3, 5).long()), TypeError, 'x must be a floating point tensor'),
    (dict(initial_states=torch.ones(2, 3, 3)), ValueError, r'initial_states must have shape .* = \(2, 3, 2\)'),
    (dict(seq_idx=torch.zeros(2, 4)), ValueError, r'seq_idx must have shape \(B, L\) = \(2, 5\), got \(2, 4\)'),
    (dict(seq_idx=torch.zeros(2, 5), return_final_states=True), ValueError, 'return_final_states must be False'),
    (dict(return_final_states=True, final_states_out=torch.ones(2, 3, 1)), ValueError, 'final_states_out must have'),
])
def test_bad_convolutions(change, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d_fn(**{'x': torch.ones(2, 3, 5), 'weight': torch.ones(3, 3), **change})


@pytest.mark.parametrize('change,message', [
    (dict(conv_state=torch.ones(2, 3, 1)), 'conv_state holds 1 steps, a weight of width 3 needs 2'),
    (dict(conv_state=torch.ones(3, 3, 2)), r'conv_state must have shape \(B, D, S\) = \(2, 3, 2\), got \(3, 3, 2\)'),
    (dict(cache_seqlens=torch.ones(3)), 'cache_seqlens must have shape'),
    (dict(conv_state_indices=torch.ones(3)), 'conv_state_indices must have shape'),
])
def test_bad_updates(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**{'x': torch.ones(2, 3), 'conv_state': torch.ones(2, 3, 2), 'weight': torch.ones(3, 3),
                                **change})
