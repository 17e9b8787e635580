// The selective scan with channels in vector lanes. Included once per instruction set, with
//   ISA         name of the InstructionSet to define
//   ISA_BYTES   width of a vector
//   ISA_STATES  states of one channel block that the forward pass keeps in registers (a power of two)
// and, for AVX-512, ISA_AVX512. Everything has internal linkage and nothing from the standard library is called.
//
// The recurrence runs in chunks of kChunk steps. Per chunk and block of channels: first the step sizes (independent of
// each other), then groups of states whose values stay in registers over the chunk.

#include <utility>

#include "scan.h"

#define INLINE __attribute__((always_inline)) inline

namespace mmlocalmamba {
namespace {

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(ISA_BYTES)));
  typedef int32_t bits __attribute__((vector_size(ISA_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(ISA_BYTES)));
  typedef int64_t bits __attribute__((vector_size(ISA_BYTES)));
};
template <typename T>
using V = typename Vector<T>::type;
template <typename T>
using Bits = typename Vector<T>::bits;
template <typename T>
constexpr int kLanes = ISA_BYTES / sizeof(T);

template <typename T>
INLINE V<T> splat(T x) {
  return x - V<T>{};
}

template <typename T>
INLINE V<T> load(const T* from) {
  V<T> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

// The last channels may not fill a vector: the other lanes read zero and are not written.
template <typename T>
INLINE V<T> load(const T* from, int lanes) {
  if (__builtin_expect(lanes == kLanes<T>, 1)) return load(from);
  V<T> x{};
  for (int i = 0; i < lanes; ++i) x[i] = from[i];
  return x;
}

template <typename T>
INLINE void store(T* to, V<T> x, int lanes) {
  if (__builtin_expect(lanes == kLanes<T>, 1)) {
    __builtin_memcpy(to, &x, sizeof x);
  } else {
    for (int i = 0; i < lanes; ++i) to[i] = x[i];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Elementary functions

template <typename T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr int mantissa = 23;
  static constexpr float log2e = 1.44269504f;
  static constexpr float ln2 = 0.693147181f;
  // ln 2 in two parts; an integer times the first is exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // Adding this rounds to an integer n and leaves n + the exponent's bias in the lowest bits.
  static constexpr float round = 12582912.f + 127.f;
  static constexpr float lowest = -126.f, highest = 127.f;
  static constexpr int32_t sqrt_half = 0x3f3504f3;
  // 2^r - 1 on [-1/2, 1/2] divided by r, highest power first; relative error of 2^r 2e-9.
  static constexpr float exp2[] = {1.53533619e-4f, 1.33988744e-3f, 9.61843736e-3f,
                                   5.55033247e-2f, 2.40226479e-1f, 6.93147203e-1f};
  // log((1 + s) / (1 - s)) = 2 s (1 + s^2 / 3 + ...) for |s| <= 0.172.
  static constexpr float atanh[] = {1.f / 11, 1.f / 9, 1.f / 7, 1.f / 5, 1.f / 3};
};
template <>
struct Constants<double> {
  static constexpr int mantissa = 52;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2 = 0.6931471805599453;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744. + 1023.;
  static constexpr double lowest = -1022., highest = 1023.;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double exp2[] = {
      1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10,   7.054911620801121e-09,
      1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
      0.0013333558146428441,  0.009618129107628477,   0.055504108664821576,   0.2402265069591007,
      0.6931471805599453};
  static constexpr double atanh[] = {1. / 23, 1. / 21, 1. / 19, 1. / 17, 1. / 15, 1. / 13,
                                     1. / 11, 1. / 9,  1. / 7,  1. / 5,  1. / 3};
};

// Polynomial without its constant term, divided by the argument.
template <typename T, int n>
INLINE V<T> polynomial(V<T> x, const T (&coefficients)[n]) {
  V<T> p = splat(coefficients[0]);
  for (int i = 1; i < n; ++i) p = p * x + coefficients[i];
  return p;
}

template <typename T>
INLINE V<T> fraction_exp2(V<T> r) {
  return polynomial<T>(r, Constants<T>::exp2) * r + T(1);
}

#ifdef ISA_AVX512
INLINE V<float> nearest(V<float> x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V<double> nearest(V<double> x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V<float> scale(V<float> x, V<float> n) { return _mm512_scalef_ps(x, n); }
INLINE V<double> scale(V<double> x, V<double> n) { return _mm512_scalef_pd(x, n); }

template <typename T>
INLINE V<T> exp2(V<T> x) {
  const V<T> n = nearest(x);
  return scale(fraction_exp2<T>(x - n), n);
}

template <typename T>
INLINE V<T> exp(V<T> x) {
  const V<T> n = nearest(x * Constants<T>::log2e);
  const V<T> r = (x - n * Constants<T>::ln2_high) - n * Constants<T>::ln2_low;
  return scale(fraction_exp2<T>(r * Constants<T>::log2e), n);
}
#else
// Results below the smallest normal number come out as that number. NaN stays NaN: it fails both comparisons.
template <typename T>
INLINE V<T> clamp(V<T> x) {
  const V<T> lowest = splat(Constants<T>::lowest), highest = splat(Constants<T>::highest);
  x = x < lowest ? lowest : x;
  return x > highest ? highest : x;
}

template <typename T>
INLINE V<T> power(V<T> rounded) {
  return (V<T>)((Bits<T>)rounded << Constants<T>::mantissa);
}

template <typename T>
INLINE V<T> exp2(V<T> x) {
  x = clamp<T>(x);
  const V<T> rounded = x + Constants<T>::round;
  return fraction_exp2<T>(x - (rounded - Constants<T>::round)) * power<T>(rounded);
}

template <typename T>
INLINE V<T> exp(V<T> x) {
  const V<T> rounded = clamp<T>(x * Constants<T>::log2e) + Constants<T>::round;
  const V<T> n = rounded - Constants<T>::round;
  V<T> r = ((x - n * Constants<T>::ln2_high) - n * Constants<T>::ln2_low) * Constants<T>::log2e;
  // Where the exponent was clamped the fraction must not run away.
  r = r < T(-0.5) ? splat(T(-0.5)) : r;
  return fraction_exp2<T>(r) * power<T>(rounded);
}
#endif

// log(1 + e) for e >= 0, accurate where 1 + e rounds: log w + (what the rounding of w = 1 + e lost) / w.
template <typename T>
INLINE V<T> log1p(V<T> e) {
  using K = Constants<T>;
  const V<T> w = e + T(1);
  const V<T> lost = e - (w - T(1));
  const Bits<T> k = ((Bits<T>)w - K::sqrt_half) >> K::mantissa;
  const Bits<T> shift = k << K::mantissa;
  const V<T> one = splat(T(1));
  const V<T> inverse_power = (V<T>)((Bits<T>)one - shift);
  const V<T> f = ((V<T>)((Bits<T>)w - shift) - T(1)) + lost * inverse_power;  // w / 2^k - 1
  const V<T> s = f / (f + T(2)), z = s * s;
  const V<T> log_f = T(2) * s * (polynomial<T>(z, K::atanh) * z + T(1));
  const V<T> exponent = __builtin_convertvector(k, V<T>);
  return exponent * K::ln2_high + (exponent * K::ln2_low + log_f);
}

// softplus as in torch and mamba_ssm: the identity beyond 20.
template <typename T>
INLINE V<T> softplus(V<T> x, V<T>* derivative = nullptr) {
  const V<T> limit = splat(T(20)), one = splat(T(1));
  const auto large = x > limit;
  const V<T> e = exp<T>(large ? limit : x);
  if (derivative) *derivative = large ? one : e / (e + T(1));
  return large ? x : log1p<T>(e);
}

// ---------------------------------------------------------------------------------------------------------------------
// What both passes share

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Hands out pieces of the scratch memory; with a null pointer it only counts.
struct Scratch {
  char* memory;
  int64_t used = 0;

  template <typename U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(memory + used);
    used += aligned(count * sizeof(U));
    return piece;
  }
};

template <typename T>
struct Common {
  int64_t *read, *write;  // rows of the chunk's steps, -1: none
  T *B, *C;               // (step, state), zeros for pads
  V<T> *A;                // (block, state), times log2(e)
  V<T> *h;                // (block, state): state, in the backward pass its gradient
  V<T> *dt, *dtu, *y;     // per step

  Common(Scratch& s, int64_t N)
      : read(s.take<int64_t>(kChunk)), write(s.take<int64_t>(kChunk)), B(s.take<T>(kChunk * N)),
        C(s.take<T>(kChunk * N)), A(s.take<V<T>>(kBlocks * N)), h(s.take<V<T>>(kBlocks * N)),
        dt(s.take<V<T>>(kChunk)), dtu(s.take<V<T>>(kChunk)), y(s.take<V<T>>(kChunk)) {}
};

// The channels of one item.
template <typename T>
struct Channels {
  int64_t first, blocks, total;

  Channels(const Problem<T>& p, Item item) : first(item.index * kBlocks * kLanes<T>), total(p.channels) {
    blocks = (total - first + kLanes<T> - 1) / kLanes<T>;
    blocks = blocks < kBlocks ? blocks : kBlocks;
  }
  int64_t begin(int64_t block) const { return first + block * kLanes<T>; }
  int lanes(int64_t block) const {
    const int64_t left = total - begin(block);
    return left < kLanes<T> ? int(left) : kLanes<T>;
  }
};

INLINE int64_t offset(const Strides& s, Item item) { return item.batch * s.batch + item.direction * s.direction; }

template <typename T>
void copy_rows(const T* from, int64_t row_stride, int64_t state_stride, const int64_t* rows, int64_t steps, int64_t N,
               T* to) {
  for (int64_t t = 0; t < steps; ++t, to += N) {
    const T* row = from + rows[t] * row_stride;
    if (rows[t] < 0) {
      for (int64_t n = 0; n < N; ++n) to[n] = 0;
    } else if (state_stride == 1) {
      for (int64_t n = 0; n < N; ++n) to[n] = row[n];
    } else {
      for (int64_t n = 0; n < N; ++n) to[n] = row[n * state_stride];
    }
  }
}

// The row that a step reads or writes, -1: none.
template <typename T>
INLINE int64_t token(const Problem<T>& p, Item item, int64_t step) {
  return p.table ? p.table[item.direction * p.steps + step] : step;
}

// Tables jump through memory in ways that no hardware prefetcher follows, so the rows of the chunk that comes next are
// asked for one by one. A step outside the sequence asks for nothing.
struct Next {
  int64_t read = -1, write = -1;

  template <typename T>
  INLINE Next(const Problem<T>& p, Item item, int64_t step) {
    if (step < 0 || step >= p.steps) return;
    write = token(p, item, step);
    read = p.in_scan_order ? step : write;
  }
};

#define PREFETCH(array, row, stride, for_writing) \
  if ((row) >= 0) __builtin_prefetch((array) + (row) * (stride), for_writing)

// Rows of the chunk's steps, B and C.
template <typename T>
void open_chunk(const Problem<T>& p, Item item, int64_t start, int64_t steps, Common<T>& c) {
  for (int64_t t = 0; t < steps; ++t) {
    c.write[t] = token(p, item, start + t);
    c.read[t] = p.in_scan_order ? start + t : c.write[t];
  }
  copy_rows(p.B + offset(p.B_strides, item), p.B_strides.row, p.B_state_stride, c.read, steps, p.states, c.B);
  copy_rows(p.C + offset(p.C_strides, item), p.C_strides.row, p.C_state_stride, c.read, steps, p.states, c.C);
}

// A is stored with the states innermost, the kernel wants the channels there.
template <typename T>
void load_A(const Problem<T>& p, Item item, const Channels<T>& channels, V<T>* A) {
  for (int64_t block = 0; block < channels.blocks; ++block, A += p.states) {
    const T* from = p.A + (item.direction * p.channels + channels.begin(block)) * p.states;
    for (int64_t n = 0; n < p.states; ++n) A[n] = V<T>{};
    for (int lane = 0; lane < channels.lanes(block); ++lane) {
      for (int64_t n = 0; n < p.states; ++n) A[n][lane] = from[lane * p.states + n] * Constants<T>::log2e;
    }
  }
}

template <typename T>
INLINE V<T> load_weight(const T* weight, const Problem<T>& p, Item item, const Channels<T>& channels, int64_t block) {
  return weight ? load(weight + item.direction * p.channels + channels.begin(block), channels.lanes(block)) : V<T>{};
}

// Where the state before chunk number `chunk` >= 1 is kept.
template <typename T>
INLINE T* checkpoint(const Problem<T>& p, Item item, int64_t chunk, int64_t channel) {
  const int64_t saved = (p.steps + kChunk - 1) / kChunk - 1;
  const int64_t sequence = item.batch * p.directions + item.direction;
  return p.checkpoints + ((sequence * saved + chunk - 1) * p.states) * p.channels + channel;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// A chunk of one block, `count` states at a time; y accumulates over the groups of states.
template <typename T, int count>
void advance(int64_t steps, int64_t N, const V<T>* A_memory, const T* B, const T* C, const V<T>* dt, const V<T>* dtu,
             V<T>* h_memory, V<T>* y) {
  V<T> h[count];
  for (int n = 0; n < count; ++n) h[n] = h_memory[n];
  for (int64_t t = 0; t < steps; ++t, B += N, C += N) {
    V<T> sum[2] = {y[t], V<T>{}};
    const V<T> step = dt[t], input = dtu[t];
#pragma GCC unroll 16
    for (int n = 0; n < count; ++n) {
      h[n] = exp2<T>(step * A_memory[n]) * h[n] + input * B[n];
      sum[n % 2] += h[n] * C[n];
    }
    y[t] = sum[0] + sum[1];
  }
  for (int n = 0; n < count; ++n) h_memory[n] = h[n];
}

template <typename T, int count>
INLINE int64_t advance_groups(int64_t n, int64_t steps, int64_t N, const Common<T>& c, int64_t block) {
  for (; N - n >= count; n += count) {
    advance<T, count>(steps, N, c.A + block * N + n, c.B + n, c.C + n, c.dt, c.dtu, c.h + block * N + n, c.y);
  }
  return n;
}

template <typename T>
void forward(const Problem<T>& p, Item item, void* memory) {
  const int64_t N = p.states, sequence = item.batch * p.directions + item.direction;
  const Channels<T> channels(p, item);
  Scratch scratch{static_cast<char*>(memory)};
  Common<T> c(scratch, N);
  load_A(p, item, channels, c.A);
  for (int64_t i = 0; i < channels.blocks * N; ++i) c.h[i] = V<T>{};

  for (int64_t start = 0; start < p.steps; start += kChunk) {
    const int64_t steps = p.steps - start < kChunk ? p.steps - start : kChunk;
    open_chunk(p, item, start, steps, c);
    for (int64_t block = 0; block < channels.blocks; ++block) {
      const int64_t channel = channels.begin(block);
      const int lanes = channels.lanes(block);
      const V<T> bias = load_weight(p.bias, p, item, channels, block);
      const V<T> D = load_weight(p.D, p, item, channels, block);
      const T* u = p.u + offset(p.u_strides, item) + channel;
      const T* delta = p.delta + offset(p.delta_strides, item) + channel;
      T* y = p.y + sequence * p.tokens * p.channels + channel;

      if (p.checkpoints && start) {
        T* to = checkpoint(p, item, start / kChunk, channel);
        for (int64_t n = 0; n < N; ++n) store(to + n * p.channels, c.h[block * N + n], lanes);
      }
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t row = c.read[t];
        const Next next(p, item, start + kChunk + t);
        PREFETCH(u, next.read, p.u_strides.row, 0);
        PREFETCH(delta, next.read, p.delta_strides.row, 0);
        PREFETCH(y, next.write, p.channels, 1);
        V<T> x = bias, input{};
        if (row >= 0) {
          x += load(delta + row * p.delta_strides.row, lanes);
          input = load(u + row * p.u_strides.row, lanes);
        }
        c.dt[t] = p.softplus ? softplus<T>(x) : x;
        c.dtu[t] = c.dt[t] * input;
        c.y[t] = D * input;
      }
      int64_t n = advance_groups<T, ISA_STATES>(0, steps, N, c, block);
      n = advance_groups<T, 4>(n, steps, N, c, block);
      n = advance_groups<T, 2>(n, steps, N, c, block);
      advance_groups<T, 1>(n, steps, N, c, block);
      for (int64_t t = 0; t < steps; ++t) {
        if (c.write[t] >= 0) store(y + c.write[t] * p.channels, c.y[t], lanes);
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
// And when fewer are left, before they go one by one.
template <typename T>
constexpr int kBackwardTail = kBackwardStates<T> > 2 ? 2 : 1;

template <typename T>
struct Buffers {
  V<T> *u, *dy, *slope;   // per step; slope: d dt / d (delta + bias)
  V<T> *ddt, *ddtu;       // per step: gradients of dt (over the decay, times log2(e)) and of dt * u
  V<T> *decay, *decayed;  // (step, state of the group): exp(dt A) and exp(dt A) h[t - 1]
  V<T> *sums;             // (group of states, step): gradients of C, then of B, summed over the item's channels
  V<T> *dA;               // (block, state)
  V<T> *dD, *dbias;       // per block

  Buffers(Scratch& s, int64_t N)
      : u(s.take<V<T>>(kChunk)), dy(s.take<V<T>>(kChunk)), slope(s.take<V<T>>(kChunk)), ddt(s.take<V<T>>(kChunk)),
        ddtu(s.take<V<T>>(kChunk)), decay(s.take<V<T>>(kChunk * kBackwardStates<T>)),
        decayed(s.take<V<T>>(kChunk * kBackwardStates<T>)), sums(s.take<V<T>>(kChunk * N)),
        dA(s.take<V<T>>(kBlocks * N)), dD(s.take<V<T>>(kBlocks)), dbias(s.take<V<T>>(kBlocks)) {}
};

#if defined(__clang__)
#define SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, Bits<T>{__VA_ARGS__})
#endif

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

// Forward again through a chunk, keeping what the way back needs.
template <typename T, int count>
void recompute(int64_t steps, int64_t N, const V<T>* A, const T* B, const V<T>* dt, const V<T>* dtu,
               const V<T>* start, V<T>* decay, V<T>* decayed) {
  V<T> h[count];
  for (int n = 0; n < count; ++n) h[n] = start[n];
  for (int64_t t = 0; t < steps; ++t, B += N, decay += count, decayed += count) {
    const V<T> step = dt[t], input = dtu[t];
#pragma GCC unroll 16
    for (int n = 0; n < count; ++n) {
      decay[n] = exp2<T>(step * A[n]);
      decayed[n] = decay[n] * h[n];
      h[n] = decayed[n] + input * B[n];
    }
  }
}

template <typename T, int count>
void sweep_back(int64_t steps, int64_t N, const V<T>* A, const T* B, const T* C, const V<T>* dt, const V<T>* dtu,
                const V<T>* dy, const V<T>* decay, const V<T>* decayed, V<T>* dh_memory, V<T>* dA_memory, V<T>* sums,
                V<T>* ddt, V<T>* ddtu) {
  V<T> dh[count], dA[count];
  for (int n = 0; n < count; ++n) {
    dh[n] = dh_memory[n];
    dA[n] = V<T>{};
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const V<T> step = dt[t], input = dtu[t], gradient = dy[t];
    V<T> step_sum[2] = {ddt[t], V<T>{}}, input_sum[2] = {ddtu[t], V<T>{}};
    V<T> products[kLanes<T>] = {};
#pragma GCC unroll 16
    for (int n = 0; n < count; ++n) {
      const V<T> before = decayed[t * count + n];
      const T b = B[t * N + n];
      dh[n] += gradient * C[t * N + n];
      products[n] = gradient * (before + input * b);
      products[kLanes<T> / 2 + n] = dh[n] * input;
      input_sum[n % 2] += dh[n] * b;
      const V<T> dexponent = dh[n] * before;
      step_sum[n % 2] += dexponent * A[n];
      dA[n] += dexponent * step;
      dh[n] *= decay[t * count + n];
    }
    sums[t] += sum_lanes<T>(products);
    ddt[t] = step_sum[0] + step_sum[1];
    ddtu[t] = input_sum[0] + input_sum[1];
  }
  for (int n = 0; n < count; ++n) {
    dh_memory[n] = dh[n];
    dA_memory[n] += dA[n];
  }
}

template <typename T, int count>
INLINE int64_t backward_groups(int64_t n, V<T>*& sums, const Problem<T>& p, Item item, int64_t start, int64_t steps,
                               const Channels<T>& channels, int64_t block, const Common<T>& c, const Buffers<T>& g) {
  const int64_t N = p.states;
  for (; N - n >= count; n += count, sums += kChunk) {
    V<T> h[count];
    for (int i = 0; i < count; ++i) {
      h[i] = start ? load(checkpoint(p, item, start / kChunk, channels.begin(block)) + (n + i) * p.channels,
                          channels.lanes(block))
                   : V<T>{};
    }
    const int64_t state = block * N + n;
    recompute<T, count>(steps, N, c.A + state, c.B + n, c.dt, c.dtu, h, g.decay, g.decayed);
    sweep_back<T, count>(steps, N, c.A + state, c.B + n, c.C + n, c.dt, c.dtu, g.dy, g.decay, g.decayed, c.h + state,
                         g.dA + state, sums, g.ddt, g.ddtu);
  }
  return n;
}

template <typename T, int count>
INLINE int64_t write_sums(int64_t n, const V<T>*& sums, const Common<T>& c, int64_t steps, int64_t N, bool add, T* dB,
                          T* dC) {
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

template <typename T>
void backward(const Problem<T>& p, Item item, void* memory) {
  const int64_t N = p.states, sequence = item.batch * p.directions + item.direction;
  const Channels<T> channels(p, item);
  Scratch scratch{static_cast<char*>(memory)};
  Common<T> c(scratch, N);
  Buffers<T> g(scratch, N);
  load_A(p, item, channels, c.A);
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
    open_chunk(p, item, start, steps, c);
    for (int64_t i = 0; i < kChunk * N; ++i) g.sums[i] = V<T>{};
    for (int64_t block = 0; block < channels.blocks; ++block) {
      const int64_t channel = channels.begin(block);
      const int lanes = channels.lanes(block);
      const V<T> bias = load_weight(p.bias, p, item, channels, block);
      const V<T> D = load_weight(p.D, p, item, channels, block);
      const T* u = p.u + offset(p.u_strides, item) + channel;
      const T* delta = p.delta + offset(p.delta_strides, item) + channel;
      const T* dy = p.dy + offset(p.dy_strides, item) + channel;
      T* du = p.du + (p.du_in_parts ? sequence : item.batch) * p.rows * p.channels + channel;
      T* ddelta = p.ddelta + sequence * p.rows * p.channels + channel;
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t row = c.read[t];
        const Next next(p, item, start - kChunk + t);
        PREFETCH(u, next.read, p.u_strides.row, 0);
        PREFETCH(delta, next.read, p.delta_strides.row, 0);
        PREFETCH(dy, next.write, p.dy_strides.row, 0);
        PREFETCH(du, next.read, p.channels, 1);
        PREFETCH(ddelta, next.read, p.channels, 1);
        V<T> x = bias, slope = splat(T(1));
        g.u[t] = g.dy[t] = g.ddt[t] = g.ddtu[t] = V<T>{};
        if (row >= 0) {
          x += load(delta + row * p.delta_strides.row, lanes);
          g.u[t] = load(u + row * p.u_strides.row, lanes);
        }
        if (c.write[t] >= 0) g.dy[t] = load(dy + c.write[t] * p.dy_strides.row, lanes);
        c.dt[t] = p.softplus ? softplus<T>(x, &slope) : x;
        c.dtu[t] = c.dt[t] * g.u[t];
        g.slope[t] = slope;
      }
      V<T>* sums = g.sums;
      int64_t n = backward_groups<T, kBackwardStates<T>>(0, sums, p, item, start, steps, channels, block, c, g);
      n = backward_groups<T, kBackwardTail<T>>(n, sums, p, item, start, steps, channels, block, c, g);
      backward_groups<T, 1>(n, sums, p, item, start, steps, channels, block, c, g);
      for (int64_t t = 0; t < steps; ++t) {
        const V<T> ddt = (g.ddt[t] * Constants<T>::ln2 + g.ddtu[t] * g.u[t]) * g.slope[t];
        g.dbias[block] += ddt;
        g.dD[block] += g.dy[t] * g.u[t];
        if (c.read[t] >= 0) {
          T* to = du + c.read[t] * p.channels;
          const V<T> gradient = g.ddtu[t] * c.dt[t] + g.dy[t] * D;
          store(to, add_du ? load(to, lanes) + gradient : gradient, lanes);
          store(ddelta + c.read[t] * p.channels, ddt, lanes);
        }
      }
    }
    const V<T>* sums = g.sums;
    T *dB = p.dB + part, *dC = p.dC + part;
    int64_t n = write_sums<T, kBackwardStates<T>>(0, sums, c, steps, N, add_dB, dB, dC);
    n = write_sums<T, kBackwardTail<T>>(n, sums, c, steps, N, add_dB, dB, dC);
    write_sums<T, 1>(n, sums, c, steps, N, add_dB, dB, dC);
  }

  for (int64_t block = 0; block < channels.blocks; ++block) {
    const int64_t channel = channels.begin(block);
    const int lanes = channels.lanes(block);
    store(p.dD + sequence * p.channels + channel, g.dD[block], lanes);
    store(p.dbias + sequence * p.channels + channel, g.dbias[block], lanes);
    for (int lane = 0; lane < lanes; ++lane) {
      T* to = p.dA + (sequence * p.channels + channel + lane) * N;
      for (int64_t n = 0; n < N; ++n) to[n] = g.dA[block * N + n][lane];
    }
  }
}

template <typename T>
int64_t scratch_bytes(int64_t states, bool with_backward) {
  Scratch scratch{nullptr};
  Common<T> common(scratch, states);
  if (with_backward) Buffers<T> buffers(scratch, states);
  return scratch.used;
}

}  // namespace

const InstructionSet ISA = {
    ISA_NAME,
    {kBlocks * kLanes<float>, scratch_bytes<float>, forward<float>, backward<float>},
    {kBlocks * kLanes<double>, scratch_bytes<double>, forward<double>, backward<double>},
};

}  // namespace mmlocalmamba
