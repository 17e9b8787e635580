// Vectors of channels, elementary functions on them, and scratch memory, for the instruction set that kernels.h is
// included for. Everything has internal linkage and nothing from the standard library is called.
#include <type_traits>
#include <utility>

#include "interface.h"

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
INLINE T value(T x) {
  return x;
}

INLINE float value(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

template <typename T>
INLINE V<T> load(const T* from) {
  V<T> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

typedef uint16_t Halves __attribute__((vector_size(ISA_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(ISA_BYTES)));

INLINE V<float> load(const bfloat16* from) {
  Halves x;
  __builtin_memcpy(&x, from, sizeof x);
  return (V<float>)(__builtin_convertvector(x, Words) << 16);
}

template <typename T>
INLINE void store(T* to, V<T> x) {
  __builtin_memcpy(to, &x, sizeof x);
}

// To the nearest, ties to even, with integers: the same bits on every instruction set. NaN stays NaN.
INLINE void store(bfloat16* to, V<float> x) {
  const Words bits = (Words)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Halves y = __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Halves);
  __builtin_memcpy(to, &y, sizeof y);
}

// Whether some of the lanes are loaded as quickly as all.
#if defined(ISA_AVX512)
template <typename S>
constexpr bool kMasked = std::is_floating_point_v<S>;

INLINE V<float> masked(const float* from, int lanes) { return _mm512_maskz_loadu_ps((1u << lanes) - 1, from); }
INLINE V<double> masked(const double* from, int lanes) { return _mm512_maskz_loadu_pd((1u << lanes) - 1, from); }
#elif defined(ISA_PERMUTE)
template <typename S>
constexpr bool kMasked = std::is_floating_point_v<S>;
constexpr int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

INLINE __m256i mask(int count) {
  __m256i mask;
  __builtin_memcpy(&mask, kMasks + 8 - count, sizeof mask);
  return mask;
}
INLINE V<float> masked(const float* from, int lanes) { return _mm256_maskload_ps(from, mask(lanes)); }
INLINE V<double> masked(const double* from, int lanes) { return _mm256_maskload_pd(from, mask(2 * lanes)); }
#else
template <typename S>
constexpr bool kMasked = false;
#endif

// The last channels may not fill a vector: the other lanes read zero and are not written.
template <typename S, typename T = Compute<S>>
INLINE V<T> load(const S* from, int lanes) {
  if (__builtin_expect(lanes == kLanes<T>, 1)) return load(from);
  if constexpr (kMasked<S>) return masked(from, lanes);
  V<T> x{};
  for (int i = 0; i < lanes; ++i) x[i] = value(from[i]);
  return x;
}

template <typename S, typename T = Compute<S>>
INLINE void store(S* to, V<T> x, int lanes) {
  if (__builtin_expect(lanes == kLanes<T>, 1)) {
    store(to, x);
  } else {
    S all[kLanes<T>];
    store(all, x);
    for (int i = 0; i < lanes; ++i) to[i] = all[i];
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
  // 2^r - 1 on [-1/2, 1/2] divided by r, highest power first; relative error of 2^r 2e-9.
  static constexpr float exp2[] = {1.53533619e-4f, 1.33988744e-3f, 9.61843736e-3f,
                                   5.55033247e-2f, 2.40226479e-1f, 6.93147203e-1f};
  // log(1 + z) / z on [0, 1], highest power first; relative error 5e-9.
  static constexpr float log1p[] = {-0.00317605702f, 0.0195425273f, -0.0563736128f, 0.105436238f,
                                    -0.152696671f, 0.196632743f, -0.249516163f, 0.333297105f,
                                    -0.499998926f, 1.f};
};
template <>
struct Constants<double> {
  static constexpr int mantissa = 52;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2 = 0.6931471805599453;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744. + 1023.;
  static constexpr double lowest = -1022., highest = 1023.;
  static constexpr double exp2[] = {
      1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10,   7.054911620801121e-09,
      1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606,
      0.0013333558146428441,  0.009618129107628477,   0.055504108664821576,   0.2402265069591007,
      0.6931471805599453};
  static constexpr double log1p[] = {
      -1.6020216725538193e-5, 0.00019330794553431146, -0.0011093809681700343, 0.004047809893467512,
      -0.01061469636358553, 0.021511022653356974, -0.035530525401441245, 0.05007742395391704,
      -0.062887546707831463, 0.073290152555349544, -0.08207163680437429, 0.090555675155907331,
      -0.099921278217600168, 0.11109740896460193, -0.12499817769513954, 0.1428569630956731,
      -0.16666665403691092, 0.19999999940349815, -0.24999999998264811, 0.33333333333306461,
      -0.49999999999999834, 1.};
};

#if defined(__clang__)
#define SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, Bits<T>{__VA_ARGS__})
#endif

// Polynomials without their constant term, divided by the argument, of several vectors together: the chain of one is so
// long that the instructions that wait for it would fill the processor's queues.
template <typename T, int count, int terms>
INLINE void polynomials(const V<T> (&x)[count], const T (&coefficients)[terms], V<T> (&p)[count]) {
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) p[i] = splat(coefficients[0]);
#pragma GCC unroll 32
  for (int k = 1; k < terms; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) p[i] = p[i] * x[i] + coefficients[k];
  }
}

template <typename T, int count>
INLINE void fraction_exp2(V<T> (&r)[count]) {
  V<T> p[count];
  polynomials<T>(r, Constants<T>::exp2, p);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) r[i] = p[i] * r[i] + T(1);
}

