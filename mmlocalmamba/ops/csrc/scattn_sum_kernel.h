// The sum over directions of features that are gated per direction and channel, token by token; and the gate.

namespace mmlocalmamba {
namespace {

template <typename T>
struct SCAttnSumScratch {
  int64_t padded;  // channels, to whole vectors
  T *silu, *slope; // silu(z) of a token and its derivative
  T *row, *sum;    // (D), (K, D)
  T* offset;       // (K): mean over channels of dmean

  SCAttnSumScratch(Scratch& s, int64_t K, int64_t D)
      : padded((D + kLanes<T> - 1) / kLanes<T> * kLanes<T>), silu(s.take<T>(padded)), slope(s.take<T>(padded)),
        row(s.take<T>(padded)), sum(s.take<T>(K * padded)), offset(s.take<T>(K)) {}
};

template <typename T>
int64_t scattn_scratch(int64_t directions, int64_t channels) {
  Scratch scratch{nullptr};
  SCAttnSumScratch<T> arrays(scratch, directions, channels);
  return scratch.used;
}

// silu(z) of a token, if there is z; and its derivative.
template <typename S, typename T = Compute<S>>
INLINE void scattn_open(const SCAttnSumProblem<S>& p, int64_t batch, int64_t token, const SCAttnSumScratch<T>& c,
                        bool slope) {
  if (!p.z) return;
  const S* z = p.z + batch * p.z_strides.batch + token * p.z_strides.row;
  side_by_side((p.channels + kLanes<T> - 1) / kLanes<T>, [&](int64_t first, auto count) __attribute__((always_inline)) {
    V<T> x[count], derivative[count];
    for (int i = 0; i < count; ++i) {
      const int64_t d = (first + i) * kLanes<T>, left = p.channels - d;
      x[i] = load(z + d, left < kLanes<T> ? int(left) : kLanes<T>);
    }
    silu<T, count>(x, slope ? derivative : nullptr);
    for (int i = 0; i < count; ++i) {
      store(c.silu + (first + i) * kLanes<T>, x[i]);
      if (slope) store(c.slope + (first + i) * kLanes<T>, derivative[i]);
    }
  });
}

template <typename S, typename T = Compute<S>>
INLINE void scattn_clear(const SCAttnSumProblem<S>& p, const SCAttnSumScratch<T>& c) {
  for (int64_t i = 0; i < p.directions * c.padded; ++i) c.sum[i] = 0;
}

template <typename S, typename T = Compute<S>>
INLINE void scattn_write_parts(const SCAttnSumProblem<S>& p, int64_t batch, int64_t piece,
                               const SCAttnSumScratch<T>& c) {
  for (int64_t k = 0; k < p.directions; ++k) {
    T* to = p.parts + ((piece * p.batch + batch) * p.directions + k) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) { store(to + d, load(c.sum + k * c.padded + d), lanes); });
  }
}

// Mean and deviation of a token's features in `count` directions side by side, whose sums would wait for themselves.
template <typename S, int count, typename T = Compute<S>>
INLINE void scattn_rows(const SCAttnSumProblem<S>& p, int64_t batch, int64_t token, int64_t k,
                        const SCAttnSumScratch<T>& c) {
  const int64_t first = (batch * p.directions + k) * p.tokens + token, step = p.tokens * p.channels;
  const S* y = p.y + first * p.channels;
  const auto feature = [&](int i, int64_t d, int lanes) __attribute__((always_inline)) {
    const V<T> f = load(y + i * step + d, lanes);
    return p.z ? f * load(c.silu + d) : f;
  };
  V<T> totals[count], squares[count];
  T mean[count], inverse[count];
  for (int i = 0; i < count; ++i) totals[i] = squares[i] = V<T>{};
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) totals[i] += feature(i, d, lanes);
  });
  for (int i = 0; i < count; ++i) mean[i] = lane_sum<T>(totals[i]) / p.channels;
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      V<T> f = feature(i, d, lanes) - mean[i];
      if (lanes < kLanes<T>) {
        for (int lane = lanes; lane < kLanes<T>; ++lane) f[lane] = 0;
      }
      squares[i] += f * f;
    }
  });
  for (int i = 0; i < count; ++i) {
    inverse[i] = T(1) / __builtin_sqrt(lane_sum<T>(squares[i]) / p.channels + p.eps);
    p.mean[first + i * p.tokens] = mean[i];
    p.inverse[first + i * p.tokens] = inverse[i];
  }
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      T* sum = c.sum + (k + i) * c.padded + d;
      store(sum, load(sum) + (feature(i, d, lanes) - mean[i]) * inverse[i]);
    }
  });
}

template <typename S, typename T = Compute<S>>
void scattn_statistics(const SCAttnSumProblem<S>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const SCAttnSumScratch<T> c(scratch, p.directions, p.channels);
  const TokenRange tokens(p.tokens, piece);
  scattn_clear(p, c);
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    scattn_open(p, batch, l, c, false);
    int64_t k = 0;
    for (; k + 4 <= p.directions; k += 4) scattn_rows<S, 4>(p, batch, l, k, c);
    for (; k < p.directions; ++k) scattn_rows<S, 1>(p, batch, l, k, c);
  }
  scattn_write_parts(p, batch, piece, c);
}

