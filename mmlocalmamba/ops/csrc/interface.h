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

// Element strides of (batch, direction, row, channel); channels and states are contiguous unless said otherwise.
struct Strides {
  int64_t batch = 0, direction = 0, row = 0, channel = 1;

  // Rows are contiguous instead (mamba_ssm's layout): only where there is no table, so that rows are steps.
  bool columns() const { return channel != 1; }
};

// One scan of all directions; see directional_scan in ops/__init__.py for the meaning of the arrays. Row r of an array
// is a token, or a step if in_scan_order.
template <typename T>
struct ScanProblem {
  int64_t batch, directions, steps, rows, tokens, channels, states;
  int64_t dt_rank;        // of delta; 0: delta is given in full
  bool in_scan_order, softplus;
  const int32_t* table;  // (K, steps): token of each step or -1; null: step t is token t

  // Channels or rows of u, delta, y, dy, du and ddelta are contiguous.
  const T *u, *delta, *B, *C;  // delta: (B, K, rows, D), or (B, K, rows, dt_rank)
  Strides u_strides, delta_strides, B_strides, C_strides;
  int64_t B_state_stride, C_state_stride;
  const T *A;             // (K, D, N)
  const T *dt_weight;     // (K, D, dt_rank), with delta (B, K, rows, dt_rank)
  const T *D, *bias;      // (K, D) or null
  T *y;                   // (B, K, tokens, D)
  Strides y_strides;
  T *last;                // (B, K, N, D)
  T *checkpoints;         // (B, K, chunks - 1, N, D): states at the start of every chunk but the first; null: none

  // Backward only.
  const T *dy;
  Strides dy_strides;
  const T *dlast;         // (B, K, N, D) or null
  T *ddelta;              // (B, K, rows, D), also where delta is given by a factor; null: not wanted
  Strides ddelta_strides;
  T *dA;                  // (B, K, D, N), or null
  // Sums over directions, and over the items of a sequence: either in place, which needs the summands to be computed
  // one after the other, or as parts (B, K, rows, D) and (items, B, K, rows, N) to be summed later. Or null.
  T *du;
  Strides du_strides;     // its directions are 0 apart if in place
  bool du_in_parts;
  T *dB, *dC;
  bool dB_in_parts;
  T *dD, *dbias;          // (B, K, D)
};

// Channels of sequence (batch, direction) that one call works on: all blocks of one work item.
struct Item {
  int64_t batch, direction, index;
};

// The causal depthwise convolution along every scan, and SiLU: y[k, t] = silu(bias + sum_j weight[j] x[t - W + 1 + j]),
// where x[t] is the token that step t reads, zero for pads and before the first step.
template <typename T>
struct ConvProblem {
  int64_t batch, directions, steps, tokens, channels, width;
  const int32_t* table;   // (K, steps): token of each step or -1; null: step t is token t
  const T* x;             // (B, tokens, D), the same for all directions
  Strides x_strides;
  const T *weight, *bias; // (K, D, W), (K, D)
  T* y;                   // (K, B, steps, D)

  // Backward only. A work item's directions run one after the other: dx is summed in place.
  const T* dy;
  Strides dy_strides;
  T* dx;                  // (B, tokens, D), or null: not wanted
  T *dweight, *dbias;     // (B, K, D, W), (B, K, D), or both null
};

// Tokens that one work item of a sum of directions or of a norm handles.
constexpr int64_t kTokensPerItem = 64;

// Sum over directions of gated features: with f = y * silu(z), or y if there is no z,
//   statistics  mean over tokens of f normalised over channels, in parts (ranges of tokens, B, K, D)
//   forward     out = sum over k of f[k] * gate[k]
//   reduce      gradient of the gate, in parts (ranges of tokens, B, K, D)
//   backward    dy = (dout * gate[k] + gradient through the normalised mean) * silu(z), and dz
template <typename T>
struct SCAttnSumProblem {
  int64_t batch, directions, tokens, channels;
  T eps;
  const T* y;             // (B, K, tokens, D)
  const T* z;             // (B, tokens, D), channels contiguous, or null
  Strides z_strides;
  T *mean, *inverse;      // (B, K, tokens): mean and 1 / standard deviation over channels
  T* parts;
  const T* gate;          // (B, K, D)
  T* out;                 // (B, tokens, D)
  const T* dout;          // (B, tokens, D)
  const T* dmean;         // (B, K, D): gradient of the sum over tokens of the normalised features
  T *dy, *dz;             // dz may be null
};

// The residual stream between two blocks, token by token: sum = turn(x + residual), out = sum * weight / rms(sum).
// Neighbouring channels (a, b) are turned to (a cos - b sin, b cos + a sin).
template <typename T>
struct AddRMSNormProblem {
  int64_t batch, tokens, channels;
  T eps;
  const T *x, *residual;  // (B, tokens, D), channels contiguous; residual may be null
  Strides x_strides, residual_strides;
  const T *cosine, *sine; // (tokens, D), each value twice, or null: nothing is turned
  const T* weight;        // (D)
  T *sum, *out;           // (B, tokens, D)
};

template <typename T>
struct Kernels {
  struct {
    int64_t channels;  // per work item
    int64_t (*scratch)(int64_t states, int64_t dt_rank, bool backward);  // bytes, to be aligned to 64
    void (*forward)(const ScanProblem<T>&, Item, void* scratch);
    void (*backward)(const ScanProblem<T>&, Item, void* scratch);
  } scan;
  struct {
    int64_t channels;
    int64_t (*scratch)(int64_t width);
    void (*forward)(const ConvProblem<T>&, Item, void* scratch);
    void (*backward)(const ConvProblem<T>&, Item, void* scratch);
  } conv;
  struct {
    int64_t (*scratch)(int64_t directions, int64_t channels);
    // One batch item and piece of tokens.
    void (*statistics)(const SCAttnSumProblem<T>&, int64_t batch, int64_t piece, void* scratch);
    void (*forward)(const SCAttnSumProblem<T>&, int64_t batch, int64_t piece, void* scratch);
    void (*reduce)(const SCAttnSumProblem<T>&, int64_t batch, int64_t piece, void* scratch);
    void (*backward)(const SCAttnSumProblem<T>&, int64_t batch, int64_t piece, void* scratch);
    // out = act(weight (rows, columns) times x + bias), act being the identity or the logistic function.
    void (*product)(const T* weight, const T* x, const T* bias, int64_t rows, int64_t columns, bool logistic, T* out);
  } scattn_sum;
  void (*add_rms_norm)(const AddRMSNormProblem<T>&, int64_t batch, int64_t piece);
};

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

extern const InstructionSet kAvx512, kAvx2, kPortable;

}  // namespace mmlocalmamba