#ifdef ISA_AVX512
INLINE V<float> nearest(V<float> x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V<double> nearest(V<double> x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V<float> scale(V<float> x, V<float> n) { return _mm512_scalef_ps(x, n); }
INLINE V<double> scale(V<double> x, V<double> n) { return _mm512_scalef_pd(x, n); }

// In place.
template <typename T, int count>
INLINE void exp2(V<T> (&x)[count]) {
  V<T> n[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) n[i] = nearest(x[i]);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] -= n[i];
  fraction_exp2<T, count>(x);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] = scale(x[i], n[i]);
}

template <typename T, int count>
INLINE void exp(V<T> (&x)[count]) {
  V<T> n[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) n[i] = nearest(x[i] * Constants<T>::log2e);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) {
    x[i] = ((x[i] - n[i] * Constants<T>::ln2_high) - n[i] * Constants<T>::ln2_low) * Constants<T>::log2e;
  }
  fraction_exp2<T, count>(x);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] = scale(x[i], n[i]);
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

// In place.
template <typename T, int count>
INLINE void exp2(V<T> (&x)[count]) {
  V<T> rounded[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) {
    x[i] = clamp<T>(x[i]);
    rounded[i] = x[i] + Constants<T>::round;
    x[i] -= rounded[i] - Constants<T>::round;
  }
  fraction_exp2<T, count>(x);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] *= power<T>(rounded[i]);
}

#endif

// Ways to compute 2^x: for all x; for |x| <= kNear; for all x, with other instructions.
enum class Exp2 { any, near, scaled };

// Exp2::near, also for NaN, is by a table: 2^x = 2^n 2^r, where n is a multiple of 1/lanes. The fraction of n is
// looked up among the lanes of a register, and r is so small that three terms do. This takes half the multiplications,
// of which a processor does fewest at a time. The error is at most one unit in the last place,
// and 0 at 0: a state that hardly decays is kept.
constexpr float kNear = 125;

#ifdef ISA_PERMUTE
template <typename T>
constexpr bool kHasTable = sizeof(T) == 4;

constexpr int kTableBits = kLanes<float> == 16 ? 4 : 3;
// Adding this rounds to n, and leaves n * lanes in the lowest bits.
constexpr float kTableRound = float(3 << (22 - kTableBits));
// Bits of 2^(i / lanes), less those of i where n's will be added to the exponent. And 2^r - 1 divided by r, highest power
// first; relative error of 2^r 2e-9 with 16 lanes, 3e-8 with 8.
#if ISA_BYTES == 64
constexpr int32_t kTable[] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
constexpr float kTableTerms[] = {0.055502140f, 0.24023429f, 0.69314718f};
#else
constexpr int32_t kTable[] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
constexpr float kTableTerms[] = {0.055496220f, 0.24025763f, 0.69314721f};
#endif

