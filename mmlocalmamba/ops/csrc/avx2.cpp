#if defined(__x86_64__)
#include <immintrin.h>

#include "interface.h"
// Only what follows may use the wider registers; the rest of the library must run anywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma")
#endif
#define ISA kAvx2
#define ISA_NAME "avx2"
#define ISA_BYTES 32
#define ISA_PERMUTE
#define ISA_STATES 8
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
