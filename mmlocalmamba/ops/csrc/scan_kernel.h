// The selective scan with channels in vector lanes.
//
// The recurrence runs in chunks of kChunk steps. Per chunk and block of channels: first the step sizes (independent of
// each other), then groups of states whose values stay in registers over the chunk.

namespace mmlocalmamba {
namespace {

template <typename T>
struct ChunkScratch {
  int64_t *read, *write;  // rows of the chunk's steps, -1: none
  int64_t *next_read, *next_write;  // rows of the next chunk's steps, 0: none
  T *B, *C;               // (step, state), zeros for pads; a vector may be written at the last state
  T *factor;              // (step, rank): low-rank delta, zeros for pads; the same
  V<T> *weight;           // (block, rank): weight that delta is the product with
  V<T> *A;                // (block, state), times log2(e)
  V<T> *A_largest;        // (block): the largest magnitude of these
  V<T> *h;                // (block, state): state, in the backward pass its gradient
  V<T> *dt, *dtu, *y;     // per step

  ChunkScratch(Scratch& s, int64_t N, int64_t R)
      : read(s.take<int64_t>(kChunk)), write(s.take<int64_t>(kChunk)), next_read(s.take<int64_t>(kChunk)),
        next_write(s.take<int64_t>(kChunk)), B(s.take<T>(kChunk * N + kLanes<T>)),
        C(s.take<T>(kChunk * N + kLanes<T>)), factor(s.take<T>(kChunk * R + kLanes<T>)),
        weight(s.take<V<T>>(kBlocks * R)), A(s.take<V<T>>(kBlocks * N)), A_largest(s.take<V<T>>(kBlocks)),
        h(s.take<V<T>>(kBlocks * N)), dt(s.take<V<T>>(kChunk)), dtu(s.take<V<T>>(kChunk)),
        y(s.take<V<T>>(kChunk)) {}
};

template <typename S, typename T = Compute<S>>
void copy_rows(const S* from, int64_t row_stride, int64_t state_stride, const int64_t* rows, bool in_order,
               int64_t steps, int64_t N, T* to) {
  if (N == 0) return;
  if (in_order && row_stride == 1 && state_stride != 1) {
    V<T> columns[kChunk];
    for (int64_t n = 0; n < N; n += kLanes<T>) {
      const int lanes = N - n < kLanes<T> ? int(N - n) : kLanes<T>;
      load_columns(from + rows[0] + n * state_stride, state_stride, steps, lanes, columns);
      for (int64_t t = 0; t < steps; ++t) store(to + t * N + n, columns[t], lanes);
    }
    return;
  }
  for (int64_t t = 0; t < steps; ++t, to += N) {
    if (rows[t] < 0) {
      for (int64_t n = 0; n < N; ++n) to[n] = 0;
      continue;
    }
    const S* row = from + rows[t] * row_stride;
    int64_t n = 0;
    if (state_stride == 1) {
      for (; n + kLanes<T> <= N; n += kLanes<T>) store(to + n, load(row + n));
      // What this writes beyond the row is overwritten by the next one.
      if (kMasked<S> && N - n > 2) {
        store(to + n, load(row + n, int(N - n)));
        continue;
      }
    }
    for (; n < N; ++n) to[n] = value(row[n * state_stride]);
  }
}

// The row that a step reads or writes, -1: none.
template <typename S>
INLINE int64_t token(const ScanProblem<S>& p, Item item, int64_t step) {
  return p.table ? p.table[item.direction * p.steps + step] : step;
}

// No hardware prefetcher follows the jumps of a table through memory, so the rows of the next chunk are prefetched one
// by one. A step outside the sequence has none.
struct Next {
  int64_t read = -1, write = -1;

  template <typename S>
  INLINE Next(const ScanProblem<S>& p, Item item, int64_t step) {
    if (step < 0 || step >= p.steps) return;
    write = token(p, item, step);
    read = p.in_scan_order ? step : write;
  }
};

// Rows of the chunk's steps and of those of the next chunk, B, C and the factor of delta.
template <typename S, typename T = Compute<S>>
void open_chunk(const ScanProblem<S>& p, Item item, int64_t start, int64_t steps, int64_t next_start,
                ChunkScratch<T>& c) {
  for (int64_t t = 0; t < steps; ++t) {
    c.write[t] = token(p, item, start + t);
    c.read[t] = p.in_scan_order ? start + t : c.write[t];
    const Next next(p, item, next_start + t);
    c.next_read[t] = next.read < 0 ? 0 : next.read;
    c.next_write[t] = next.write < 0 ? 0 : next.write;
  }
  const bool in_order = !p.table;
  copy_rows(p.B + offset(p.B_strides, item), p.B_strides.row, p.B_state_stride, c.read, in_order, steps, p.states, c.B);
  copy_rows(p.C + offset(p.C_strides, item), p.C_strides.row, p.C_state_stride, c.read, in_order, steps, p.states, c.C);
  if (p.dt_rank) {
    copy_rows(p.delta + offset(p.delta_strides, item), p.delta_strides.row, p.delta_strides.channel, c.read, in_order,
              steps, p.dt_rank, c.factor);
  }
}

// (channel, n) as it is stored -> (block, n) with the channels in lanes, as the kernel wants it.
template <typename T>
void load_transposed(const T* from, int64_t count, T factor, int64_t total, Item item, const Channels<T>& channels,
                     V<T>* to) {
  constexpr int W = kLanes<T>;
  for (int64_t block = 0; block < channels.blocks; ++block, to += count) {
    const T* rows = from + (item.direction * total + channels.begin(block)) * count;
    const int lanes = channels.lanes(block);
    if (count == 1) {
      to[0] = load(rows, lanes) * factor;
      continue;
    }
    for (int64_t n = 0; n < count; n += W) {
      const int columns = count - n < W ? int(count - n) : W;
      V<T> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = i < lanes ? load(rows + i * count + n, columns) : V<T>{};
      transpose<T>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i < columns) to[n + i] = x[i] * factor;
      }
    }
  }
}

