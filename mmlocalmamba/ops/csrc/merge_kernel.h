// The sum over directions of features that are gated per direction and channel, token by token; the gate; RMSNorm.

namespace mmlocalmamba {
namespace {

template <typename T>
INLINE T lane_sum(V<T> x) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}

// Calls f(channel, lanes) for every vector of channels.
template <typename T, typename Function>
INLINE void for_channels(int64_t channels, Function f) {
  int64_t d = 0;
  for (; d + kLanes<T> <= channels; d += kLanes<T>) f(d, kLanes<T>);
  if (d < channels) f(d, int(channels - d));
}

template <typename T>
struct MergeScratch {
  int64_t padded;  // channels, to whole vectors
  T *silu, *slope; // silu(z) of a token and its derivative
  T *row, *sum;    // (D), (K, D)
  T* offset;       // (K): mean over channels of dmean

  MergeScratch(Scratch& s, int64_t K, int64_t D)
      : padded((D + kLanes<T> - 1) / kLanes<T> * kLanes<T>), silu(s.take<T>(padded)), slope(s.take<T>(padded)),
        row(s.take<T>(padded)), sum(s.take<T>(K * padded)), offset(s.take<T>(K)) {}
};

template <typename T>
int64_t merge_scratch(int64_t directions, int64_t channels) {
  Scratch scratch{nullptr};
  MergeScratch<T> arrays(scratch, directions, channels);
  return scratch.used;
}

// silu(z) of a token, if there is z; and its derivative.
template <typename T>
INLINE void merge_open(const MergeProblem<T>& p, int64_t batch, int64_t token, const MergeScratch<T>& c, bool slope) {
  if (!p.z) return;
  const T* z = p.z + batch * p.z_strides.batch + token * p.z_strides.row;
  for_channels<T>(p.channels, [&](int64_t d, int lanes) {
    V<T> derivative;
    store(c.silu + d, silu<T>(load(z + d, lanes), &derivative), kLanes<T>);
    if (slope) store(c.slope + d, derivative, kLanes<T>);
  });
}

struct Tokens {
  int64_t begin, end;

  Tokens(int64_t tokens, int64_t piece) : begin(piece * kPiece), end(begin + kPiece) {
    end = end < tokens ? end : tokens;
  }
};

template <typename T>
INLINE void merge_clear(const MergeProblem<T>& p, const MergeScratch<T>& c) {
  for (int64_t i = 0; i < p.directions * c.padded; ++i) c.sum[i] = 0;
}

template <typename T>
INLINE void merge_write_parts(const MergeProblem<T>& p, int64_t batch, int64_t piece, const MergeScratch<T>& c) {
  for (int64_t k = 0; k < p.directions; ++k) {
    T* to = p.parts + ((piece * p.batch + batch) * p.directions + k) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) { store(to + d, load(c.sum + k * c.padded + d), lanes); });
  }
}

template <typename T>
void merge_statistics(const MergeProblem<T>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const MergeScratch<T> c(scratch, p.directions, p.channels);
  const Tokens tokens(p.tokens, piece);
  merge_clear(p, c);
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    merge_open(p, batch, l, c, false);
    for (int64_t k = 0; k < p.directions; ++k) {
      const int64_t row = (batch * p.directions + k) * p.tokens + l;
      const T* y = p.y + row * p.channels;
      V<T> total{};
      for_channels<T>(p.channels, [&](int64_t d, int lanes) {
        V<T> f = load(y + d, lanes);
        if (p.z) f *= load(c.silu + d);
        store(c.row + d, f, kLanes<T>);
        total += f;
      });
      const T mean = lane_sum<T>(total) / p.channels;
      V<T> squares{};
      for_channels<T>(p.channels, [&](int64_t d, int lanes) {
        V<T> f = load(c.row + d, lanes) - mean;
        if (lanes < kLanes<T>) {
          for (int i = lanes; i < kLanes<T>; ++i) f[i] = 0;
        }
        store(c.row + d, f, kLanes<T>);
        squares += f * f;
      });
      const T inverse = T(1) / __builtin_sqrt(lane_sum<T>(squares) / p.channels + p.eps);
      T* sum = c.sum + k * c.padded;
      for_channels<T>(p.channels, [&](int64_t d, int) {
        store(sum + d, load(sum + d) + load(c.row + d) * inverse, kLanes<T>);
      });
      p.mean[row] = mean;
      p.inverse[row] = inverse;
    }
  }
  merge_write_parts(p, batch, piece, c);
}

template <typename T>
void merge_forward(const MergeProblem<T>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const MergeScratch<T> c(scratch, p.directions, p.channels);
  const Tokens tokens(p.tokens, piece);
  const int64_t step = p.tokens * p.channels;
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    merge_open(p, batch, l, c, false);
    const T* y = p.y + (batch * p.directions * p.tokens + l) * p.channels;
    const T* gate = p.gate + batch * p.directions * p.channels;
    T* out = p.out + (batch * p.tokens + l) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      V<T> sum{};
      for (int64_t k = 0; k < p.directions; ++k) {
        sum += load(y + k * step + d, lanes) * load(gate + k * p.channels + d, lanes);
      }
      store(out + d, p.z ? sum * load(c.silu + d) : sum, lanes);
    });
  }
}

