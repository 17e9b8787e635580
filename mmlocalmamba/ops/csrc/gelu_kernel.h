// GELU, x times the normal distribution function of x, and its gradient.

namespace mmlocalmamba {
namespace {

// erf(x / sqrt(2)) = x P(x^2) / Q(x^2), highest power first; absolute error 8e-9, beyond `last` (where it is 1) 1.2e-7.
template <typename T>
struct NormalTerms {
  static constexpr T last = T(5.3);
  static constexpr T p[] = {T(4.8101084099216326e-8), T(1.2758018132263905e-5), T(3.206591959645438e-4),
                            T(9.255927429797946e-3), T(6.587064350608533e-2), T(7.978845082456517e-1)};
  static constexpr T q[] = {T(1.2371714765126136e-6), T(7.135064967414464e-5), T(1.8365440284855948e-3),
                            T(2.8138555872184178e-2), T(2.4922283819030422e-1), T(1)};
};

// The distribution function of x. NaN stays NaN.
template <typename T, int count>
INLINE void normal(const V<T> (&x)[count], V<T> (&y)[count]) {
  constexpr T last = NormalTerms<T>::last;
  V<T> square[count], p[count], q[count];
  for (int i = 0; i < count; ++i) {
    y[i] = x[i] < -last ? splat(-last) : x[i];
    y[i] = y[i] > last ? splat(last) : y[i];
    square[i] = y[i] * y[i];
  }
  polynomials<T>(square, NormalTerms<T>::p, p);
  polynomials<T>(square, NormalTerms<T>::q, q);
  for (int i = 0; i < count; ++i) {
    y[i] = T(0.5) + T(0.5) * y[i] * p[i] / q[i];
    y[i] = x[i] < -last ? V<T>{} : y[i];
    y[i] = x[i] > last ? splat(T(1)) : y[i];
  }
}

// `to` may be `from`.
template <typename S, typename T = Compute<S>>
void gelu(const S* from, int64_t count, S* to) {
  const auto some = [&](int64_t first, auto vectors, int lanes) __attribute__((always_inline)) {
    V<T> x[vectors], y[vectors];
    for (int i = 0; i < vectors; ++i) x[i] = load(from + first + i * kLanes<T>, lanes);
    normal<T, vectors>(x, y);
    for (int i = 0; i < vectors; ++i) store(to + first + i * kLanes<T>, x[i] * y[i], lanes);
  };
  constexpr int64_t two = 2 * kLanes<T>;
  int64_t first = 0;
  for (; first + two <= count; first += two) some(first, std::integral_constant<int, 2>(), kLanes<T>);
  for (; first < count; first += kLanes<T>) {
    const int64_t left = count - first;
    some(first, std::integral_constant<int, 1>(), left < kLanes<T> ? int(left) : kLanes<T>);
  }
}

template <typename S, typename T = Compute<S>>
void gelu_backward(const S* dy, const S* from, int64_t count, S* dx) {
  for_channels<T>(count, [&](int64_t first, int lanes) __attribute__((always_inline)) {
    V<T> x[1] = {load(from + first, lanes)}, y[1], density[1] = {bounded<T>(x[0] * x[0] * T(-0.5))};
    normal<T, 1>(x, y);
    exp<T, 1>(density);
    const V<T> slope = density[0] * x[0] * T(0.3989422804014327) + y[0];
    store(dx + first, load(dy + first, lanes) * slope, lanes);
  });
}

}  // namespace
}  // namespace mmlocalmamba