// A of all states, in powers of two.
template <typename S, typename T = Compute<S>>
void load_A(const ScanProblem<S>& p, Item item, const Channels<T>& channels, const ChunkScratch<T>& c) {
  load_transposed(p.A, p.states, Constants<T>::log2e, p.channels, item, channels, c.A);
  for (int64_t block = 0; block < channels.blocks; ++block) {
    c.A_largest[block] = V<T>{};
    for (int64_t n = 0; n < p.states; ++n) {
      c.A_largest[block] = larger<T>(magnitude<T>(c.A[block * p.states + n]), c.A_largest[block]);
    }
  }
}

template <typename T>
__attribute__((noinline)) V<T> largest_step(const V<T>* dt, int64_t steps) {
  V<T> even{}, odd{};
  int64_t t = 0;
  for (; t + 2 <= steps; t += 2) {
    even = larger<T>(magnitude<T>(dt[t]), even);
    odd = larger<T>(magnitude<T>(dt[t + 1]), odd);
  }
  if (t < steps) even = larger<T>(magnitude<T>(dt[t]), even);
  return larger<T>(even, odd);
}

// Calls f(way) with a constant, the quickest way that is exact enough for all exponents of a chunk. If an exponent is
// NaN, the result is NaN in all ways. `scaled`: the way Exp2::scaled, if T has it.
template <bool scaled, typename T, typename Function>
INLINE void with_exp2(const ChunkScratch<T>& c, int64_t block, int64_t steps, Function f) {
  if constexpr (scaled && kHasTable<T>) return f(std::integral_constant<Exp2, Exp2::scaled>());
  if constexpr (kHasTable<T>) {
    const V<T> largest = largest_step<T>(c.dt, steps) * c.A_largest[block];
    bool near = true;
    for (int lane = 0; lane < kLanes<T>; ++lane) near &= !(largest[lane] > kNear);
    if (near) return f(std::integral_constant<Exp2, Exp2::near>());
  }
  f(std::integral_constant<Exp2, Exp2::any>());
}

template <typename S, typename T = Compute<S>>
INLINE V<T> load_weight(const T* weight, const ScanProblem<S>& p, Item item, const Channels<T>& channels,
                        int64_t block) {
  return weight ? load(weight + item.direction * p.channels + channels.begin(block), channels.lanes(block)) : V<T>{};
}

// delta + bias of `count` steps from the low-rank factor (step, R).
template <typename T, int count>
INLINE void expand_steps(const T* factor, const V<T>* weight, int64_t R, V<T> bias, V<T>* to) {
  V<T> x[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] = bias;
  for (int64_t r = 0; r < R; ++r) {
    const V<T> w = weight[r];
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) x[i] += w * factor[i * R + r];
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) to[i] = x[i];
}

// The same of `steps`. Apart from what calls it, since it needs all registers.
template <typename T>
__attribute__((noinline)) void expand(const T* factor, const V<T>* weight, int64_t R, V<T> bias, int64_t steps,
                                      V<T>* to) {
  int64_t t = 0;
  for (; t + 8 <= steps; t += 8) expand_steps<T, 8>(factor + t * R, weight, R, bias, to + t);
  for (; t < steps; ++t) expand_steps<T, 1>(factor + t * R, weight, R, bias, to + t);
}

// delta + bias of a chunk, into c.dt.
template <typename S, typename T = Compute<S>>
INLINE void load_steps(const ScanProblem<S>& p, const ChunkScratch<T>& c, Item item, int64_t steps, int64_t block,
                       int64_t channel, int lanes, V<T> bias) {
  if (p.dt_rank) {
    expand<T>(c.factor, c.weight + block * p.dt_rank, p.dt_rank, bias, steps, c.dt);
    return;
  }
  const S* delta = p.delta + offset(p.delta_strides, item) + channel * p.delta_strides.channel;
  if (p.delta_strides.columns()) {
    load_columns(delta + c.read[0], p.delta_strides.channel, steps, lanes, c.dt);
    for (int64_t t = 0; t < steps; ++t) c.dt[t] += bias;
    return;
  }
  for (int64_t t = 0; t < steps; ++t) {
    c.dt[t] = c.read[t] < 0 ? bias : bias + load(delta + c.read[t] * p.delta_strides.row, lanes);
  }
}

// Computes step sizes from delta + bias of a chunk; `slope`: null, or the place for the derivatives.
template <typename T>
__attribute__((noinline)) void softplus_steps(V<T>* dt, int64_t steps, V<T>* slope) {
  side_by_side(steps, [&](int64_t first, auto count) __attribute__((always_inline)) {
    V<T> x[count];
    for (int i = 0; i < count; ++i) x[i] = dt[first + i];
    softplus<T, count>(x, slope ? slope + first : nullptr);
    for (int i = 0; i < count; ++i) dt[first + i] = x[i];
  });
}

