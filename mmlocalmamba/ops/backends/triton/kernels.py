"""The Triton kernels, described in :mod:`mmlocalmamba.ops.backends.triton`. This module is imported on first use.

Conventions: a program owns a block of channels of one sequence (batch, direction), in one segment of its steps. Steps
are processed in groups of GROUP: all loads of a group come before its arithmetic and its stores come after it, so that
latencies overlap. A row of -1 is a pad or a step after the end: loads return zeros, and nothing is stored. States are
float32. Offsets of sequences have 64 bits, because tensors may have more than 2^31 elements. Offsets of rows within a
sequence have 32 bits, which need fewer registers; with WIDE they have 64.

scan_pack copies what all channels of a step share, the low-rank factor of its step size, B and C, into one row of
``packed`` (sequences, 1 + rows, WIDTH), in float32: the factor padded to PACKED_R, then B and C, each padded to
BLOCK_N. Row 0 of each sequence is zero, and pads read it. So these loads need no mask and are as wide as they can be.

A, dt_weight and all states are stored with channels last. Triton chooses the elements of each thread by its loads of
tiles of states. It would choose wide loads, although such a tile is loaded once and used often. Two arguments hide
properties of these loads from Triton. ``zero`` (0) hides the alignment of tiles: a thread gets all states of one
channel, so the sum over states needs no shuffle. ``unit`` (1) hides the contiguous dimension: a thread gets some states
of some channels.
"""
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)) = max(x, 0) + log(1 + z) with z = exp(-|x|), without cancellation; and its derivative.

    The polynomial is that of csrc/vector.h for float32. Triton's logarithm is slower.
    """
    z = tl.exp2(-tl.abs(x) * _LOG2E)
    p = z * -0.00317605702 + 0.0195425273
    p = p * z - 0.0563736128
    p = p * z + 0.105436238
    p = p * z - 0.152696671
    p = p * z + 0.196632743
    p = p * z - 0.249516163
    p = p * z + 0.333297105
    p = p * z - 0.499998926
    p = p * z + 1.
    y = tl.maximum(x, 0.) + z * p
    slope = tl.where(x > 0, 1., z) / (1. + z)
    large = x > 20.
    return tl.where(large, x, y), tl.where(large, 1., slope)


@triton.jit
def _rows(src, t, steps, IN_ORDER: tl.constexpr, HAS_SRC: tl.constexpr, WIDE: tl.constexpr):
    """Return the rows that step t reads and writes."""
    inside = t < steps
    if HAS_SRC:
        write = tl.load(src + t, mask=inside, other=-1)
    else:
        write = tl.where(inside, t, -1)
    if IN_ORDER:
        read = tl.where(inside, t, -1)
    else:
        read = write
    if WIDE:
        read, write = read.to(tl.int64), write.to(tl.int64)
    return read, write


@triton.jit
def _step(u, delta, packed, read, inside, d, valid, bias, weight, u_row, delta_row, R: tl.constexpr,
          BLOCK_R: tl.constexpr, WIDTH: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Return the input, the step size and the derivative of its softplus of one step, (BLOCK_D,) each."""
    mask = valid & (read >= 0)
    x = tl.load(u + read * u_row + d, mask=mask, other=0).to(tl.float32)
    if R:
        factor = tl.load(packed + (read + 1) * WIDTH + tl.arange(0, BLOCK_R))
        dt = tl.sum(factor[:, None] * weight, axis=0) + bias
    else:
        dt = tl.load(delta + read * delta_row + d, mask=mask, other=0).to(tl.float32) + bias
    slope = tl.full(dt.shape, 1., tl.float32)
    if SOFTPLUS:
        dt, slope = _softplus(dt)
    # After the end, a step of size 0 keeps the state unchanged.
    return x, tl.where(inside, dt, 0.), tl.where(inside, slope, 0.)


@triton.jit
def _vector(packed, read, n, at: tl.constexpr, WIDTH: tl.constexpr):
    """Return B or C of one step, which begins at ``at`` in its row of ``packed``, in the shape of n."""
    return tl.load(packed + (read + 1) * WIDTH + at + n)


