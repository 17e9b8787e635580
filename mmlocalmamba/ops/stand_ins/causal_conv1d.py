"""The functions of ``causal_conv1d`` (1.7). Import them from :mod:`mmlocalmamba.ops.stand_ins`."""
import torch
from torch import Tensor
from torch.nn import functional as F

from mmlocalmamba.ops.dispatch import check_dtypes, compute_dtype, expect_shape, without_autocast


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_dtypes(x=x, weight=weight, bias=bias)
    if activation not in (None, 'silu', 'swish'):
        raise NotImplementedError(f'activation must be None, silu or swish, got {activation!r}')
    if x.dim() != 3 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f'x must be (B, D, L) and weight (D, W), got {tuple(x.shape)} and {tuple(weight.shape)}')
    expect_shape('bias', bias, (weight.shape[0], ), '(D,)')


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Return the outputs (B, D, L) of all complete windows of x (B, D, L + W - 1)."""
    if x.shape[-1] < weight.shape[1]:  # there is no window: torch would raise an error
        return (x[..., :0] * weight[:, :1]).to(compute_dtype(x))
    compute = torch.promote_types(compute_dtype(x), weight.dtype)
    with without_autocast(x):
        y = F.conv1d(x.to(compute), weight.to(compute)[:, None], None if bias is None else bias.to(compute),
                     groups=weight.shape[0])
        return F.silu(y) if activation else y


def with_history(x: Tensor, width: int, initial_states: Tensor | None) -> Tensor:
    """Return x (B, D, L) with the W - 1 steps before it: (B, D, L + W - 1)."""
    if initial_states is None:
        return F.pad(x, (width - 1, 0))
    expect_shape('initial_states', initial_states, (*x.shape[:2], width - 1), '(B, D, W - 1)')
    return torch.cat([initial_states.to(x.dtype), x], dim=-1)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | str | None = None,
                     initial_states: Tensor | None = None, return_final_states: bool = False,
                     final_states_out: Tensor | None = None,
                     activation: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve causally, for each channel alone: step t is a weighted sum of steps t - W + 1 to t.

    Args:
        x: (B, D, L).
        weight: (D, W).
        bias: (D,) or None.
        seq_idx: (B, L) integers or None: the number of the sequence that each step belongs to. A step reads only steps
            of its own sequence. Negative numbers mark padding, whose outputs are 0. A string is the activation, which
            has this place in causal_conv1d 1.0.
        initial_states: (B, D, W - 1), the steps before the first, or None for zeros. With ``seq_idx`` they belong to
            the sequence of the first step.
        return_final_states: If True, also return the last W - 1 inputs, from which another call can continue.
        final_states_out: (B, D, W - 1), a tensor to write these to, or None.
        activation: None, 'silu' or 'swish' (the same as 'silu').

    Returns:
        (B, D, L) in x's dtype, computed in float32 at least. With ``return_final_states`` also (B, D, W - 1).

    Raises:
        ValueError: Shapes do not match, or final states are requested with ``seq_idx``.
        NotImplementedError: The activation is unknown, or a tensor is complex.
        TypeError: A tensor holds integers.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    _check_conv(x, weight, bias, activation)
    width = weight.shape[1]
    whole = with_history(x, width, initial_states)
    if seq_idx is None:
        y = _convolve(whole, weight, bias, activation).to(x.dtype)
    elif return_final_states:
        raise ValueError('return_final_states must be False with seq_idx: final states of several sequences are '
                         'not defined')
    else:
        y = _convolve_sequences(whole, weight, bias, seq_idx, activation).to(x.dtype)
    if not return_final_states:
        return y
    final_states = whole[..., whole.shape[-1] - width + 1:]
    if final_states_out is None:
        return y, final_states.clone()
    expect_shape('final_states_out', final_states_out, (*x.shape[:2], width - 1), '(B, D, W - 1)')
    return y, final_states_out.copy_(final_states)


def _convolve_sequences(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor,
                        activation: str | None) -> Tensor:
    """Run :func:`_convolve` within sequences. The history belongs to the sequence of the first step."""
    width, L = weight.shape[1], x.shape[-1] - weight.shape[1] + 1
    expect_shape('seq_idx', seq_idx, (x.shape[0], L), '(B, L)')
    compute = torch.promote_types(compute_dtype(x), weight.dtype)
    x, weight = x.to(compute), weight.to(compute)
    whole = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=-1)
    y = x.new_zeros(*x.shape[:2], L) if bias is None else bias.to(compute)[:, None].expand(*x.shape[:2], L)
    for tap in range(width):
        same = (whole[:, tap:tap + L] == seq_idx)[:, None]
        y = y + weight[:, tap, None] * x[..., tap:tap + L] * same
    if activation:
        y = F.silu(y)
    return y.masked_fill((seq_idx < 0)[:, None], 0)


def causal_conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_states: Tensor | None = None,
                      return_final_states: bool = False, final_states_out: Tensor | None = None,
                      activation: str | None = None,
                      seq_idx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Call :func:`causal_conv1d_fn`, with the order of arguments of causal_conv1d's reference."""
    return causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
                         activation: str | None = None, cache_seqlens: Tensor | None = None,
                         conv_state_indices: Tensor | None = None) -> Tensor:
    """Compute the next steps of a causal convolution, to generate token by token.

    Args:
        x: (B, D), or (B, D, L) for L steps.
        conv_state: (B, D, S) with S >= W - 1, the last inputs. It is updated in place. With ``conv_state_indices`` it
            may have more entries than B.
        weight: (D, W).
        bias: (D,) or None.
        activation: None, 'silu' or 'swish' (the same as 'silu').
        cache_seqlens: (B,) integers or None: the number of steps before x for each item of the batch. ``conv_state``
            is then a ring buffer that holds step t at t % S.
        conv_state_indices: (B,) integers or None: the entry of ``conv_state`` that each item of the batch continues.
            Items with a negative index have no entry, and their output is 0.

    Returns:
        Outputs of x's shape and dtype.

    Raises:
        ValueError: Shapes do not match.
        NotImplementedError: The activation is unknown, or a tensor is complex.
        TypeError: A tensor holds integers.
    """
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    _check_conv(steps, weight, bias, activation)
    (batch, channels, L), width, size = steps.shape, weight.shape[1], conv_state.shape[-1]
    entries = batch if conv_state_indices is None else conv_state.shape[0]
    expect_shape('conv_state', conv_state, (entries, channels, size), '(B, D, S)')
    if size < width - 1:
        raise ValueError(f'conv_state holds {size} steps, a weight of width {width} needs {width - 1}')
    expect_shape('conv_state_indices', conv_state_indices, (batch, ), '(B,)')
    expect_shape('cache_seqlens', cache_seqlens, (batch, ), '(B,)')

    if conv_state_indices is None:
        state = conv_state.clone()
    else:
        used = conv_state_indices >= 0
        state = conv_state.index_select(0, conv_state_indices.clamp(min=0).long())
    if cache_seqlens is None:
        history = state[..., size - width + 1:]
        state = torch.cat([state, steps.to(state.dtype)], dim=-1)[..., L:]
    else:
        def ring(first: int, last: int) -> Tensor:
            """Return the places of these steps in the ring, counted from the first new step."""
            step = torch.arange(first, last, device=x.device) + cache_seqlens[:, None]
            return step.remainder(size)[:, None].expand(-1, channels, -1).long()

        history = state.gather(2, ring(1 - width, 0))
        kept = min(L, size)
        state = state.scatter(2, ring(L - kept, L), steps[..., L - kept:].to(state.dtype))
    y = _convolve(torch.cat([history.to(steps.dtype), steps], dim=-1), weight, bias, activation).to(x.dtype)
    if conv_state_indices is None:
        conv_state.copy_(state)
    else:
        conv_state.index_copy_(0, conv_state_indices[used].long(), state[used])
        y = y.masked_fill(~used[:, None, None], 0)
    return y.squeeze(-1) if x.dim() == 2 else y


def causal_conv1d_update_ref(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
                             activation: str | None = None, cache_seqlens: Tensor | None = None) -> Tensor:
    """Call :func:`causal_conv1d_update`, with the arguments of causal_conv1d's reference."""
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)