// Returns the place of the state before chunk number `chunk` >= 1.
template <typename S, typename T = Compute<S>>
INLINE T* checkpoint(const ScanProblem<S>& p, Item item, int64_t chunk, int64_t channel) {
  const int64_t saved = (p.steps + kChunk - 1) / kChunk - 1;
  const int64_t sequence = item.batch * p.directions + item.direction;
  return p.checkpoints + ((sequence * saved + chunk - 1) * p.states) * p.channels + channel;
}

// Prefetches what is read and written next, a row of each array at a time: more together would fill the processor's
// queues. The row of a pad is -1, so addresses are integers.
template <int count>
struct Ahead {
  uintptr_t memory[count];
  int64_t bytes[count];  // of a row
  const int64_t* rows[count];

  template <typename U>
  void set(int i, const U* from, int64_t channels, int64_t stride, const int64_t* from_rows) {
    memory[i] = reinterpret_cast<uintptr_t>(from) + channels * int64_t(sizeof(U));
    bytes[i] = stride * int64_t(sizeof(U));
    rows[i] = from_rows;
  }
  INLINE void operator()(int64_t step) const {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(memory[i] + rows[i][step] * bytes[i]));
    }
  }
};

// What is prefetched while a block of a chunk runs: rows of the next block or, with few states or after the last block,
// of the next chunk. Those of a whole chunk would not stay in the first cache: at regular distances, they share few of
// its places.
struct Soon {
  const int64_t *read, *write;
  int64_t channels;  // from those of this block

  template <typename T>
  Soon(int64_t states, const ChunkScratch<T>& c, int64_t block, int64_t blocks) {
    const bool many = states >= 8, here = many && block + 1 < blocks;
    read = here ? c.read : c.next_read, write = here ? c.write : c.next_write;
    channels = here ? kLanes<T> : many ? -block * kLanes<T> : 0;
  }
};

// Rows of the factor of delta, B and C, which all blocks share, are several cache lines: each block has one of them
// prefetched. In full, delta is like u.
template <int count, typename S, typename T = Compute<S>>
INLINE void shared_ahead(Ahead<count>& ahead, int i, const ScanProblem<S>& p, Item item, const ChunkScratch<T>& c,
                         const Soon& soon, int64_t block, const S* delta) {
  if (!p.dt_rank) {
    return ahead.set(i, delta, soon.channels, p.delta_strides.columns() ? 0 : p.delta_strides.row, soon.read);
  }
  const int64_t last = p.states ? p.states - 1 : 0;
  const S* rows[] = {p.delta + offset(p.delta_strides, item), p.B + offset(p.B_strides, item),
                     p.C + offset(p.C_strides, item) + last, p.C + offset(p.C_strides, item)};
  const int64_t strides[] = {p.delta_strides.row, p.B_strides.row, p.C_strides.row, p.C_strides.row};
  ahead.set(i, rows[block % 4], 0, strides[block % 4], c.next_read);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// The rows of whole vectors that a group of all states reads u from and writes y to.
template <typename S, typename T = Compute<S>>
struct Ends {
  const int64_t *read, *write;
  const S* u;
  S *y, *nowhere;  // nowhere: for the steps that write no row
  int64_t u_row, y_row;
  V<T> D;
};

template <typename S>
alignas(64) constexpr S kZeros[64] = {};

// States of a scan that one group handles whole: d_state's default.
constexpr int kWhole = 16;

// A chunk of one block, `count` states at a time. If they are the `whole` scan's, u is read and y is written here.
// Otherwise y accumulates over the groups of states.
template <int count, Exp2 way, bool whole, typename S, typename T = Compute<S>>
void advance(int64_t steps, int64_t N, const V<T>* A, const T* B, const T* C, const V<T>* dt, const V<T>* dtu,
             V<T>* h_memory, V<T>* y, const Ahead<3>* ahead_memory, const Ends<S>* ends_memory) {
  constexpr int side = count < kSideBySide ? count : kSideBySide;
  Ahead<3> ahead{};
  if (ahead_memory) ahead = *ahead_memory;
  Ends<S> ends{};
  if (whole) ends = *ends_memory;
  V<T> h[count];
  for (int n = 0; n < count; ++n) h[n] = h_memory[n];
  for (int64_t t = 0; t < steps; ++t, B += N, C += N) {
    const V<T> step = dt[t];
    V<T> input, sum[2] = {V<T>{}, V<T>{}};
    if constexpr (whole) {
      const int64_t row = ends.read[t];
      const V<T> x = load(row < 0 ? kZeros<S> : ends.u + row * ends.u_row);
      input = step * x;
      sum[0] = ends.D * x;
    } else {
      input = dtu[t];
      sum[0] = y[t];
    }
    if (whole || ahead_memory) ahead(t);
#pragma GCC unroll 16
    for (int first = 0; first < count; first += side) {
      V<T> decay[side];
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i) decay[i] = step * A[first + i];
      exp2<T, side, way>(decay);
#pragma GCC unroll 16
      for (int i = 0, n = first; i < side; ++i, ++n) {
        h[n] = decay[i] * h[n] + input * B[n];
        sum[n % 2] += h[n] * C[n];
      }
    }
    if constexpr (whole) {
      const int64_t row = ends.write[t];
      store(row < 0 ? ends.nowhere : ends.y + row * ends.y_row, sum[0] + sum[1]);
    } else {
      y[t] = sum[0] + sum[1];
    }
  }
  for (int n = 0; n < count; ++n) h_memory[n] = h[n];
}

