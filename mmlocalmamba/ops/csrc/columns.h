// Arrays with contiguous steps and strided channels, as in mamba_ssm: squares of lanes x lanes elements are transposed
// in registers, so that no copy in the other order is written to memory.

namespace mmlocalmamba {
namespace {

// Swaps the elements of a and b that differ in one bit of their row and lane.
template <typename T, int bit, int... lane>
INLINE void exchange(V<T>& a, V<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int W = kLanes<T>;
  const V<T> first = SHUFFLE(T, a, b, (lane & bit ? lane - bit + W : lane)...);
  b = SHUFFLE(T, a, b, (lane & bit ? lane + W : lane + bit)...);
  a = first;
}

// Lane j of x[i] becomes lane i of x[j].
template <typename T, int bit = kLanes<T> / 2>
INLINE void transpose(V<T>* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (!(i & bit)) exchange<T, bit>(x[i], x[i + bit], std::make_integer_sequence<int, kLanes<T>>());
  }
  if constexpr (bit > 1) transpose<T, bit / 2>(x);
}

// `steps` <= kChunk steps of `lanes` channels that are `stride` apart; writes whole squares.
template <typename S, typename T = Compute<S>>
void load_columns(const S* from, int64_t stride, int64_t steps, int lanes, V<T>* to) {
  constexpr int W = kLanes<T>;
  for (int64_t t = 0; t < steps; t += W) {
    const int count = steps - t < W ? int(steps - t) : W;
    V<T> x[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = i < lanes ? load(from + i * stride + t, count) : V<T>{};
    transpose<T>(x);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) to[t + i] = x[i];
  }
}

template <typename S, typename T = Compute<S>>
void store_columns(S* to, int64_t stride, int64_t steps, int lanes, const V<T>* from) {
  constexpr int W = kLanes<T>;
  for (int64_t t = 0; t < steps; t += W) {
    const int count = steps - t < W ? int(steps - t) : W;
    V<T> x[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = from[t + i];
    transpose<T>(x);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i < lanes) store(to + i * stride + t, x[i], count);
    }
  }
}

// Prefetches a chunk of channels: they are too many for hardware prefetchers.
template <bool for_writing, typename S>
INLINE void prefetch_columns(const S* chunk, int64_t stride, int lanes) {
  for (int i = 0; i < lanes; ++i) {
    for (int64_t t = 0; t < kChunk; t += 64 / int64_t(sizeof(S))) __builtin_prefetch(chunk + i * stride + t, for_writing);
  }
}

}  // namespace
}  // namespace mmlocalmamba