@triton.jit
def _channels(x, k, d, valid, channels, GIVEN: tl.constexpr):
    """Return D or the bias of direction k, (BLOCK_D,)."""
    if GIVEN:
        value = tl.load(x + k * channels + d, mask=valid, other=0).to(tl.float32)
    else:
        value = tl.zeros(d.shape, tl.float32)
    return value


@triton.jit
def _weight(x, k, d, valid, channels, zero, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return dt_weight of direction k, (BLOCK_R, BLOCK_D)."""
    if R:
        r = tl.arange(0, BLOCK_R)[:, None]
        value = tl.load(x + (k * R + r) * channels + d[None, :] + zero, mask=(r < R) & valid[None, :],
                        other=0).to(tl.float32)
    else:
        value = 0.
    return value


@triton.jit(do_not_specialize=['rows', 'delta_batch', 'delta_direction', 'delta_row', 'B_batch', 'B_direction', 'B_row',
                               'C_batch', 'C_direction', 'C_row'])
def scan_pack(delta, B, C, packed, K, rows, delta_batch, delta_direction, delta_row, B_batch, B_direction, B_row,
              C_batch, C_direction, C_row, N: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
              PACKED_R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr):
    """Write ``packed``: the programs are (sequence, block of BLOCK_T rows)."""
    sequence = tl.program_id(0).to(tl.int64)
    b, k = sequence // K, sequence % K
    to = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    row = to.to(tl.int64) - 1
    inside = (row >= 0) & (row < rows)
    packed += (sequence * (rows + 1) + to) * WIDTH
    n = tl.arange(0, BLOCK_N)[None, :]
    if R:
        r = tl.arange(0, PACKED_R)[None, :]
        value = tl.load(delta + b * delta_batch + k * delta_direction + row * delta_row + r, mask=inside & (r < R),
                        other=0)
        tl.store(packed + r, value.to(tl.float32), mask=row < rows)
    value = tl.load(B + b * B_batch + k * B_direction + row * B_row + n, mask=inside & (n < N), other=0)
    tl.store(packed + PACKED_R + n, value.to(tl.float32), mask=row < rows)
    value = tl.load(C + b * C_batch + k * C_direction + row * C_row + n, mask=inside & (n < N), other=0)
    tl.store(packed + PACKED_R + BLOCK_N + n, value.to(tl.float32), mask=row < rows)


@triton.jit(do_not_specialize=['rows', 'delta_batch', 'delta_direction', 'delta_row'])
def step_sizes(delta, weight, full, K, rows, channels, delta_batch, delta_direction, delta_row, R: tl.constexpr,
               BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Compute full (sequences, rows, channels) = delta (..., rows, R) times weight (K, R, channels), in float32.

    The programs are (sequence, block of rows, block of channels). PyTorch's matrix product would round the factors to
    10 bits where its user allows TF32, and step sizes are exponents.
    """
    sequence = tl.program_id(0).to(tl.int64)
    b, k = sequence // K, sequence % K
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    delta += b * delta_batch + k * delta_direction
    weight += k * R * channels
    value = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        left = tl.load(delta + row.to(tl.int64) * delta_row + r[None, :], mask=(row < rows) & (r < R)[None, :], other=0)
        right = tl.load(weight + r[:, None] * channels + d, mask=(r < R)[:, None] & (d < channels), other=0)
        value = tl.dot(left.to(tl.float32), right.to(tl.float32), value, input_precision='ieee')
    tl.store(full + (sequence * rows + row) * channels + d, value, mask=(row < rows) & (d < channels))


@triton.jit
def _program(first_sequence, K, channels, BLOCK_D: tl.constexpr):
    """Return the indices of this program: block of channels, sequence, batch, direction, channels, valid channels."""
    blocks = tl.cdiv(channels, BLOCK_D)
    block = tl.program_id(0) % blocks
    sequence = first_sequence + (tl.program_id(0) // blocks).to(tl.int64)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return block, sequence, sequence // K, sequence % K, d, d < channels


@triton.jit(do_not_specialize=['rows', 'steps', 'tokens', 'zero'])
def scan_forward(u, delta, packed, A, D, src, bias, weight, enter, y, last, checkpoints,
                 K, rows, steps, tokens, channels, segment, zero,
                 u_batch, u_direction, u_row, delta_batch, delta_direction, delta_row,
                 N: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
                 PACKED_R: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
                 HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SRC: tl.constexpr, IN_ORDER: tl.constexpr,
                 SOFTPLUS: tl.constexpr, WIDE: tl.constexpr, SAVE: tl.constexpr, SEGMENTED: tl.constexpr):
    """Compute outputs and last states. Tiles are (BLOCK_N, BLOCK_D), channels in lanes: the sum over states needs no
    shuffle."""
    block, sequence, b, k, d, valid = _program(0, K, channels, BLOCK_D)
    part = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & valid[None, :]
    tile = n[:, None] * channels + d[None, :] + zero
    u += b * u_batch + k * u_direction
    delta += b * delta_batch + k * delta_direction
    packed += sequence * (rows + 1) * WIDTH
    y += sequence * tokens * channels
    src += k * steps
    rate = tl.load(A + k * N * channels + tile, mask=mask, other=0) * _LOG2E
    skip, offset = _channels(D, k, d, valid, channels, HAS_D), _channels(bias, k, d, valid, channels, HAS_BIAS)
    factors = _weight(weight, k, d, valid, channels, zero, R, BLOCK_R)
    if SEGMENTED:
        h = tl.load(enter + (sequence * tl.num_programs(1) + part) * N * channels + tile, mask=mask, other=0)
    else:
        h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = part * segment
    saved = (steps - 1) // CHUNK
    for start in range(first, tl.minimum(first + segment, steps), GROUP):
        if SAVE:
            if (start % CHUNK == 0) & (start > 0):
                tl.store(checkpoints + (sequence * saved + start // CHUNK - 1) * N * channels + tile, h, mask=mask)
        xs, dts, Bs, Cs, ys, writes = (), (), (), (), (), ()
        for s in tl.static_range(GROUP):
            t = start + s
            read, write = _rows(src, t, steps, IN_ORDER, HAS_SRC, WIDE)
            x, dt, slope = _step(u, delta, packed, read, t < steps, d, valid, offset, factors, u_row, delta_row, R,
                                 BLOCK_R, WIDTH, SOFTPLUS)
            xs, dts, writes = xs + (x, ), dts + (dt, ), writes + (write, )
            Bs = Bs + (_vector(packed, read, n, PACKED_R, WIDTH), )
            Cs = Cs + (_vector(packed, read, n, PACKED_R + BLOCK_N, WIDTH), )
        for s in tl.static_range(GROUP):
            h = tl.exp2(dts[s][None, :] * rate) * h + (dts[s] * xs[s])[None, :] * Bs[s][:, None]
            ys = ys + (tl.sum(h * Cs[s][:, None], axis=0) + skip * xs[s], )
        for s in tl.static_range(GROUP):
            tl.store(y + writes[s] * channels + d, ys[s].to(y.dtype.element_ty), mask=valid & (writes[s] >= 0))
    if part == tl.num_programs(1) - 1:
        tl.store(last + sequence * N * channels + tile, h, mask=mask)


@triton.jit(do_not_specialize=['rows', 'steps', 'zero'])
def scan_local(u, delta, packed, A, grad_y, src, bias, weight, states, sizes,
               K, rows, steps, channels, segment, zero,
               u_batch, u_direction, u_row, delta_batch, delta_direction, delta_row, y_batch, y_direction, y_row,
               N: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
               PACKED_R: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
               HAS_SRC: tl.constexpr, IN_ORDER: tl.constexpr, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
               REVERSE: tl.constexpr):
    """Compute what a segment alone adds to the state (from B), or with REVERSE to its gradient (from C).

    Also compute the sum of its step sizes, from which the decay of the entering state follows.
    """
    block, sequence, b, k, d, valid = _program(0, K, channels, BLOCK_D)
    part = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & valid[None, :]
    tile = n[:, None] * channels + d[None, :] + zero
    u += b * u_batch + k * u_direction
    delta += b * delta_batch + k * delta_direction
    packed += sequence * (rows + 1) * WIDTH
    at: tl.constexpr = PACKED_R + (BLOCK_N if REVERSE else 0)
    grad_y += b * y_batch + k * y_direction
    src += k * steps
    rate = tl.load(A + k * N * channels + tile, mask=mask, other=0) * _LOG2E
    offset = _channels(bias, k, d, valid, channels, HAS_BIAS)
    factors = _weight(weight, k, d, valid, channels, zero, R, BLOCK_R)
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    size = tl.zeros((BLOCK_D, ), tl.float32)
    first = part * segment
    stop = tl.minimum(first + segment, steps)
    for group in range(tl.cdiv(stop - first, GROUP)):
        inputs, dts, vectors = (), (), ()
        for s in tl.static_range(GROUP):
            if REVERSE:
                t = first + (tl.cdiv(stop - first, GROUP) - group) * GROUP - 1 - s
            else:
                t = first + group * GROUP + s
            read, write = _rows(src, t, steps, IN_ORDER, HAS_SRC, WIDE)
            x, dt, slope = _step(u, delta, packed, read, t < steps, d, valid, offset, factors, u_row, delta_row, R,
                                 BLOCK_R, WIDTH, SOFTPLUS)
            if REVERSE:
                x = tl.load(grad_y + write * y_row + d, mask=valid & (write >= 0), other=0).to(tl.float32)
            else:
                x = dt * x
            inputs, dts, vectors = inputs + (x, ), dts + (dt, ), vectors + (_vector(packed, read, n, at, WIDTH), )
        for s in tl.static_range(GROUP):
            decay = tl.exp2(dts[s][None, :] * rate)
            if REVERSE:
                h = decay * (h + inputs[s][None, :] * vectors[s][:, None])
            else:
                h = decay * h + inputs[s][None, :] * vectors[s][:, None]
            size += dts[s]
    part = sequence * tl.num_programs(1) + part
    tl.store(states + part * N * channels + tile, h, mask=mask)
    tl.store(sizes + part * channels + d, size, mask=valid)


@triton.jit(do_not_specialize=['segments', 'zero'])
def scan_carry(states, sizes, A, leave, K, channels, segments, zero,
               N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr,
               HAS_LEAVE: tl.constexpr):
    """Replace what each segment adds by the state that enters it; with REVERSE from the end, beginning by ``leave``."""
    block, sequence, b, k, d, valid = _program(0, K, channels, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & valid[None, :]
    tile = n[:, None] * channels + d[None, :] + zero
    rate = tl.load(A + k * N * channels + tile, mask=mask, other=0) * _LOG2E
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if HAS_LEAVE:
        h = tl.load(leave + sequence * N * channels + tile, mask=mask, other=0)
    for i in range(segments):
        part = sequence * segments + (segments - 1 - i if REVERSE else i)
        local = tl.load(states + part * N * channels + tile, mask=mask, other=0)
        size = tl.load(sizes + part * channels + d, mask=valid, other=0)
        tl.store(states + part * N * channels + tile, h, mask=mask)
        h = tl.exp2(size[None, :] * rate) * h + local


@triton.jit(do_not_specialize=['rows', 'steps', 'sequences', 'first_sequence', 'unit', 'zero'])
def scan_backward(u, delta, packed, A, D, src, bias, weight, grad_y, leave, checkpoints,
                  starts, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
                  K, rows, steps, channels, segment, sequences, first_sequence, unit, zero,
                  u_batch, u_direction, u_row, delta_batch, delta_direction, delta_row, y_batch, y_direction, y_row,
                  grad_delta_batch, grad_delta_direction,
                  N: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N1: tl.constexpr,
                  BLOCK_N2: tl.constexpr, BLOCK_R: tl.constexpr, PACKED_R: tl.constexpr, WIDTH: tl.constexpr,
                  CHUNK: tl.constexpr, GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
                  HAS_SRC: tl.constexpr, IN_ORDER: tl.constexpr, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
                  HAS_GRAD_Y: tl.constexpr, HAS_LEAVE: tl.constexpr, WANT_U: tl.constexpr, WANT_DELTA: tl.constexpr,
                  WANT_A: tl.constexpr, WANT_VECTORS: tl.constexpr):
    """Compute the wanted gradients (WANT_VECTORS: of B and C), backwards through the chunks of CHUNK steps.

    In each chunk, the states at the starts of its groups are computed first, from the saved state at its own start, and
    stored in ``starts``, which is small enough to stay in cache.

    States are (BLOCK_N1, BLOCK_D, BLOCK_N2): with these, Triton's default layout puts a few states and a few channels
    into each thread. There are two sums over states and two over channels, and all are equally short.
    """
    block, sequence, b, k, d, valid = _program(first_sequence, K, channels, BLOCK_D)
    part = tl.program_id(1)
    n = tl.arange(0, BLOCK_N1)[:, None] * BLOCK_N2 + tl.arange(0, BLOCK_N2)[None, :]
    n3 = n[:, None, :]
    mask = (n3 < N) & valid[None, :, None]
    tile = n3 * channels + d[None, :, None] * unit
    u += b * u_batch + k * u_direction
    delta += b * delta_batch + k * delta_direction
    packed += sequence * (rows + 1) * WIDTH
    src += k * steps
    grad_y += b * y_batch + k * y_direction
    grad_u += sequence * rows * channels
    grad_delta += b * grad_delta_batch + k * grad_delta_direction
    grad_B += (block.to(tl.int64) * sequences + sequence) * rows * N
    grad_C += (block.to(tl.int64) * sequences + sequence) * rows * N
    own = part.to(tl.int64) * sequences + sequence

    rate = tl.load(A + k * N * channels + tile, mask=mask, other=0) * _LOG2E
    skip, offset = _channels(D, k, d, valid, channels, HAS_D), _channels(bias, k, d, valid, channels, HAS_BIAS)
    factors = _weight(weight, k, d, valid, channels, zero, R, BLOCK_R)
    zero = tl.zeros((BLOCK_N1, BLOCK_D, BLOCK_N2), tl.float32)
    # The gradient of the state that step t passes to step t - 1, already decayed.
    dh = zero
    if HAS_LEAVE:
        dh = tl.load(leave + (sequence * tl.num_programs(1) + part) * N * channels + tile, mask=mask, other=0)
    dA = zero
    dD = tl.zeros((BLOCK_D, ), tl.float32)
    dbias = tl.zeros((BLOCK_D, ), tl.float32)
    first = part * segment
    stop = tl.minimum(first + segment, steps)
    saved = (steps - 1) // CHUNK
    chunks = tl.cdiv(stop - first, CHUNK)
    size: tl.constexpr = BLOCK_N1 * BLOCK_D * BLOCK_N2
    starts += (part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (CHUNK // GROUP * size)
    place = (n3 * BLOCK_D + (d - block * BLOCK_D)[None, :, None]) * unit
    for back in range(chunks):
        start = first + (chunks - 1 - back) * CHUNK
        groups = tl.cdiv(tl.minimum(start + CHUNK, stop) - start, GROUP)
        h = tl.load(checkpoints + (sequence * saved + start // CHUNK - 1) * N * channels + tile,
                    mask=mask & (start > 0), other=0)
        # Other threads may still read the ``starts`` of the chunk before.
        tl.debug_barrier()
        for group in range(groups - 1):
            tl.store(starts + group * size + place, h)
            dts, inputs, Bs = (), (), ()
            for s in tl.static_range(GROUP):
                t = start + group * GROUP + s
                read, write = _rows(src, t, steps, IN_ORDER, HAS_SRC, WIDE)
                x, dt, slope = _step(u, delta, packed, read, t < steps, d, valid, offset, factors, u_row, delta_row, R,
                                     BLOCK_R, WIDTH, SOFTPLUS)
                dts, inputs, Bs = dts + (dt, ), inputs + (dt * x, ), Bs + (_vector(packed, read, n, PACKED_R, WIDTH), )
            for s in tl.static_range(GROUP):
                h = tl.exp2(dts[s][None, :, None] * rate) * h + inputs[s][None, :, None] * Bs[s][:, None, :]
        tl.debug_barrier()
        for rest in range(groups):
            group = groups - 1 - rest
            if rest > 0:
                h = tl.load(starts + group * size + place)
            reads, xs, dts, slopes, dys, Bs, Cs = (), (), (), (), (), (), ()
            for s in tl.static_range(GROUP):
                t = start + group * GROUP + s
                read, write = _rows(src, t, steps, IN_ORDER, HAS_SRC, WIDE)
                x, dt, slope = _step(u, delta, packed, read, t < steps, d, valid, offset, factors, u_row, delta_row, R,
                                     BLOCK_R, WIDTH, SOFTPLUS)
                if HAS_GRAD_Y:
                    dy = tl.load(grad_y + write * y_row + d, mask=valid & (write >= 0), other=0).to(tl.float32)
                else:
                    dy = tl.zeros((BLOCK_D, ), tl.float32)
                reads, xs, dts = reads + (read, ), xs + (x, ), dts + (dt, )
                slopes, dys = slopes + (slope, ), dys + (dy, )
                Bs = Bs + (_vector(packed, read, n, PACKED_R, WIDTH), )
                Cs = Cs + (_vector(packed, read, n, PACKED_R + BLOCK_N1 * BLOCK_N2, WIDTH), )
            decays, decayed = (), ()
            for s in tl.static_range(GROUP):
                a = tl.exp2(dts[s][None, :, None] * rate)
                decays, decayed = decays + (a, ), decayed + (a * h, )
                h = decayed[s] + (dts[s] * xs[s])[None, :, None] * Bs[s][:, None, :]
            dus, ddeltas, dBs, dCs = (), (), (), ()
            for s in tl.static_range(GROUP - 1, -1, -1):
                dy, input = dys[s], dts[s] * xs[s]
                h = decayed[s] + input[None, :, None] * Bs[s][:, None, :]
                if WANT_VECTORS:
                    dCs = dCs + (tl.sum(h * dy[None, :, None], axis=1), )
                dh += dy[None, :, None] * Cs[s][:, None, :]
                if WANT_VECTORS:
                    dBs = dBs + (tl.sum(dh * input[None, :, None], axis=1), )
                dinput = tl.sum(tl.sum(dh * Bs[s][:, None, :], axis=2), axis=0)
                da = dh * decayed[s]
                if WANT_A:
                    dA += da * dts[s][None, :, None]
                ddelta = (tl.sum(tl.sum(da * rate, axis=2), axis=0) * _LN2 + dinput * xs[s]) * slopes[s]
                dh *= decays[s]
                dus, ddeltas = dus + (dinput * dts[s] + dy * skip, ), ddeltas + (ddelta, )
                dbias += ddelta
                dD += dy * xs[s]
            for i in tl.static_range(GROUP):
                read = reads[GROUP - 1 - i]
                kept = valid & (read >= 0)
                if WANT_U:
                    tl.store(grad_u + read * channels + d, dus[i].to(grad_u.dtype.element_ty), mask=kept)
                if WANT_DELTA:
                    tl.store(grad_delta + read * channels + d, ddeltas[i].to(grad_delta.dtype.element_ty), mask=kept)
                if WANT_VECTORS:
                    tl.store(grad_B + read * N + n, dBs[i], mask=(n < N) & (read >= 0))
                    tl.store(grad_C + read * N + n, dCs[i], mask=(n < N) & (read >= 0))
    if WANT_A:
        tl.store(grad_A + own * N * channels + tile, dA, mask=mask)
    tl.store(grad_D + own * channels + d, dD, mask=valid)
    tl.store(grad_bias + own * channels + d, dbias, mask=valid)


@triton.jit
def _conv_tile(K, steps, channels, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the steps and channels of this program, (BLOCK_T, BLOCK_D), and its sequence (batch, direction)."""
    blocks = tl.cdiv(channels, BLOCK_D)
    parts = tl.cdiv(steps, BLOCK_T)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(0) // blocks % parts
    sequence = (tl.program_id(0) // blocks // parts).to(tl.int64)
    return part, parts, sequence // K, sequence % K, part * BLOCK_T + tl.arange(0, BLOCK_T), d, d < channels


@triton.jit
def _tap(x, src, t, d, valid, steps, x_row, HAS_SRC: tl.constexpr):
    """Return the inputs of steps t, zeros for pads and before the first step."""
    inside = (t >= 0) & (t < steps)
    if HAS_SRC:
        row = tl.load(src + t, mask=inside, other=-1).to(tl.int64)
    else:
        row = tl.where(inside, t, -1).to(tl.int64)
    return tl.load(x + row[:, None] * x_row + d[None, :], mask=(row >= 0)[:, None] & valid[None, :],
                   other=0).to(tl.float32)


@triton.jit(do_not_specialize=['batch', 'steps'])
def conv_forward(x, weight, bias, src, out, grad, sums, batch, K, steps, channels, x_batch, x_row,
                 grad_batch, grad_direction, grad_row, TAPS: tl.constexpr, BLOCK_T: tl.constexpr,
                 BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SRC: tl.constexpr, BACKWARD: tl.constexpr,
                 WANT_WEIGHT: tl.constexpr):
    """Compute out (K, batch, steps, channels), SiLU of the convolution.

    With BACKWARD, out is the gradient of SiLU's input. With WANT_WEIGHT, also compute this program's share of the
    gradients of weights and bias: sums (parts, batch, K, TAPS + 1, channels).
    """
    part, parts, b, k, t, d, valid = _conv_tile(K, steps, channels, BLOCK_T, BLOCK_D)
    x += b * x_batch
    src += k * steps
    weight += k * TAPS * channels
    value = _channels(bias, k, d, valid, channels, HAS_BIAS)[None, :] + tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for j in tl.static_range(TAPS):
        factor = tl.load(weight + j * channels + d, mask=valid, other=0).to(tl.float32)
        value += factor[None, :] * _tap(x, src, t - (TAPS - 1) + j, d, valid, steps, x_row, HAS_SRC)
    # If exp2 overflows to infinity, the quotient is 0, which is right.
    sigmoid = 1. / (1. + tl.exp2(-value * _LOG2E))
    mask = (t < steps)[:, None] & valid[None, :]
    to = ((k * batch + b) * steps + t[:, None]) * channels + d[None, :]
    if BACKWARD:
        row = b * grad_batch + k * grad_direction + t[:, None].to(tl.int64) * grad_row
        value = tl.load(grad + row + d[None, :], mask=mask, other=0).to(tl.float32) * (
            sigmoid + value * sigmoid * (1. - sigmoid))
        if WANT_WEIGHT:
            sums += ((part * batch + b) * K + k) * (TAPS + 1) * channels
            for j in tl.static_range(TAPS):
                product = value * _tap(x, src, t - (TAPS - 1) + j, d, valid, steps, x_row, HAS_SRC)
                tl.store(sums + j * channels + d, tl.sum(product, axis=0), mask=valid)
            tl.store(sums + TAPS * channels + d, tl.sum(value, axis=0), mask=valid)
    else:
        value *= sigmoid
    tl.store(out + to, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['batch', 'steps', 'tokens'])
def conv_backward(grad, weight, inverse, grad_x, batch, K, steps, tokens, channels, TAPS: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Compute the gradient of the tokens from grad (K, batch, steps, channels), summed over directions in order."""
    part, parts, b, k, token, d, valid = _conv_tile(1, tokens, channels, BLOCK_T, BLOCK_D)
    inside = token < tokens
    value = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(K):
        t = tl.load(inverse + k * tokens + token, mask=inside, other=steps)
        rows = grad + (k * batch + b) * steps * channels
        for j in tl.static_range(TAPS):
            factor = tl.load(weight + (k * TAPS + j) * channels + d, mask=valid, other=0).to(tl.float32)
            later = t + (TAPS - 1) - j
            value += factor[None, :] * tl.load(rows + later[:, None].to(tl.int64) * channels + d[None, :],
                                               mask=(later < steps)[:, None] & valid[None, :], other=0).to(tl.float32)
    to = (b * tokens + token[:, None]) * channels + d[None, :]
    tl.store(grad_x + to, value.to(grad_x.dtype.element_ty), mask=inside[:, None] & valid[None, :])
