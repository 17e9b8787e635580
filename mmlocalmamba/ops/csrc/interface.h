// The interface of the kernels (one translation unit per instruction set) and their caller. Plain data only: a kernel's
// translation unit must not instantiate inline library code, or the linker could take its copy for older machines.
#pragma once

#include <cstdint>

namespace mmlocalmamba {

// Steps between two saved states. Their memory is states * steps / kChunk; the backward pass recomputes a chunk into
// buffers of kChunk steps, which must stay in cache.
constexpr int64_t kChunk = 32;
// Vectors of channels that one work item scans together, so that whole cache lines of u and delta are used and
// the rows of B and C are fetched once. A constant: sums over channels do not depend on the number of threads.
constexpr int64_t kBlocks = 4;

// Storage in 16 bits: the upper half of a float.
struct bfloat16 {
  uint16_t bits;
};

// The type of the computation where tokens are stored as S: that of parameters, states, sums over more than one step
// and the kernels' own memory. Tokens, and gradients of tokens that are written once, have the type S.
template <typename S>
struct ComputeType {
  using type = S;
};
template <>
struct ComputeType<bfloat16> {
  using type = float;
};
template <typename S>
using Compute = typename ComputeType<S>::type;

// Element strides of (batch, direction, row, channel); channels and states are contiguous unless said otherwise.
struct Strides {
  int64_t batch = 0, direction = 0, row = 0, channel = 1;

  // Rows are contiguous instead (mamba_ssm's layout): only where there is no table, so that rows are steps.
  bool columns() const { return channel != 1; }
};

// One scan of all directions; see directional_scan in ops/__init__.py for the meaning of the arrays. Row r of an array
// is a token, or a step if in_scan_order.
template <typename S, typename T = Compute<S>>
struct ScanProblem {
  int64_t batch, directions, steps, rows, tokens, channels, states;
  int64_t dt_rank;        // of delta; 0: delta is given in full
  bool in_scan_order, softplus;
  const int32_t* table;  // (K, steps): token of each step or -1; null: step t is token t

  // Channels or rows of u, delta, y, dy, du and ddelta are contiguous.
  const S *u, *delta, *B, *C;  // delta: (B, K, rows, D), or (B, K, rows, dt_rank)
  Strides u_strides, delta_strides, B_strides, C_strides;
  int64_t B_state_stride, C_state_stride;
  const T *A;             // (K, D, N)
  const T *dt_weight;     // (K, D, dt_rank), with delta (B, K, rows, dt_rank)
  const T *D, *bias;      // (K, D) or null
  S *y;                   // (B, K, tokens, D)
  Strides y_strides;
  T *last;                // (B, K, N, D)
  T *checkpoints;         // (B, K, chunks - 1, N, D): states at the start of every chunk but the first; null: none

  // Backward only.
  const S *dy;
  Strides dy_strides;
  const T *dlast;         // (B, K, N, D) or null
  S *ddelta;              // (B, K, rows, D), if delta is given in full; null: not wanted
  T *dproduct;            // the same if delta is a product: the factors' gradients are products of this; or null
  Strides ddelta_strides; // of ddelta or dproduct
  T *dA;                  // (B, K, D, N), or null
  S *du;                  // (B, K, rows, D), if each direction has its own u, or null
  // Sums over directions, and over the items of a sequence: either in place, which needs the summands to be computed
  // one after the other, or as parts (B, K, rows, D) and (items, B, K, rows, N) to be summed later. Or null.
  T *du_sum;
  Strides du_strides;     // of du or du_sum, whose directions are 0 apart if in place
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
template <typename S, typename T = Compute<S>>
struct ConvProblem {
  int64_t batch, directions, steps, tokens, channels, width;
  const int32_t* table;   // (K, steps): token of each step or -1; null: step t is token t
  const S* x;             // (B, tokens, D), the same for all directions
  Strides x_strides;
  const T *weight, *bias; // (K, D, W), (K, D)
  S* y;                   // (K, B, steps, D)

  // Backward only. A work item's directions run one after the other: dx is summed in place.
  const S* dy;
  Strides dy_strides;
  T* dx;                  // (B, tokens, D), or null: not wanted
  T *dweight, *dbias;     // (B, K, D, W), (B, K, D), or both null
};

// The depthwise 3x3 convolution of tokens on a grid, zeros around it, and SiLU. A work item is a row of the grid.
template <typename S, typename T = Compute<S>>
struct Conv2dProblem {
  int64_t batch, height, width, channels;
  const S* x;              // (B, height * width, D)
  Strides x_strides;
  const T *taps, *bias;    // (9, D), (D) or null; to compute dx the taps in reverse order
  S* y;                    // (B, height * width, D)