INLINE V<float> table_power(V<float> rounded) {
  Bits<float> table;
  __builtin_memcpy(&table, kTable, sizeof table);
  const Bits<float> steps = (Bits<float>)rounded;
#if ISA_BYTES == 64
  const Bits<float> entry = (Bits<float>)_mm512_permutexvar_epi32((__m512i)steps, (__m512i)table);
#else
  const Bits<float> entry = (Bits<float>)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)steps);
#endif
  return (V<float>)(entry + (steps << (23 - kTableBits)));
}

// 2^n 2^r, or 2^n e^r with the terms of e^r, in place of r; `rounded` holds n.
template <int count>
INLINE void table_exp2(V<float> (&r)[count], const V<float> (&rounded)[count], const float (&terms)[3] = kTableTerms) {
  V<float> power[count], p[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) p[i] = r[i] * terms[0] + terms[1];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) p[i] = p[i] * r[i] + terms[2];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) power[i] = table_power(rounded[i]);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) r[i] = power[i] * (p[i] * r[i]) + power[i];
}

#ifdef ISA_AVX512
// 2^r on [0, 1], highest power first; relative error 3e-9, and none at both ends: a state that hardly decays is kept.
// One power fewer has an error of 1e-7, which is too much for the last states of scans.
constexpr float kScaledTerms[] = {2.17049863e-4f, 1.24399515e-3f, 9.67868418e-3f, 5.54835238e-2f,
                                  2.40229741e-1f, 6.93147004e-1f, 1.f};

// r is what remains of x beyond the integer below, which is also what the scaling takes of x. In place.
template <int count>
INLINE void scaled_exp2(V<float> (&x)[count]) {
  V<float> r[count], p[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) r[i] = _mm512_reduce_ps(x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  polynomials<float>(r, kScaledTerms, p);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] = scale(p[i], x[i]);
}
#endif

// In place.
template <typename T, int count, Exp2 way>
INLINE void exp2(V<T> (&x)[count]) {
  if constexpr (way == Exp2::near) {
    V<T> rounded[count];
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) rounded[i] = x[i] + kTableRound;
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) x[i] -= rounded[i] - kTableRound;
    table_exp2<count>(x, rounded);
#ifdef ISA_AVX512
  } else if constexpr (way == Exp2::scaled) {
    scaled_exp2<count>(x);
#endif
  } else {
    exp2<T, count>(x);
  }
}

#else
template <typename T>
constexpr bool kHasTable = false;

template <typename T, int count, Exp2 way>
INLINE void exp2(V<T> (&x)[count]) {
  exp2<T, count>(x);
}
#endif

#ifndef ISA_AVX512
// Two ways to split an exponent into n + r and to compute 2^n e^r.
template <typename T>
struct Fraction {
  static constexpr T round = Constants<T>::round;

  template <int count>
  static INLINE void exp(V<T> (&r)[count], const V<T> (&rounded)[count]) {
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) r[i] *= Constants<T>::log2e;
    fraction_exp2<T, count>(r);
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) r[i] *= power<T>(rounded[i]);
  }
};
#ifdef ISA_PERMUTE
template <>
struct Fraction<float> {
  static constexpr float round = kTableRound;
  // Those of the table, divided by powers of ln 2.
  static constexpr float terms[] = {0.16664228f, 0.50006729f, 1.f};

  template <int count>
  static INLINE void exp(V<float> (&r)[count], const V<float> (&rounded)[count]) {
    table_exp2<count>(r, rounded, terms);
  }
};
#endif

// Where the result is a normal number or NaN. In place. The part of the logarithm of 2 that is subtracted first has so
// few digits that its product with n is exact.
template <typename T, int count>
INLINE void exp(V<T> (&x)[count]) {
  V<T> rounded[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) {
    rounded[i] = x[i] * Constants<T>::log2e + Fraction<T>::round;
    const V<T> n = rounded[i] - Fraction<T>::round;
    x[i] = (x[i] - n * Constants<T>::ln2_high) - n * Constants<T>::ln2_low;
  }
  Fraction<T>::template exp<count>(x, rounded);
}
#endif

