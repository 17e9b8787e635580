// What the kernels (one translation unit per instruction set) and their caller share. Plain data only: a kernel's
// translation unit must not instantiate inline library code, or the linker could take its copy for older machines.
#pragma once

#include <cstdint>

namespace mmlocalmamba {

// Steps between two saved states. Their memory is states * steps / kChunk; the backward pass recomputes a chunk into
// buffers of kChunk steps, which must stay in cache.
constexpr int64_t kChunk = 32;
// Vectors of channels that one work item scans side by side, so that whole cache lines of u and delta are used and
// the rows of B and C are fetched once. A constant: sums over channels do not depend on the number of threads.
constexpr int64_t kBlocks = 4;

// Element strides of (batch, direction, row); channels and states are contiguous unless said otherwise.
struct Strides {
  int64_t batch = 0, direction = 0, row = 0;
};

// One scan of all directions; see directional_scan in ops/__init__.py for the meaning of the arrays. Row r of an array
// is a token, or a step if in_scan_order.
template <typename T>
struct Problem {
  int64_t batch, directions, steps, rows, tokens, channels, states;
  bool in_scan_order, softplus;
  const int32_t* table;  // (K, steps): token of each step or -1; null: step t is token t

  const T *u, *delta, *B, *C;
  Strides u_strides, delta_strides, B_strides, C_strides;
  int64_t B_state_stride, C_state_stride;
  const T *A;             // (K, D, N)
  const T *D, *bias;      // (K, D) or null
  T *y;                   // (B, K, tokens, D)
  T *last;                // (B, K, N, D)
  T *checkpoints;         // (B, K, chunks - 1, N, D): states at the start of every chunk but the first; null: none

  // Backward only.
  const T *dy;            // channels contiguous
  Strides dy_strides;
  const T *dlast;         // (B, K, N, D) or null
  T *ddelta;              // (B, K, rows, D)
  T *dA;                  // (B, K, D, N)
  // Sums over directions, and over the items of a sequence: either in place, which needs the summands to be computed
  // one after the other, or as parts (B, K, rows, D) and (items, B, K, rows, N) to be summed later.
  T *du;
  bool du_in_parts;
  T *dB, *dC;
  bool dB_in_parts;
  T *dD, *dbias;          // (B, K, D)
};

// Channels of sequence (batch, direction) that one call works on: all blocks of one work item.
struct Item {
  int64_t batch, direction, index;
};

template <typename T>
struct Kernel {
  int64_t channels;  // per work item
  int64_t (*scratch)(int64_t states, bool backward);  // bytes, to be aligned to 64
  void (*forward)(const Problem<T>&, Item, void* scratch);
  void (*backward)(const Problem<T>&, Item, void* scratch);
};

struct InstructionSet {
  const char* name;
  Kernel<float> f32;
  Kernel<double> f64;
};

extern const InstructionSet kAvx512, kAvx2, kPortable;

}  // namespace mmlocalmamba
