// The depthwise 3x3 convolution of tokens on a grid with zeros around it, and SiLU. Channels are in vector lanes; what
// the taps of neighbouring outputs share is loaded once.

namespace mmlocalmamba {
namespace {

// Where the taps of a row of outputs read: the tokens of three rows, from one place before the first to one behind the
// last. Zeros outside of the grid.
template <typename S>
struct Conv2dRows {
  const S** from;  // (3, width + 2)
  S* zeros;        // (D)
  int64_t width;

  Conv2dRows(Scratch& s, int64_t width, int64_t D)
      : from(s.take<const S*>(3 * (width + 2))), zeros(s.take<S>(D)), width(width) {}

  void open(const S* image, int64_t stride, int64_t height, int64_t D, int64_t row) const {
    for (int64_t d = 0; d < D; ++d) zeros[d] = S{};
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t above = row + i - 1;
      for (int64_t w = -1; w <= width; ++w) {
        const bool inside = above >= 0 && above < height && w >= 0 && w < width;
        from[i * (width + 2) + w + 1] = inside ? image + (above * width + w) * stride : zeros;
      }
    }
  }
  const S* at(int64_t i, int64_t w) const { return from[i * (width + 2) + w]; }
};

template <typename S>
int64_t conv2d_scratch(int64_t width, int64_t channels) {
  Scratch scratch{nullptr};
  Conv2dRows<S> rows(scratch, width, channels);
  Conv2dRows<Compute<S>> wide(scratch, width, channels);
  return scratch.used;
}

// Calls f(first, count) for all places of a row, with a count that is a compile-time constant; some places may come twice.
template <typename Function>
INLINE void for_places(int64_t width, Function f) {
  if (width < kAlone) {
    for (int64_t w = 0; w < width; ++w) f(w, std::integral_constant<int, 1>());
    return;
  }
  for (int64_t w = 0; w < width; w += kAlone) {
    f(w + kAlone <= width ? w : width - kAlone, std::integral_constant<int, kAlone>());
  }
}

template <typename S, int count, typename T = Compute<S>>
INLINE void conv2d_at(const Conv2dRows<S>& rows, const T* taps, int64_t D, int64_t w, int64_t d, int lanes,
                      V<T> (&sums)[count]) {
#pragma GCC unroll 3
  for (int64_t i = 0; i < 3; ++i) {
    V<T> x[count + 2];
#pragma GCC unroll 8
    for (int t = 0; t < count + 2; ++t) x[t] = load(rows.at(i, w + t) + d, lanes);
#pragma GCC unroll 3
    for (int64_t j = 0; j < 3; ++j) {
      const V<T> tap = load(taps + (3 * i + j) * D + d, lanes);
#pragma GCC unroll 8
      for (int t = 0; t < count; ++t) sums[t] += tap * x[t + j];
    }
  }
}

// Calls f(w, d, lanes, count, sums) for all places of a row and all channels, with the convolution and `bias` (null: none).
template <typename S, typename Function, typename T = Compute<S>>
INLINE void conv2d_row(const Conv2dRows<S>& rows, const T* taps, const T* bias, int64_t width, int64_t D, Function f) {
  for_places(width, [&](int64_t w, auto count) __attribute__((always_inline)) {
    for_channels<T>(D, [&](int64_t d, int lanes) __attribute__((always_inline)) {
      const V<T> first = bias ? load(bias + d, lanes) : V<T>{};
      V<T> sums[count];
      for (int t = 0; t < count; ++t) sums[t] = first;
      conv2d_at<S, count>(rows, taps, D, w, d, lanes, sums);
      f(w, d, lanes, count, sums);
    });
  });
}

template <typename S, typename T = Compute<S>>
void conv2d_forward(const Conv2dProblem<S>& p, int64_t batch, int64_t row, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const int64_t D = p.channels;
  const Conv2dRows<S> rows(scratch, p.width, D);
  rows.open(p.x + batch * p.x_strides.batch, p.x_strides.row, p.height, D, row);
  S* y = p.y + (batch * p.height + row) * p.width * D;
  const auto finish = [&](int64_t w, int64_t d, int lanes, auto count, auto& sums) __attribute__((always_inline)) {
    silu<T, count>(sums, nullptr);
    for (int t = 0; t < count; ++t) store(y + (w + t) * D + d, sums[t], lanes);
  };
  conv2d_row<S>(rows, p.taps, p.bias, p.width, D, finish);
}

// The gradient before SiLU of a row, and the row's part of the gradients of taps and bias.
template <typename S, typename T = Compute<S>>
void conv2d_gradient(const Conv2dProblem<S>& p, int64_t batch, int64_t row, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const int64_t D = p.channels;
  const Conv2dRows<S> rows(scratch, p.width, D);
  rows.open(p.x + batch * p.x_strides.batch, p.x_strides.row, p.height, D, row);
  T* gradient = p.gradient + (batch * p.height + row) * p.width * D;
  const S* dy = p.dy + batch * p.dy_strides.batch + row * p.width * p.dy_strides.row;
  const auto finish = [&](int64_t w, int64_t d, int lanes, auto count, auto& sums) __attribute__((always_inline)) {
    V<T> slopes[count];
    silu<T, count>(sums, slopes);
    for (int t = 0; t < count; ++t) {
      store(gradient + (w + t) * D + d, load(dy + (w + t) * p.dy_strides.row + d, lanes) * slopes[t], lanes);
    }
  };
  conv2d_row<S>(rows, p.taps, p.bias, p.width, D, finish);
  if (!p.parts) return;
  T* part = p.parts + (batch * p.height + row) * 10 * D;
  for_channels<T>(D, [&](int64_t d, int lanes) __attribute__((always_inline)) {
    V<T> sums[9], bias{};
    for (int i = 0; i < 9; ++i) sums[i] = V<T>{};
    for (int64_t w = 0; w < p.width; ++w) {
      const V<T> g = load(gradient + w * D + d, lanes);
      bias += g;
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) sums[i] += g * load(rows.at(i / 3, w + i % 3) + d, lanes);
    }
    for (int i = 0; i < 9; ++i) store(part + i * D + d, sums[i], lanes);
    store(part + 9 * D + d, bias, lanes);
  });
}

// The gradient of a row of x: the convolution of the gradient with the taps in reverse order.
template <typename S, typename T = Compute<S>>
void conv2d_backward(const Conv2dProblem<S>& p, int64_t batch, int64_t row, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const int64_t D = p.channels;
  const Conv2dRows<T> rows(scratch, p.width, D);
  rows.open(p.gradient + batch * p.height * p.width * D, D, p.height, D, row);
  S* dx = p.dx + (batch * p.height + row) * p.width * D;
  const auto finish = [&](int64_t w, int64_t d, int lanes, auto count, auto& sums) __attribute__((always_inline)) {
    for (int t = 0; t < count; ++t) store(dx + (w + t) * D + d, sums[t], lanes);
  };
  conv2d_row<T>(rows, p.taps, static_cast<const T*>(nullptr), p.width, D, finish);
}

}  // namespace
}  // namespace mmlocalmamba