template <int count, Exp2 way, typename S, typename T = Compute<S>>
INLINE int64_t advance_groups(int64_t n, int64_t steps, int64_t N, const ChunkScratch<T>& c, int64_t block,
                              const Ahead<3>& ahead) {
  for (; N - n >= count; n += count) {
    advance<count, way, false, S>(steps, N, c.A + block * N + n, c.B + n, c.C + n, c.dt, c.dtu, c.h + block * N + n,
                                  c.y, n ? nullptr : &ahead, nullptr);
  }
  return n;
}

// A chunk of one block of a scan with one state, whose few operations are done in one pass: u is read, y is written, and
// nothing else leaves the registers.
template <Exp2 way, typename S, typename T = Compute<S>>
INLINE void advance_single(const ScanProblem<S>& p, const ChunkScratch<T>& c, int64_t block, int64_t steps, V<T> D,
                           const S* u, S* y, int lanes, const Ahead<3>* ahead) {
  const V<T> A = c.A[block];
  V<T> h = c.h[block];
  side_by_side(steps, [&](int64_t start, auto count) __attribute__((always_inline)) {
    V<T> decay[count];
    for (int i = 0; i < count; ++i) decay[i] = c.dt[start + i] * A;
    exp2<T, count, way>(decay);
    for (int i = 0; i < count; ++i) {
      const int64_t t = start + i, row = c.read[t];
      if (ahead) (*ahead)(t);
      const V<T> input = row < 0 ? V<T>{} : load(u + row * p.u_strides.row, lanes);
      h = decay[i] * h + c.dt[t] * input * c.B[t];
      if (c.write[t] >= 0) store(y + c.write[t] * p.y_strides.row, h * c.C[t] + D * input, lanes);
    }
  });
  c.h[block] = h;
}

