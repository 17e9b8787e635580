#if defined(__x86_64__)
#include <immintrin.h>

#include "interface.h"
// Only what follows may use the wider registers; the rest of the library must run anywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define ISA kAvx512
#define ISA_NAME "avx512"
#define ISA_BYTES 64
#define ISA_PERMUTE
#define ISA_STATES 16
#define ISA_AVX512
#define ISA_SCALED kAvx512Scaled
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
