// The kernels for AVX-512 without AVX-512: the intrinsics that they use, lane by lane, after Intel's manual.
//
// A library of this, loaded before the extension, takes the place of two of its instruction sets, which any x86-64
// machine with AVX2 can run: see test_cpu.py.
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef int32_t Int32s __attribute__((vector_size(64)));

enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_TO_NEG_INF = 1, _MM_FROUND_NO_EXC = 8 };

namespace {

template <typename V, typename Function>
V each_lane(V x, Function f) {
  for (unsigned i = 0; i < sizeof(V) / sizeof x[0]; ++i) x[i] = f(x[i], i);
  return x;
}

template <typename T>
T rounded(T x, int mode) {
  return mode & 1 ? std::floor(x) : std::nearbyint(x);
}

template <typename T>
T scaled(T x, T power) {
  if (std::isnan(power)) return power;
  return std::ldexp(x, int(std::fmax(std::fmin(std::floor(power), T(5000)), T(-5000))));
}

template <typename V, typename T>
V masked(unsigned mask, const T* from) {
  return each_lane(V{}, [&](T, unsigned i) { return mask >> i & 1 ? from[i] : T(0); });
}

template <typename T, typename V>
T sum(V x) {
  for (unsigned half = sizeof(V) / sizeof(T) / 2; half; half /= 2) {
    for (unsigned i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

__m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
__m512d _mm512_max_pd(__m512d a, __m512d b) { return a > b ? a : b; }
__m512 _mm512_maskz_loadu_ps(unsigned mask, const float* from) { return masked<__m512>(mask, from); }
__m512d _mm512_maskz_loadu_pd(unsigned mask, const double* from) { return masked<__m512d>(mask, from); }
float _mm512_reduce_add_ps(__m512 x) { return sum<float>(x); }
double _mm512_reduce_add_pd(__m512d x) { return sum<double>(x); }

__m512 _mm512_roundscale_ps(__m512 x, int mode) {
  return each_lane(x, [&](float lane, unsigned) { return rounded(lane, mode); });
}
__m512d _mm512_roundscale_pd(__m512d x, int mode) {
  return each_lane(x, [&](double lane, unsigned) { return rounded(lane, mode); });
}
__m512 _mm512_reduce_ps(__m512 x, int mode) {
  return each_lane(x, [&](float lane, unsigned) { return std::isinf(lane) ? 0 : lane - rounded(lane, mode); });
}
__m512 _mm512_scalef_ps(__m512 x, __m512 power) {
  return each_lane(x, [&](float lane, unsigned i) { return scaled(lane, power[i]); });
}
__m512d _mm512_scalef_pd(__m512d x, __m512d power) {
  return each_lane(x, [&](double lane, unsigned i) { return scaled(lane, power[i]); });
}
__m512i _mm512_permutexvar_epi32(__m512i index, __m512i x) {
  const Int32s lanes = (Int32s)x, from = (Int32s)index;
  return (__m512i)each_lane(from, [&](int32_t lane, unsigned) { return lanes[lane & 15]; });
}

}  // namespace

#define ISA kPortable
#define ISA_NAME "avx512_emulated"
#define ISA_BYTES 64
#define ISA_PERMUTE
#define ISA_STATES 16
#define ISA_AVX512
#define ISA_SCALED kAvx2
#include "kernels.h"