  // Backward only.
  const S* dy;             // (B, height * width, D)
  Strides dy_strides;
  T* gradient;             // (B, height * width, D), before SiLU
  T* parts;                // (B, height, 10, D): gradients of the taps and the bias, or null
  S* dx;                   // (B, height * width, D)
};

// Tokens that one work item of a sum of directions or of a norm handles.
constexpr int64_t kTokensPerItem = 64;

// Sum over directions of gated features: with f = y * silu(z), or y if there is no z,
//   statistics  mean over tokens of f normalised over channels, in parts (ranges of tokens, B, K, D)
//   forward     out = sum over k of f[k] * gate[k]
//   reduce      gradient of the gate, in parts (ranges of tokens, B, K, D)
//   backward    dy = (dout * gate[k] + gradient through the normalised mean) * silu(z), and dz
template <typename S, typename T = Compute<S>>
struct SCAttnSumProblem {
  int64_t batch, directions, tokens, channels;
  T eps;
  const S* y;             // (B, K, tokens, D)
  const S* z;             // (B, tokens, D), channels contiguous, or null
  Strides z_strides;
  T *mean, *inverse;      // (B, K, tokens): mean and 1 / standard deviation over channels
  T* parts;
  const T* gate;          // (B, K, D)
  S* out;                 // (B, tokens, D)
  const S* dout;          // (B, tokens, D)
  const T* dmean;         // (B, K, D): gradient of the sum over tokens of the normalised features
  S *dy, *dz;             // dz may be null
};

// The residual stream between two blocks, token by token: sum = turn(x + residual), out = sum * weight / rms(sum).
// Neighbouring channels (a, b) are turned to (a cos - b sin, b cos + a sin). The stream, R, may be wider than the
// output of a block and the input of the next.
template <typename S, typename R, typename T = Compute<S>>
struct AddRMSNormProblem {
  int64_t batch, tokens, channels;
  T eps;
  const S *x;             // (B, tokens, D), channels contiguous
  const R *residual;      // the same, or null
  Strides x_strides, residual_strides;
  const T *cosine, *sine; // (tokens, D), each value twice, or null: nothing is turned
  const T* weight;        // (D)
  R *sum;                 // (B, tokens, D)
  S *out;                 // (B, tokens, D)
};

// out = norm(sum over directions of x) * silu(z), norm being a LayerNorm; or without z.
template <typename S, typename T = Compute<S>>
struct NormGateProblem {
  int64_t batch, directions, tokens, channels;
  T eps;
  const S *x, *z;          // (B, K, tokens, D), (B, tokens, D) or null, channels contiguous
  Strides x_strides, z_strides;
  const T *weight, *bias;  // (D)
  S* out;                  // (B, tokens, D)

  // Backward only.
  const S* dout;           // (B, tokens, D)
  Strides dout_strides;
  S *dx, *dz;              // (B, tokens, D), either may be null: not wanted
  T* parts;                // (ranges of tokens, B, 2, D): gradients of weight and bias, or null
};

template <typename S, typename T = Compute<S>>
struct Kernels {
  struct {
    int64_t channels;  // per work item
    int64_t (*scratch)(int64_t states, int64_t dt_rank, bool backward);  // bytes, to be aligned to 64
    void (*forward)(const ScanProblem<S>&, Item, void* scratch);
    void (*backward)(const ScanProblem<S>&, Item, void* scratch);
  } scan;
  struct {
    int64_t channels;
    int64_t (*scratch)(int64_t width);
    void (*forward)(const ConvProblem<S>&, Item, void* scratch);
    void (*backward)(const ConvProblem<S>&, Item, void* scratch);
  } conv;
  struct {
    int64_t (*scratch)(int64_t directions, int64_t channels);
    // One batch item and piece of tokens.
    void (*statistics)(const SCAttnSumProblem<S>&, int64_t batch, int64_t piece, void* scratch);
    void (*forward)(const SCAttnSumProblem<S>&, int64_t batch, int64_t piece, void* scratch);
    void (*reduce)(const SCAttnSumProblem<S>&, int64_t batch, int64_t piece, void* scratch);
    void (*backward)(const SCAttnSumProblem<S>&, int64_t batch, int64_t piece, void* scratch);
    // out = act(weight (rows, columns) times x + bias), act being the identity or the logistic function.
    void (*product)(const T* weight, const T* x, const T* bias, int64_t rows, int64_t columns, bool logistic, T* out);
  } scattn_sum;
  struct {
    int64_t (*scratch)(int64_t channels);
    // With the stream stored as S, and as T.
    void (*narrow)(const AddRMSNormProblem<S, S>&, int64_t batch, int64_t piece, void* scratch);
    void (*wide)(const AddRMSNormProblem<S, T>&, int64_t batch, int64_t piece, void* scratch);
  } add_rms_norm;
  struct {
    int64_t (*scratch)(int64_t width, int64_t channels);
    void (*forward)(const Conv2dProblem<S>&, int64_t batch, int64_t row, void* scratch);
    void (*gradient)(const Conv2dProblem<S>&, int64_t batch, int64_t row, void* scratch);
    void (*backward)(const Conv2dProblem<S>&, int64_t batch, int64_t row, void* scratch);
  } conv2d;
  struct {
    int64_t (*scratch)(int64_t channels);
    void (*forward)(const NormGateProblem<S>&, int64_t batch, int64_t piece, void* scratch);
    void (*backward)(const NormGateProblem<S>&, int64_t batch, int64_t piece, void* scratch);
  } norm_gate;
  // Null for double: they have the digits of a float.
  struct {
    void (*forward)(const S* x, int64_t count, S* out);
    void (*backward)(const S* dout, const S* x, int64_t count, S* dx);
  } gelu;
};

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bfloat16> bf16;
};

extern const InstructionSet kAvx512, kAvx512Scaled, kAvx2, kPortable;

}  // namespace mmlocalmamba
