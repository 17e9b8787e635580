// What follows the scans of LocalVMamba, token by token: sum over directions, LayerNorm, and the gate silu(z).

namespace mmlocalmamba {
namespace {

template <typename T>
struct NormGateScratch {
  int64_t padded;          // channels, to whole vectors
  T *row, *slope;          // (count, D): features, and the gradient of the normalised ones
  T *dweight, *dbias;      // (D)

  NormGateScratch(Scratch& s, int64_t D)
      : padded((D + kLanes<T> - 1) / kLanes<T> * kLanes<T>), row(s.take<T>(kAlone * padded)),
        slope(s.take<T>(kAlone * padded)), dweight(s.take<T>(padded)), dbias(s.take<T>(padded)) {}
};

template <typename T>
int64_t norm_gate_scratch(int64_t channels) {
  Scratch scratch{nullptr};
  NormGateScratch<T> arrays(scratch, channels);
  return scratch.used;
}

// Sums over the directions of `count` tokens, normalised, into c.row.
template <typename S, int count, typename T = Compute<S>>
INLINE void norm_gate_open(const NormGateProblem<S>& p, int64_t batch, int64_t token, const NormGateScratch<T>& c,
                           T (&inverse)[count]) {
  const S* x = p.x + batch * p.x_strides.batch + token * p.x_strides.row;
  V<T> totals[count], squares[count];
  T mean[count];
  for (int i = 0; i < count; ++i) totals[i] = squares[i] = V<T>{};
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
    V<T> f[count];
    for (int i = 0; i < count; ++i) f[i] = load(x + i * p.x_strides.row + d, lanes);
    for (int64_t k = 1; k < p.directions; ++k) {
      for (int i = 0; i < count; ++i) f[i] += load(x + k * p.x_strides.direction + i * p.x_strides.row + d, lanes);
    }
    for (int i = 0; i < count; ++i) {
      store(c.row + i * c.padded + d, f[i]);
      totals[i] += f[i];
    }
  });
  for (int i = 0; i < count; ++i) mean[i] = lane_sum<T>(totals[i]) / p.channels;
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i) {
      V<T> f = load(c.row + i * c.padded + d) - mean[i];
      if (lanes < kLanes<T>) {
        for (int lane = lanes; lane < kLanes<T>; ++lane) f[lane] = 0;
      }
      store(c.row + i * c.padded + d, f);
      squares[i] += f * f;
    }
  });
  for (int i = 0; i < count; ++i) {
    inverse[i] = T(1) / __builtin_sqrt(lane_sum<T>(squares[i]) / p.channels + p.eps);
  }
}

template <typename S, int count, typename T = Compute<S>>
INLINE void norm_gate_tokens(const NormGateProblem<S>& p, int64_t batch, int64_t token, const NormGateScratch<T>& c) {
  T inverse[count];
  norm_gate_open<S, count>(p, batch, token, c, inverse);
  const S* z = p.z ? p.z + batch * p.z_strides.batch + token * p.z_strides.row : nullptr;
  S* out = p.out + (batch * p.tokens + token) * p.channels;
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
    const V<T> weight = load(p.weight + d, lanes), bias = load(p.bias + d, lanes);
    V<T> y[count], gate[count];
    for (int i = 0; i < count; ++i) y[i] = load(c.row + i * c.padded + d) * inverse[i] * weight + bias;
    if (z) {
      for (int i = 0; i < count; ++i) gate[i] = load(z + i * p.z_strides.row + d, lanes);
      silu<T, count>(gate, nullptr);
      for (int i = 0; i < count; ++i) y[i] *= gate[i];
    }
    for (int i = 0; i < count; ++i) store(out + i * p.channels + d, y[i], lanes);
  });
}

template <typename S, typename T = Compute<S>>
void norm_gate_forward(const NormGateProblem<S>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const NormGateScratch<T> c(scratch, p.channels);
  const TokenRange tokens(p.tokens, piece);
  int64_t l = tokens.begin;
  for (; l + kAlone <= tokens.end; l += kAlone) norm_gate_tokens<S, kAlone>(p, batch, l, c);
  for (; l < tokens.end; ++l) norm_gate_tokens<S, 1>(p, batch, l, c);
}

template <typename S, int count, typename T = Compute<S>>
INLINE void norm_gate_gradients(const NormGateProblem<S>& p, int64_t batch, int64_t token,
                                const NormGateScratch<T>& c) {
  T inverse[count], mean[count], product[count];
  norm_gate_open<S, count>(p, batch, token, c, inverse);
  const int64_t first = (batch * p.tokens + token) * p.channels;
  const S* z = p.z ? p.z + batch * p.z_strides.batch + token * p.z_strides.row : nullptr;
  const S* dout = p.dout + batch * p.dout_strides.batch + token * p.dout_strides.row;
  V<T> totals[count], products[count];
  for (int i = 0; i < count; ++i) totals[i] = products[i] = V<T>{};
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
    const V<T> weight = load(p.weight + d, lanes), bias = load(p.bias + d, lanes);
    V<T> df[count], gate[count] = {}, slopes[count] = {}, dweight{}, dbias{};
    for (int i = 0; i < count; ++i) df[i] = load(dout + i * p.dout_strides.row + d, lanes);
    if (z) {
      for (int i = 0; i < count; ++i) gate[i] = load(z + i * p.z_strides.row + d, lanes);
      silu<T, count>(gate, slopes);
    }
    for (int i = 0; i < count; ++i) {
      const V<T> f = load(c.row + i * c.padded + d) * inverse[i];
      if (p.dz) store(p.dz + first + i * p.channels + d, df[i] * slopes[i] * (f * weight + bias), lanes);
      if (z) df[i] *= gate[i];
      dbias += df[i];
      dweight += df[i] * f;
      const V<T> slope = df[i] * weight;
      totals[i] += slope;
      products[i] += slope * f;
      store(c.slope + i * c.padded + d, slope);
      store(c.row + i * c.padded + d, f);
    }
    store(c.dweight + d, load(c.dweight + d) + dweight);
    store(c.dbias + d, load(c.dbias + d) + dbias);
  });
  if (!p.dx) return;
  for (int i = 0; i < count; ++i) {
    mean[i] = lane_sum<T>(totals[i]) / p.channels;
    product[i] = lane_sum<T>(products[i]) / p.channels;
  }
  for_channels<T>(p.channels, [&](int64_t d, int lanes) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i) {
      const V<T> f = load(c.row + i * c.padded + d);
      const V<T> df = (load(c.slope + i * c.padded + d) - mean[i] - f * product[i]) * inverse[i];
      store(p.dx + first + i * p.channels + d, df, lanes);
    }
  });
}

template <typename S, typename T = Compute<S>>
void norm_gate_backward(const NormGateProblem<S>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const NormGateScratch<T> c(scratch, p.channels);
  const TokenRange tokens(p.tokens, piece);
  for (int64_t d = 0; d < c.padded; ++d) c.dweight[d] = c.dbias[d] = 0;
  int64_t l = tokens.begin;
  for (; l + kAlone <= tokens.end; l += kAlone) norm_gate_gradients<S, kAlone>(p, batch, l, c);
  for (; l < tokens.end; ++l) norm_gate_gradients<S, 1>(p, batch, l, c);
  if (!p.parts) return;
  T* part = p.parts + (piece * p.batch + batch) * 2 * p.channels;
  for_channels<T>(p.channels, [&](int64_t d, int lanes) {
    store(part + d, load(c.dweight + d), lanes);
    store(part + p.channels + d, load(c.dbias + d), lanes);
  });
}

}  // namespace
}  // namespace mmlocalmamba