template <bool scaled, typename S, typename T = Compute<S>>
void scan_forward(const ScanProblem<S>& p, Item item, void* memory) {
  const int64_t N = p.states, sequence = item.batch * p.directions + item.direction;
  const Channels<T> channels(p.channels, item);
  Scratch scratch{static_cast<char*>(memory)};
  ChunkScratch<T> c(scratch, N, p.dt_rank);
  load_A(p, item, channels, c);
  if (p.dt_rank) load_transposed(p.dt_weight, p.dt_rank, T(1), p.channels, item, channels, c.weight);
  for (int64_t i = 0; i < channels.blocks * N; ++i) c.h[i] = V<T>{};

  for (int64_t start = 0; start < p.steps; start += kChunk) {
    const int64_t steps = p.steps - start < kChunk ? p.steps - start : kChunk;
    open_chunk(p, item, start, steps, start + kChunk, c);
    for (int64_t block = 0; block < channels.blocks; ++block) {
      const int64_t channel = channels.begin(block);
      const int lanes = channels.lanes(block);
      const V<T> bias = load_weight(p.bias, p, item, channels, block);
      const V<T> D = load_weight(p.D, p, item, channels, block);
      const S* u = p.u + offset(p.u_strides, item) + channel * p.u_strides.channel;
      const S* delta = p.delta + offset(p.delta_strides, item) + channel * p.delta_strides.channel;
      S* y = p.y + offset(p.y_strides, item) + channel * p.y_strides.channel;

      if (p.checkpoints && start) {
        T* to = checkpoint(p, item, start / kChunk, channel);
        for (int64_t n = 0; n < N; ++n) store(to + n * p.channels, c.h[block * N + n], lanes);
      }
      load_steps(p, c, item, steps, block, channel, lanes, bias);
      if (p.softplus) softplus_steps<T>(c.dt, steps, nullptr);
      const bool u_columns = p.u_strides.columns(), delta_columns = p.delta_strides.columns();
      const bool y_columns = p.y_strides.columns();
      const Soon soon(N, c, block, channels.blocks);
      Ahead<3> ahead;
      ahead.set(0, u, soon.channels, u_columns ? 0 : p.u_strides.row, soon.read);
      ahead.set(1, y, soon.channels, y_columns ? 0 : p.y_strides.row, soon.write);
      shared_ahead(ahead, 2, p, item, c, soon, block, delta);
      if (N == 1 && !u_columns && !delta_columns && !y_columns) {
        // Several blocks share a cache line.
        const Ahead<3>* once = block % (64 / (kLanes<T> * int64_t(sizeof(S)))) ? nullptr : &ahead;
        with_exp2<scaled>(c, block, steps, [&](auto way) __attribute__((always_inline)) {
          if (lanes == kLanes<T>) {
            advance_single<way, S>(p, c, block, steps, D, u, y, kLanes<T>, once);
          } else {
            advance_single<way, S>(p, c, block, steps, D, u, y, lanes, once);
          }
        });
        continue;
      }
      if (N == kWhole && lanes == kLanes<T> && !u_columns && !y_columns) {
        const Ends<S> ends{c.read, c.write, u, y, reinterpret_cast<S*>(c.y), p.u_strides.row, p.y_strides.row, D};
        with_exp2<scaled>(c, block, steps, [&](auto way) __attribute__((always_inline)) {
          advance<kWhole, way, true, S>(steps, N, c.A + block * N, c.B, c.C, c.dt, nullptr, c.h + block * N, nullptr,
                                        &ahead, &ends);
        });
        continue;
      }
      if (u_columns) load_columns(u + start, p.u_strides.channel, steps, lanes, c.dtu);
      if (start + kChunk < p.steps) {
        const int64_t next = start + kChunk;
        if (u_columns) prefetch_columns<false>(u + next, p.u_strides.channel, lanes);
        if (delta_columns && !p.dt_rank) prefetch_columns<false>(delta + next, p.delta_strides.channel, lanes);
        if (y_columns) prefetch_columns<true>(y + next, p.y_strides.channel, lanes);
      }
      // A compile-time constant: with few states, a test in each step would cost time.
      const auto open_steps = [&](auto columns) __attribute__((always_inline)) {
        for (int64_t t = 0; t < steps; ++t) {
          const int64_t row = c.read[t];
          const V<T> input = columns ? c.dtu[t] : row < 0 ? V<T>{} : load(u + row * p.u_strides.row, lanes);
          c.dtu[t] = c.dt[t] * input;
          c.y[t] = D * input;
        }
      };
      if (u_columns) {
        open_steps(std::true_type{});
      } else {
        open_steps(std::false_type{});
      }
      with_exp2<scaled>(c, block, steps, [&](auto way) __attribute__((always_inline)) {
        int64_t n = advance_groups<ISA_STATES, way, S>(0, steps, N, c, block, ahead);
        n = advance_groups<4, way, S>(n, steps, N, c, block, ahead);
        n = advance_groups<2, way, S>(n, steps, N, c, block, ahead);
        advance_groups<1, way, S>(n, steps, N, c, block, ahead);
      });
      if (y_columns) {
        store_columns(y + start, p.y_strides.channel, steps, lanes, c.y);
        continue;
      }
      for (int64_t t = 0; t < steps; ++t) {
        if (c.write[t] >= 0) store(y + c.write[t] * p.y_strides.row, c.y[t], lanes);
      }
    }
  }
  for (int64_t block = 0; block < channels.blocks; ++block) {
    for (int64_t n = 0; n < N; ++n) {
      store(p.last + (sequence * N + n) * p.channels + channels.begin(block), c.h[block * N + n],
            channels.lanes(block));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// States that one sweep handles: the products that it sums over lanes, two a state, fill one vector.
template <typename T>
constexpr int kBackwardStates = kLanes<T> / 2;
// The same for the rest, if fewer are left; then they go one by one.
template <typename T>
constexpr int kBackwardTail = kBackwardStates<T> > 2 ? 2 : 1;
// A single state, also the only one of a scan with N = 1, would leave most of that vector empty. Its two products of a
// step are kept as vectors and summed over lanes at the end, those of several steps together.
template <typename T, int count>
constexpr bool kAlonePerStep = count == 1 && kBackwardStates<T> > 1;

template <typename T>
struct BackwardScratch {
  int64_t* state;         // per step, whose number it is, 0 beyond the last: the order in which states are prefetched
  V<T> *u, *dy, *slope;   // per step; slope: d dt / d (delta + bias)
  V<T> *ddt, *ddtu;       // per step: gradients of dt (over the decay, times log2(e)) and of dt * u
  V<T> *decay, *decayed;  // (step, state of the group): exp(dt A) and exp(dt A) h[t - 1]
  V<T> *sums;             // (group of states, step): gradients of C, then of B, summed over the item's channels; of a
                          // single state (step, 2), not yet summed over lanes
  V<T> *dA;               // (block, state)
  V<T> *dD, *dbias;       // per block

  BackwardScratch(Scratch& s, int64_t N)
      : state(s.take<int64_t>(kChunk)), u(s.take<V<T>>(kChunk)), dy(s.take<V<T>>(kChunk)),
        slope(s.take<V<T>>(kChunk)), ddt(s.take<V<T>>(kChunk)), ddtu(s.take<V<T>>(kChunk)),
        decay(s.take<V<T>>(kChunk * kBackwardStates<T>)),
        decayed(s.take<V<T>>(kChunk * kBackwardStates<T>)), sums(s.take<V<T>>(kChunk * (N + 1))),
        dA(s.take<V<T>>(kBlocks * N)), dD(s.take<V<T>>(kBlocks)), dbias(s.take<V<T>>(kBlocks)) {}
};

// Adds lanes whose numbers differ in one bit: those of x come out where the bit is 0, those of y where it is 1.
template <typename T, int bit, int... lane>
INLINE V<T> fold(V<T> x, V<T> y, std::integer_sequence<int, lane...>) {
  constexpr int W = kLanes<T>;
  return SHUFFLE(T, x, y, (lane & bit ? lane + W : lane)...) +
         SHUFFLE(T, x, y, (lane & bit ? lane - bit + W : lane + bit)...);
}

// Lane i of the result is the sum over the lanes of x[i]. Clobbers x.
template <typename T, int count = kLanes<T> / 2>
INLINE V<T> sum_lanes(V<T>* x) {
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
    x[i] = fold<T, count>(x[i], x[i + count], std::make_integer_sequence<int, kLanes<T>>());
  }
  if constexpr (count > 1) return sum_lanes<T, count / 2>(x);
  return x[0];
}

// Runs forward through a chunk again, and keeps the values for the backward pass.
template <typename T, int count, Exp2 way>
void recompute(int64_t steps, int64_t N, const V<T>* A, const T* B, const V<T>* dt, const V<T>* dtu,
               const V<T>* start, V<T>* decay, V<T>* decayed) {
  constexpr int side = count < kSideBySide ? count : kSideBySide;
  V<T> h[count];
  for (int n = 0; n < count; ++n) h[n] = start[n];
  for (int64_t t = 0; t < steps; ++t, B += N, decay += count, decayed += count) {
    const V<T> step = dt[t], input = dtu[t];
#pragma GCC unroll 16
    for (int first = 0; first < count; first += side) {
      V<T> exponent[side];
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i) exponent[i] = step * A[first + i];
      exp2<T, side, way>(exponent);
#pragma GCC unroll 16
      for (int i = 0, n = first; i < side; ++i, ++n) {
        decay[n] = exponent[i];
        decayed[n] = decay[n] * h[n];
        h[n] = decayed[n] + input * B[n];
      }
    }
  }
}

template <typename T, int count, bool with_dA>
void sweep_back(int64_t steps, int64_t N, const V<T>* A, const T* B, const T* C, const V<T>* dt, const V<T>* dtu,
                const V<T>* dy, const V<T>* decay, const V<T>* decayed, V<T>* dh_memory, V<T>* dA_memory, V<T>* sums,
                V<T>* ddt, V<T>* ddtu, const Ahead<6>* ahead_memory) {
  Ahead<6> ahead{};
  if (ahead_memory) ahead = *ahead_memory;
  V<T> dh[count], dA[count];
  for (int n = 0; n < count; ++n) {
    dh[n] = dh_memory[n];
    dA[n] = V<T>{};
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    if (ahead_memory) ahead(t);
    const V<T> step = dt[t], input = dtu[t], gradient = dy[t];
    V<T> step_sum[2] = {ddt[t], V<T>{}}, input_sum[2] = {ddtu[t], V<T>{}};
    V<T> products[kAlonePerStep<T, count> ? 2 : kLanes<T>] = {};
    constexpr int second = kAlonePerStep<T, count> ? 1 : kLanes<T> / 2;
#pragma GCC unroll 16
    for (int n = 0; n < count; ++n) {
      const V<T> before = decayed[t * count + n];
      const T b = B[t * N + n];
      dh[n] += gradient * C[t * N + n];
      products[n] = gradient * (before + input * b);
      products[second + n] = dh[n] * input;
      input_sum[n % 2] += dh[n] * b;
      const V<T> dexponent = dh[n] * before;
      step_sum[n % 2] += dexponent * A[n];
      if constexpr (with_dA) dA[n] += dexponent * step;
      dh[n] *= decay[t * count + n];
    }
    if constexpr (kAlonePerStep<T, count>) {
      sums[2 * t] += products[0];
      sums[2 * t + 1] += products[1];
    } else {
      sums[t] += sum_lanes<T>(products);
    }
    ddt[t] = step_sum[0] + step_sum[1];
    ddtu[t] = input_sum[0] + input_sum[1];
  }
  for (int n = 0; n < count; ++n) {
    dh_memory[n] = dh[n];
    if constexpr (with_dA) dA_memory[n] += dA[n];
  }
}

template <int count, Exp2 way, typename S, typename T = Compute<S>>
INLINE int64_t backward_groups(int64_t n, V<T>*& sums, const ScanProblem<S>& p, Item item, int64_t start, int64_t steps,
                               const Channels<T>& channels, int64_t block, const ChunkScratch<T>& c,
                               const BackwardScratch<T>& g, const Ahead<6>& ahead) {
  const int64_t N = p.states;
  for (; N - n >= count; n += count, sums += kChunk) {
    V<T> h[count];
    for (int i = 0; i < count; ++i) {
      h[i] = start ? load(checkpoint(p, item, start / kChunk, channels.begin(block)) + (n + i) * p.channels,
                          channels.lanes(block))
                   : V<T>{};
    }
    const int64_t state = block * N + n;
    recompute<T, count, way>(steps, N, c.A + state, c.B + n, c.dt, c.dtu, h, g.decay, g.decayed);
    const auto sweep = [&](auto with_dA) {
      sweep_back<T, count, decltype(with_dA)::value>(steps, N, c.A + state, c.B + n, c.C + n, c.dt, c.dtu, g.dy, g.decay,
                                                     g.decayed, c.h + state, g.dA + state, sums, g.ddt, g.ddtu,
                                                     n ? nullptr : &ahead);
    };
    if (p.dA) {
      sweep(std::true_type{});
    } else {
      sweep(std::false_type{});
    }
  }
  return n;
}

template <typename T, int count>
INLINE int64_t write_sums(int64_t n, const V<T>*& sums, const ChunkScratch<T>& c, int64_t steps, int64_t N, bool add,
                          T* dB, T* dC) {
  for (; N - n >= count; n += count, sums += kChunk) {
    for (int64_t t = 0; t < steps; ++t) {
      if (c.read[t] < 0) continue;
      T* to_B = dB + c.read[t] * N + n;
      T* to_C = dC + c.read[t] * N + n;
      for (int i = 0; i < count; ++i) {
        to_C[i] = sums[t][i] + (add ? to_C[i] : T(0));
        to_B[i] = sums[t][kLanes<T> / 2 + i] + (add ? to_B[i] : T(0));
      }
    }
  }
  return n;
}

// The same for a single state n.
template <typename T>
INLINE void write_single_sums(int64_t n, const V<T>* sums, const ChunkScratch<T>& c, int64_t steps, int64_t N, bool add,
                              T* dB, T* dC) {
  constexpr int together = kLanes<T> / 2;
  for (int64_t first = 0; first < steps; first += together) {
    V<T> products[kLanes<T>];
    for (int i = 0; i < together; ++i) {
      const bool inside = first + i < steps;
      products[i] = inside ? sums[2 * (first + i)] : V<T>{};
      products[together + i] = inside ? sums[2 * (first + i) + 1] : V<T>{};
    }
    const V<T> sum = sum_lanes<T>(products);
    for (int i = 0; i < together && first + i < steps; ++i) {
      const int64_t row = c.read[first + i];
      if (row < 0) continue;
      dC[row * N + n] = sum[i] + (add ? dC[row * N + n] : T(0));
      dB[row * N + n] = sum[together + i] + (add ? dB[row * N + n] : T(0));
    }
  }
}

template <typename S, typename T = Compute<S>>
void scan_backward(const ScanProblem<S>& p, Item item, void* memory) {
  const int64_t N = p.states, sequence = item.batch * p.directions + item.direction;
  const Channels<T> channels(p.channels, item);
  Scratch scratch{static_cast<char*>(memory)};
  ChunkScratch<T> c(scratch, N, p.dt_rank);
  BackwardScratch<T> g(scratch, N);
  for (int64_t t = 0; t < kChunk; ++t) g.state[t] = t < N ? t : 0;
  load_A(p, item, channels, c);
  if (p.dt_rank) load_transposed(p.dt_weight, p.dt_rank, T(1), p.channels, item, channels, c.weight);
  for (int64_t block = 0; block < channels.blocks; ++block) {
    g.dD[block] = g.dbias[block] = V<T>{};
    for (int64_t n = 0; n < N; ++n) {
      g.dA[block * N + n] = V<T>{};
      c.h[block * N + n] = p.dlast ? load(p.dlast + (sequence * N + n) * p.channels + channels.begin(block),
                                          channels.lanes(block))
                                   : V<T>{};
    }
  }
  const int64_t part = ((p.dB_in_parts ? item.index * p.batch * p.directions : 0) + sequence) * p.rows * N;
  const bool add_dB = !p.dB_in_parts && item.index, add_du = !p.du_in_parts && item.direction;

  for (int64_t start = (p.steps - 1) / kChunk * kChunk; start >= 0; start -= kChunk) {
    const int64_t steps = p.steps - start < kChunk ? p.steps - start : kChunk;
    open_chunk(p, item, start, steps, start - kChunk, c);
    for (int64_t i = 0; i < kChunk * (N + 1); ++i) g.sums[i] = V<T>{};
    for (int64_t block = 0; block < channels.blocks; ++block) {
      const int64_t channel = channels.begin(block);
      const int lanes = channels.lanes(block);
      const V<T> bias = load_weight(p.bias, p, item, channels, block);
      const V<T> D = load_weight(p.D, p, item, channels, block);
      const S* u = p.u + offset(p.u_strides, item) + channel * p.u_strides.channel;
      const S* delta = p.delta + offset(p.delta_strides, item) + channel * p.delta_strides.channel;
      const S* dy = p.dy + offset(p.dy_strides, item) + channel * p.dy_strides.channel;
      const int64_t to_du = offset(p.du_strides, item) + channel * p.du_strides.channel;
      S* du = p.du ? p.du + to_du : nullptr;
      T* du_sum = p.du_sum ? p.du_sum + to_du : nullptr;
      const int64_t to_ddelta = offset(p.ddelta_strides, item) + channel * p.ddelta_strides.channel;
      S* ddelta = p.ddelta ? p.ddelta + to_ddelta : nullptr;
      T* dproduct = p.dproduct ? p.dproduct + to_ddelta : nullptr;
      load_steps(p, c, item, steps, block, channel, lanes, bias);
      if (p.softplus) softplus_steps<T>(c.dt, steps, g.slope);
      const bool u_columns = p.u_strides.columns(), dy_columns = p.dy_strides.columns();
      const bool du_columns = p.du_strides.columns(), ddelta_columns = p.ddelta_strides.columns();
      const bool delta_columns = p.delta_strides.columns();
      if (u_columns) load_columns(u + start, p.u_strides.channel, steps, lanes, g.u);
      if (dy_columns) load_columns(dy + start, p.dy_strides.channel, steps, lanes, g.dy);
      if (start) {
        const int64_t ahead = start - kChunk;
        if (u_columns) prefetch_columns<false>(u + ahead, p.u_strides.channel, lanes);
        if (delta_columns && !p.dt_rank) prefetch_columns<false>(delta + ahead, p.delta_strides.channel, lanes);
        if (dy_columns) prefetch_columns<false>(dy + ahead, p.dy_strides.channel, lanes);
        if (du_columns && du) prefetch_columns<true>(du + ahead, p.du_strides.channel, lanes);
        if (ddelta_columns) prefetch_columns<true>(ddelta + ahead, p.ddelta_strides.channel, lanes);
      }
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t row = c.read[t];
        if (!u_columns) g.u[t] = row < 0 ? V<T>{} : load(u + row * p.u_strides.row, lanes);
        if (!dy_columns) {
          g.dy[t] = c.write[t] < 0 ? V<T>{} : load(dy + c.write[t] * p.dy_strides.row, lanes);
        }
        g.ddt[t] = g.ddtu[t] = V<T>{};
        if (!p.softplus) g.slope[t] = splat(T(1));
        c.dtu[t] = c.dt[t] * g.u[t];
      }
      const Soon soon(N, c, block, channels.blocks);
      Ahead<6> ahead;
      ahead.set(0, u, soon.channels, u_columns ? 0 : p.u_strides.row, soon.read);
      ahead.set(1, dy, soon.channels, dy_columns ? 0 : p.dy_strides.row, soon.write);
      shared_ahead(ahead, 2, p, item, c, soon, block, delta);
      for (int i = 3; i < 6; ++i) ahead.set(i, u, 0, 0, soon.read);
      if (du && !du_columns) ahead.set(3, du, soon.channels, p.du_strides.row, soon.read);
      if (du_sum && !du_columns) ahead.set(3, du_sum, soon.channels, p.du_strides.row, soon.read);
      if (ddelta && !ddelta_columns) ahead.set(4, ddelta, soon.channels, p.ddelta_strides.row, soon.read);
      if (dproduct) ahead.set(4, dproduct, soon.channels, p.ddelta_strides.row, soon.read);
      const int64_t chunk = soon.read == c.read ? start / kChunk : start / kChunk - 1;
      if (chunk > 0) ahead.set(5, checkpoint(p, item, chunk, channel), soon.channels, p.channels, g.state);
      V<T>* sums = g.sums;
      // Never scaled: the table's digits are wanted where a gradient of A is the sum of many small ones.
      with_exp2<false>(c, block, steps, [&](auto way) __attribute__((always_inline)) {
        int64_t n = backward_groups<kBackwardStates<T>, way>(0, sums, p, item, start, steps, channels, block, c, g,
                                                             ahead);
        n = backward_groups<kBackwardTail<T>, way>(n, sums, p, item, start, steps, channels, block, c, g, ahead);
        backward_groups<1, way>(n, sums, p, item, start, steps, channels, block, c, g, ahead);
      });
      for (int64_t t = 0; t < steps; ++t) {
        const V<T> ddt = (g.ddt[t] * Constants<T>::ln2 + g.ddtu[t] * g.u[t]) * g.slope[t];
        const V<T> gradient = g.ddtu[t] * c.dt[t] + g.dy[t] * D;
        g.dbias[block] += ddt;
        g.dD[block] += g.dy[t] * g.u[t];
        if (du_columns) {
          g.ddtu[t] = gradient;
        } else if (du && c.read[t] >= 0) {
          store(du + c.read[t] * p.du_strides.row, gradient, lanes);
        } else if (du_sum && c.read[t] >= 0) {
          T* to = du_sum + c.read[t] * p.du_strides.row;
          store(to, add_du ? load(to, lanes) + gradient : gradient, lanes);
        }
        if (ddelta_columns) {
          g.ddt[t] = ddt;
        } else if (ddelta && c.read[t] >= 0) {
          store(ddelta + c.read[t] * p.ddelta_strides.row, ddt, lanes);
        } else if (dproduct && c.read[t] >= 0) {
          store(dproduct + c.read[t] * p.ddelta_strides.row, ddt, lanes);
        }
      }
      if (du_columns && du) store_columns(du + start, p.du_strides.channel, steps, lanes, g.ddtu);
      if (du_columns && du_sum) store_columns(du_sum + start, p.du_strides.channel, steps, lanes, g.ddtu);
      if (ddelta_columns) store_columns(ddelta + start, p.ddelta_strides.channel, steps, lanes, g.ddt);
    }
    if (!p.dB) continue;
    const V<T>* sums = g.sums;
    T *dB = p.dB + part, *dC = p.dC + part;
    int64_t n = write_sums<T, kBackwardStates<T>>(0, sums, c, steps, N, add_dB, dB, dC);
    if constexpr (kBackwardTail<T> > 1) n = write_sums<T, kBackwardTail<T>>(n, sums, c, steps, N, add_dB, dB, dC);
    if (n < N) write_single_sums<T>(n, sums, c, steps, N, add_dB, dB, dC);
  }

  for (int64_t block = 0; block < channels.blocks; ++block) {
    const int64_t channel = channels.begin(block);
    const int lanes = channels.lanes(block);
    store(p.dD + sequence * p.channels + channel, g.dD[block], lanes);
    store(p.dbias + sequence * p.channels + channel, g.dbias[block], lanes);
    for (int lane = 0; p.dA && lane < lanes; ++lane) {
      T* to = p.dA + (sequence * p.channels + channel + lane) * N;
      for (int64_t n = 0; n < N; ++n) to[n] = g.dA[block * N + n][lane];
    }
  }
}

template <typename T>
int64_t scan_scratch(int64_t states, int64_t dt_rank, bool with_backward) {
  Scratch scratch{nullptr};
  ChunkScratch<T> common(scratch, states, dt_rank);
  if (with_backward) BackwardScratch<T> buffers(scratch, states);
  return scratch.used;
}

}  // namespace
}  // namespace mmlocalmamba