template <typename S, typename T = Compute<S>>
void scattn_forward(const SCAttnSumProblem<S>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const SCAttnSumScratch<T> c(scratch, p.directions, p.channels);
  const TokenRange tokens(p.tokens, piece);
  const int64_t step = p.tokens * p.channels;
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    scattn_open(p, batch, l, c, false);
    const S* y = p.y + (batch * p.directions * p.tokens + l) * p.channels;
    const T* gate = p.gate + batch * p.directions * p.channels;
    S* out = p.out + (batch * p.tokens + l) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      V<T> sum{};
      for (int64_t k = 0; k < p.directions; ++k) {
        sum += load(y + k * step + d, lanes) * load(gate + k * p.channels + d, lanes);
      }
      store(out + d, p.z ? sum * load(c.silu + d) : sum, lanes);
    });
  }
}

template <typename S, typename T = Compute<S>>
void scattn_reduce(const SCAttnSumProblem<S>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const SCAttnSumScratch<T> c(scratch, p.directions, p.channels);
  const TokenRange tokens(p.tokens, piece);
  const int64_t step = p.tokens * p.channels;
  scattn_clear(p, c);
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    scattn_open(p, batch, l, c, false);
    const S* y = p.y + (batch * p.directions * p.tokens + l) * p.channels;
    const S* dout = p.dout + (batch * p.tokens + l) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      V<T> gradient = load(dout + d, lanes);
      if (p.z) gradient *= load(c.silu + d);
      for (int64_t k = 0; k < p.directions; ++k) {
        T* sum = c.sum + k * c.padded + d;
        store(sum, load(sum) + gradient * load(y + k * step + d, lanes), kLanes<T>);
      }
    });
  }
  scattn_write_parts(p, batch, piece, c);
}

template <typename S, typename T = Compute<S>>
void scattn_backward(const SCAttnSumProblem<S>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const SCAttnSumScratch<T> c(scratch, p.directions, p.channels);
  const TokenRange tokens(p.tokens, piece);
  const int64_t first = batch * p.directions;
  for (int64_t k = 0; k < p.directions; ++k) {
    V<T> total{};
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      total += load(p.dmean + (first + k) * p.channels + d, lanes);
    });
    c.offset[k] = lane_sum<T>(total) / p.channels;
  }
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    scattn_open(p, batch, l, c, true);
    const S* dout = p.dout + (batch * p.tokens + l) * p.channels;
    for (int64_t i = 0; i < c.padded; ++i) c.row[i] = 0;  // gradient of silu(z)
    for (int64_t k = 0; k < p.directions; ++k) {
      const int64_t row = (first + k) * p.tokens + l;
      const S* y = p.y + row * p.channels;
      const T* dmean = p.dmean + (first + k) * p.channels;
      const T* gate = p.gate + (first + k) * p.channels;
      const T mean = p.mean[row], inverse = p.inverse[row];
      V<T> product{};
      for_channels<T>(p.channels, [&](int64_t d, int lanes) {
        V<T> f = load(y + d, lanes);
        if (p.z) f *= load(c.silu + d);
        product += load(dmean + d, lanes) * (f - mean);
      });
      const T slope = lane_sum<T>(product) / p.channels * inverse * inverse;
      S* dy = p.dy + row * p.channels;
      for_channels<T>(p.channels, [&](int64_t d, int lanes) {
        const V<T> feature = load(y + d, lanes);
        const V<T> silu = p.z ? load(c.silu + d) : splat(T(1));
        const V<T> df = load(dout + d, lanes) * load(gate + d, lanes) +
                        (load(dmean + d, lanes) - c.offset[k] - (feature * silu - mean) * slope) * inverse;
        store(dy + d, df * silu, lanes);
        if (p.dz) store(c.row + d, load(c.row + d) + df * feature, kLanes<T>);
      });
    }
    if (!p.dz) continue;
    S* dz = p.dz + (batch * p.tokens + l) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      store(dz + d, load(c.row + d) * load(c.slope + d), lanes);
    });
  }
}

template <typename T>
void gate_product(const T* weight, const T* x, const T* bias, int64_t rows, int64_t columns, bool logistic, T* out) {
  side_by_side(rows, [&](int64_t row, auto count) __attribute__((always_inline)) {
    V<T> sums[count];
    for (int i = 0; i < count; ++i) sums[i] = V<T>{};
    for_channels<T>(columns, [&](int64_t d, int lanes) __attribute__((always_inline)) {
      const V<T> factor = load(x + d, lanes);
      for (int i = 0; i < count; ++i) sums[i] += load(weight + (row + i) * columns + d, lanes) * factor;
    });
    for (int i = 0; i < count; ++i) out[row + i] = lane_sum<T>(sums[i]) + bias[row + i];
  });
  if (!logistic) return;
  for_channels<T>(rows, [&](int64_t d, int lanes) {
    V<T> x[1] = {load(out + d, lanes)};
    sigmoid<T, 1>(x);
    store(out + d, x[0], lanes);
  });
}

}  // namespace
}  // namespace mmlocalmamba
