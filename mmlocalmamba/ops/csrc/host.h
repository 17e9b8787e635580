// Common parts of the operators for the CPU: instruction sets, threads, checks of arguments, sums in a fixed order.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
// Not ATen/ATen.h, which takes the compiler six seconds more in each file.
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>

#include "interface.h"
#include "processor.h"

namespace mmlocalmamba {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Returns the best instruction set of this machine, or the one that the environment variable names.
const InstructionSet& instruction_set();

template <typename S>
const Kernels<S>& kernels();
template <>
inline const Kernels<float>& kernels<float>() { return instruction_set().f32; }
template <>
inline const Kernels<double>& kernels<double>() { return instruction_set().f64; }
template <>
inline const Kernels<bfloat16>& kernels<bfloat16>() { return instruction_set().bf16; }

// Calls run with an element of the dtype of the tokens.
template <typename Function>
void dispatch(at::ScalarType tokens, Function run) {
  if (tokens == at::kFloat) return run(float());
  if (tokens == at::kDouble) return run(double());
  run(bfloat16());
}

inline void check_tokens(const Tensor& x, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble || x.scalar_type() == at::kBFloat16,
                   name, " must be float32, float64 or bfloat16, got ", x.scalar_type());
}

// Returns the dtype that tokens of this dtype are computed in; see interface.h.
inline at::ScalarType compute_type(at::ScalarType tokens) { return tokens == at::kBFloat16 ? at::kFloat : tokens; }
inline at::ScalarType compute_type(const Tensor& tokens) { return compute_type(tokens.scalar_type()); }
inline at::TensorOptions compute_options(const Tensor& tokens) { return tokens.options().dtype(compute_type(tokens)); }

// Calls run(i, scratch) for 0 <= i < count on all threads, with `bytes` of aligned memory for each thread.
template <typename Function>
void for_each(int64_t count, int64_t bytes, Function run) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<char[]> memory(new char[bytes + 64]);
    void* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    FlushDenormals flush;
    for (int64_t i = begin; i < end; ++i) run(i, scratch);
  });
}

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline Tensor with_contiguous_channels(const Tensor& x) {
  // A stride of 0 or of other elements in the last dimension cannot be loaded as a vector.
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// True if rows are contiguous and channels are not: (B, K, L, D) as a view of (B, K, D, L). Also in ops/library.py.
inline bool in_columns(const Tensor& x) { return x.size(-1) > 1 && x.stride(-1) != 1 && x.stride(-2) == 1; }

inline Strides strides(const Tensor& x) {
  const int64_t channel = in_columns(x) ? x.stride(-1) : 1;
  return x.dim() == 3 ? Strides{x.stride(0), 0, x.stride(1), channel}
                      : Strides{x.stride(0), x.stride(1), x.stride(2), channel};
}

// Returns an empty tensor for a gradient that is not wanted.
inline Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

// Returns the elements to read; null if x is undefined.
template <typename S>
const S* data(const Tensor& x) {
  if (!x.defined()) return nullptr;
  if constexpr (std::is_same_v<S, bfloat16>) {
    return reinterpret_cast<const S*>(x.const_data_ptr<at::BFloat16>());
  } else {
    return x.const_data_ptr<S>();
  }
}

// Returns the elements to write; null if x is undefined.
template <typename S>
S* memory(const Tensor& x) {
  if (!x.defined()) return nullptr;
  if constexpr (std::is_same_v<S, bfloat16>) {
    return reinterpret_cast<S*>(x.mutable_data_ptr<at::BFloat16>());
  } else {
    return x.mutable_data_ptr<S>();
  }
}

inline void check(const Tensor& x, const char* name, at::IntArrayRef shape, at::ScalarType type) {
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == type, name, " must be ", type, " beside these tokens, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_cpu(), name, " must be on the CPU, got ", x.device());
}

// Libraries of products in float32; tests set one.
enum class Library { kByProcessor, kMKL, kOneDNN };
void set_library(Library wanted);

// Checks the table of K directions: if a row does not hold every token once (and pads, -1), outputs stay unwritten.
Tensor checked_table(const Tensor& table, int64_t directions, int64_t tokens);

// Sums over the first dimension in ascending order, whatever the number of threads; float32 or float64.
Tensor ordered_sum(const Tensor& x);

}  // namespace mmlocalmamba