template <typename T>
void merge_reduce(const MergeProblem<T>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const MergeScratch<T> c(scratch, p.directions, p.channels);
  const Tokens tokens(p.tokens, piece);
  const int64_t step = p.tokens * p.channels;
  merge_clear(p, c);
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    merge_open(p, batch, l, c, false);
    const T* y = p.y + (batch * p.directions * p.tokens + l) * p.channels;
    const T* dout = p.dout + (batch * p.tokens + l) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      V<T> gradient = load(dout + d, lanes);
      if (p.z) gradient *= load(c.silu + d);
      for (int64_t k = 0; k < p.directions; ++k) {
        T* sum = c.sum + k * c.padded + d;
        store(sum, load(sum) + gradient * load(y + k * step + d, lanes), kLanes<T>);
      }
    });
  }
  merge_write_parts(p, batch, piece, c);
}

template <typename T>
void merge_backward(const MergeProblem<T>& p, int64_t batch, int64_t piece, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const MergeScratch<T> c(scratch, p.directions, p.channels);
  const Tokens tokens(p.tokens, piece);
  const int64_t first = batch * p.directions;
  for (int64_t k = 0; k < p.directions; ++k) {
    V<T> total{};
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      total += load(p.dmean + (first + k) * p.channels + d, lanes);
    });
    c.offset[k] = lane_sum<T>(total) / p.channels;
  }
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    merge_open(p, batch, l, c, true);
    const T* dout = p.dout + (batch * p.tokens + l) * p.channels;
    for (int64_t i = 0; i < c.padded; ++i) c.row[i] = 0;  // gradient of silu(z)
    for (int64_t k = 0; k < p.directions; ++k) {
      const int64_t row = (first + k) * p.tokens + l;
      const T *y = p.y + row * p.channels, *dmean = p.dmean + (first + k) * p.channels;
      const T* gate = p.gate + (first + k) * p.channels;
      const T mean = p.mean[row], inverse = p.inverse[row];
      V<T> product{};
      for_channels<T>(p.channels, [&](int64_t d, int lanes) {
        V<T> f = load(y + d, lanes);
        if (p.z) f *= load(c.silu + d);
        product += load(dmean + d, lanes) * (f - mean);
      });
      const T slope = lane_sum<T>(product) / p.channels * inverse * inverse;
      T* dy = p.dy + row * p.channels;
      for_channels<T>(p.channels, [&](int64_t d, int lanes) {
        const V<T> feature = load(y + d, lanes);
        const V<T> silu = p.z ? load(c.silu + d) : splat(T(1));
        const V<T> df = load(dout + d, lanes) * load(gate + d, lanes) +
                        (load(dmean + d, lanes) - c.offset[k] - (feature * silu - mean) * slope) * inverse;
        store(dy + d, df * silu, lanes);
        if (p.z) store(c.row + d, load(c.row + d) + df * feature, kLanes<T>);
      });
    }
    if (!p.z) continue;
    T* dz = p.dz + (batch * p.tokens + l) * p.channels;
    for_channels<T>(p.channels, [&](int64_t d, int lanes) {
      store(dz + d, load(c.row + d) * load(c.slope + d), lanes);
    });
  }
}

template <typename T>
void merge_product(const T* weight, const T* x, const T* bias, int64_t rows, int64_t columns, bool logistic, T* out) {
  for (int64_t row = 0; row < rows; ++row) {
    V<T> sum{};
    for_channels<T>(columns, [&](int64_t d, int lanes) {
      sum += load(weight + row * columns + d, lanes) * load(x + d, lanes);
    });
    out[row] = lane_sum<T>(sum) + bias[row];
  }
  if (!logistic) return;
  for_channels<T>(rows, [&](int64_t d, int lanes) { store(out + d, sigmoid<T>(load(out + d, lanes)), lanes); });
}

template <typename T>
void norm(const NormProblem<T>& p, int64_t batch, int64_t piece) {
  const Tokens tokens(p.tokens, piece);
  const int64_t D = p.channels;
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    const T* x = p.x + batch * p.x_strides.batch + l * p.x_strides.row;
    T* sum = p.sum + (batch * p.tokens + l) * D;
    T* out = p.out + (batch * p.tokens + l) * D;
    if (p.residual) {
      const T* residual = p.residual + batch * p.residual_strides.batch + l * p.residual_strides.row;
      for_channels<T>(D, [&](int64_t d, int lanes) { store(sum + d, load(x + d, lanes) + load(residual + d, lanes), lanes); });
    } else {
      for_channels<T>(D, [&](int64_t d, int lanes) { store(sum + d, load(x + d, lanes), lanes); });
    }
    if (p.cosine) {
      const T *cosine = p.cosine + l * D, *sine = p.sine + l * D;
      for (int64_t d = 0; d < D; d += 2) {
        const T a = sum[d], b = sum[d + 1];
        sum[d] = a * cosine[d] - b * sine[d];
        sum[d + 1] = b * cosine[d + 1] + a * sine[d + 1];
      }
    }
    V<T> squares{};
    for_channels<T>(D, [&](int64_t d, int lanes) {
      const V<T> f = load(sum + d, lanes);
      squares += f * f;
    });
    const T inverse = T(1) / __builtin_sqrt(lane_sum<T>(squares) / D + p.eps);
    for_channels<T>(D, [&](int64_t d, int lanes) {
      store(out + d, load(sum + d, lanes) * load(p.weight + d, lanes) * inverse, lanes);
    });
  }
}

}  // namespace
}  // namespace mmlocalmamba