// Vectors to compute together in a loop that has many other values in registers, and in one that has few.
constexpr int kSideBySide = ISA_BYTES == 64 ? 4 : 2;
constexpr int kAlone = 4;

// The larger of both; y where one is NaN. The compiler makes two instructions of a comparison with a constant.
template <typename T>
INLINE V<T> larger(V<T> x, V<T> y) {
#if defined(ISA_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_max_ps(x, y);
  if constexpr (sizeof(T) == 8) return _mm512_max_pd(x, y);
#elif defined(ISA_PERMUTE)
  if constexpr (sizeof(T) == 4) return _mm256_max_ps(x, y);
  if constexpr (sizeof(T) == 8) return _mm256_max_pd(x, y);
#endif
  return x > y ? x : y;
}

template <typename T>
INLINE V<T> magnitude(V<T> x) {
  return (V<T>)((Bits<T>)x & (Bits<T>)~(Bits<T>)splat(T(-0.)));
}

// log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which keeps its digits everywhere; as in torch and mamba_ssm the
// identity beyond 20, where float cannot tell them apart. In place; `derivative`: null, or an array as long.
template <typename T, int count>
INLINE void softplus(V<T> (&x)[count], V<T>* derivative) {
  constexpr bool distinct = sizeof(T) > 4;
  const V<T> zero{}, one = splat(T(1)), limit = splat(T(20)), least = splat(Constants<T>::lowest * Constants<T>::ln2);
  V<T> z[count], p[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) z[i] = larger<T>(least, -magnitude<T>(x[i]));
  exp<T, count>(z);
  polynomials<T>(z, Constants<T>::log1p, p);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) {
    const auto large = x[i] > limit;
    if (derivative) {
      const V<T> inverse = one / (z[i] + one), slope = x[i] > zero ? inverse : z[i] * inverse;
      derivative[i] = distinct ? (large ? one : slope) : slope;
    }
    const V<T> y = larger<T>(x[i], zero) + z[i] * p[i];
    x[i] = distinct ? (large ? x[i] : y) : y;
  }
}

// Keeps exp finite; the logistic function is 0 or 1 there already.
template <typename T>
INLINE V<T> bounded(V<T> x) {
  const V<T> limit = splat(Constants<T>::highest * Constants<T>::ln2 - 1);
  x = x < -limit ? -limit : x;
  return x > limit ? limit : x;
}

// In place.
template <typename T, int count>
INLINE void sigmoid(V<T> (&x)[count]) {
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] = -bounded<T>(x[i]);
  exp<T, count>(x);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) x[i] = T(1) / (x[i] + T(1));
}

// x / (1 + exp(-x)), in place, and its derivative: null, or an array as long.
template <typename T, int count>
INLINE void silu(V<T> (&x)[count], V<T>* derivative) {
  V<T> y[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) y[i] = x[i];
  sigmoid<T, count>(y);
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) {
    const V<T> near = bounded<T>(x[i]);
    if (derivative) derivative[i] = y[i] + near * y[i] * (T(1) - y[i]);
    x[i] = (x[i] < near ? near : x[i]) * y[i];
  }
}

// Calls f(first, count) for `total` consecutive vectors, with a count that is a compile-time constant.
template <typename Function>
INLINE void side_by_side(int64_t total, Function f) {
  int64_t i = 0;
  for (; i + kAlone <= total; i += kAlone) f(i, std::integral_constant<int, kAlone>());
  for (; i < total; ++i) f(i, std::integral_constant<int, 1>());
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

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

// ---------------------------------------------------------------------------------------------------------------------
// Items of work

// The channels of one item.
template <typename T>
struct Channels {
  int64_t first, blocks, total;

  Channels(int64_t channels, Item item) : first(item.index * kBlocks * kLanes<T>), total(channels) {
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

#define PREFETCH(array, row, stride, for_writing) \
  if ((row) >= 0) __builtin_prefetch((array) + (row) * (stride), for_writing)

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

// Tokens of one work item.
struct TokenRange {
  int64_t begin, end;

  TokenRange(int64_t tokens, int64_t piece) : begin(piece * kTokensPerItem), end(begin + kTokensPerItem) {
    end = end < tokens ? end : tokens;
  }
};

}  // namespace
}  // namespace mmlocalmamba
