// What is decided by the processor at run time, without PyTorch: its instruction sets, and denormal numbers.
#pragma once

#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "interface.h"

namespace mmlocalmamba {

// Returns the instruction sets that this machine has, the fastest first.
inline std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    // On Intel's processors one unit alone can look up a table, while scaling costs one operation; on AMD's the table
    // is quicker.
    sets.assign({&kAvx512, &kAvx512Scaled});
    if (__builtin_cpu_is("intel")) std::swap(sets[0], sets[1]);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kPortable);
  return sets;
}

// Decaying states become denormal numbers, which are a hundred times slower on some processors: they are zero here.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned int saved_;
#endif
};

}  // namespace mmlocalmamba
