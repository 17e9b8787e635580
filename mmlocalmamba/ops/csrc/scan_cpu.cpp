// The CPU kernels of the operators that ops/cpu.py declares: argument checks, memory, threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "scan.h"

namespace mmlocalmamba {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    sets.push_back(&kAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kPortable);
  return sets;
}

// The best that this machine has, or the one that the environment names.
const InstructionSet& instruction_set() {
  static const std::vector<const InstructionSet*> sets = supported();
  const char* wanted = std::getenv("MMLOCALMAMBA_CPU_ISA");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (const InstructionSet* set : sets) {
    if (std::string(wanted) == set->name) return *set;
    names += std::string(names.empty() ? "" : ", ") + set->name;
  }
  TORCH_CHECK_VALUE(false, "MMLOCALMAMBA_CPU_ISA=", wanted, ": this machine can run ", names);
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : supported()) names.emplace_back(set->name);
  return names;
}

namespace {

template <typename T>
const Kernel<T>& kernel();
template <>
const Kernel<float>& kernel<float>() { return instruction_set().f32; }
template <>
const Kernel<double>& kernel<double>() { return instruction_set().f64; }

// Decaying states end as denormal numbers, which take some processors a hundred times longer: they count as zero here.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned int saved_;
#endif
};

template <typename T>
int64_t items_of_sequence(const Problem<T>& p, const Kernel<T>& kernel) {
  return (p.channels + kernel.channels - 1) / kernel.channels;
}

// Runs over all items, in parallel but for the dimensions named, along which a thread goes in ascending order.
template <typename T, typename Function>
void for_each_item(const Problem<T>& p, const Kernel<T>& kernel, bool backward, Function run,
                   bool directions_in_order = false, bool items_in_order = false) {
  const int64_t items = items_of_sequence(p, kernel), bytes = kernel.scratch(p.states, backward);
  const int64_t inner_items = items_in_order ? items : 1, inner_directions = directions_in_order ? p.directions : 1;
  const int64_t outer_items = items_in_order ? 1 : items, outer_directions = directions_in_order ? 1 : p.directions;
  at::parallel_for(0, p.batch * outer_directions * outer_items, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<char[]> memory(new char[bytes + 64]);
    void* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    FlushDenormals flush;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / outer_items;
      for (int64_t direction = 0; direction < inner_directions; ++direction) {
        for (int64_t index = 0; index < inner_items; ++index) {
          run(p, Item{sequence / outer_directions, sequence % outer_directions + direction, i % outer_items + index},
              scratch);
        }
      }
    }
  });
}

Tensor with_contiguous_channels(const Tensor& x) {
  // A stride of 0 or of other elements in the last dimension cannot be loaded as a vector.
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

Strides strides(const Tensor& x) {
  return x.dim() == 3 ? Strides{x.stride(0), 0, x.stride(1)} : Strides{x.stride(0), x.stride(1), x.stride(2)};
}

void check(const Tensor& x, const char* name, at::IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), " like u, got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.is_cpu(), name, " must be on the CPU, got ", x.device());
}

// Owns what a Problem points to.
struct Arguments {
  Tensor u, delta, A, B, C, D, bias, table;
  int64_t batch, directions, steps, rows, tokens, channels, states;
  bool in_scan_order, softplus;

  Arguments(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
            const OptionalTensor& D_, const OptionalTensor& table_, int64_t tokens_, const OptionalTensor& bias_,
            bool softplus_, bool in_scan_order_)
      : tokens(tokens_), in_scan_order(in_scan_order_), softplus(softplus_) {
    TORCH_CHECK_TYPE(u_.scalar_type() == at::kFloat || u_.scalar_type() == at::kDouble,
                     "u must be float32 or float64, got ", u_.scalar_type());
    TORCH_CHECK_VALUE(delta_.dim() == 4 && A_.dim() == 3, "delta must be (B, K, L, D) and A (K, D, N), got ",
                      delta_.sizes(), " and ", A_.sizes());
    batch = delta_.size(0), directions = delta_.size(1), rows = delta_.size(2), channels = delta_.size(3);
    states = A_.size(2);
    if (u_.dim() == 3 && !in_scan_order) {
      check(u_, "u", {batch, rows, channels}, u_);
    } else {
      check(u_, "u", {batch, directions, rows, channels}, u_);
    }
    check(delta_, "delta", {batch, directions, rows, channels}, u_);
    check(A_, "A", {directions, channels, states}, u_);
    check(B_, "B", {batch, directions, rows, states}, u_);
    check(C_, "C", {batch, directions, rows, states}, u_);
    steps = rows;
    if (table_) {
      TORCH_CHECK_VALUE(table_->dim() == 2 && table_->size(0) == directions && table_->scalar_type() == at::kInt &&
                            table_->is_cpu(),
                        "src must be an int32 table of ", directions, " rows on the CPU");
      table = table_->contiguous();
      steps = table.size(1);
      const int32_t* entry = table.const_data_ptr<int32_t>();
      int32_t lowest = 0, highest = -1;
      for (int64_t i = 0; i < table.numel(); ++i) {
        lowest = std::min(lowest, entry[i]);
        highest = std::max(highest, entry[i]);
      }
      TORCH_CHECK_INDEX(lowest >= -1 && highest < tokens, "src holds tokens from ", lowest, " to ", highest, ", there are ",
                        tokens);
    }
    TORCH_CHECK_VALUE((in_scan_order ? steps : tokens) == rows, "delta has ", rows, " rows for ", steps, " steps and ",
                      tokens, " tokens");
    TORCH_CHECK_VALUE(table_ || tokens == steps, tokens, " tokens for ", steps, " steps need src");
    u = with_contiguous_channels(u_);
    delta = with_contiguous_channels(delta_);
    A = A_.contiguous();
    B = B_;
    C = C_;
    if (D_) check(*D_, "D", {directions, channels}, u_), D = D_->contiguous();
    if (bias_) check(*bias_, "delta_bias", {directions, channels}, u_), bias = bias_->contiguous();
  }

  template <typename T>
  Problem<T> problem() const {
    Problem<T> p{};
    p.batch = batch, p.directions = directions, p.steps = steps, p.rows = rows, p.tokens = tokens;
    p.channels = channels, p.states = states;
    p.in_scan_order = in_scan_order, p.softplus = softplus;
    p.table = table.defined() ? table.const_data_ptr<int32_t>() : nullptr;
    p.u = u.const_data_ptr<T>(), p.u_strides = strides(u);
    p.delta = delta.const_data_ptr<T>(), p.delta_strides = strides(delta);
    p.B = B.const_data_ptr<T>(), p.B_strides = strides(B), p.B_state_stride = B.stride(3);
    p.C = C.const_data_ptr<T>(), p.C_strides = strides(C), p.C_state_stride = C.stride(3);
    p.A = A.const_data_ptr<T>();
    p.D = D.defined() ? D.const_data_ptr<T>() : nullptr;
    p.bias = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
    return p;
  }

  int64_t checkpoints() const { return std::max<int64_t>((steps + kChunk - 1) / kChunk - 1, 0); }
};

std::tuple<Tensor, Tensor, Tensor> directional_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                    const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                    const OptionalTensor& src, int64_t tokens,
                                                    const OptionalTensor& delta_bias, bool delta_softplus,
                                                    bool in_scan_order, bool save) {
  const Arguments a(u, delta, A, B, C, D, src, tokens, delta_bias, delta_softplus, in_scan_order);
  Tensor y = at::empty({a.batch, a.directions, a.tokens, a.channels}, u.options());
  Tensor last = at::empty({a.batch, a.directions, a.states, a.channels}, u.options());
  Tensor checkpoints =
      at::empty({a.batch, a.directions, save ? a.checkpoints() : 0, a.states, a.channels}, u.options());
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "directional_scan", [&] {
    Problem<scalar_t> p = a.problem<scalar_t>();
    p.y = y.mutable_data_ptr<scalar_t>();
    p.last = last.mutable_data_ptr<scalar_t>();
    p.checkpoints = save ? checkpoints.mutable_data_ptr<scalar_t>() : nullptr;
    const Kernel<scalar_t>& k = kernel<scalar_t>();
    for_each_item(p, k, false, k.forward);
  });
  return {y, last, checkpoints};
}

// Sum over the first dimension in ascending order, whatever the number of threads.
Tensor ordered_sum(const Tensor& x) {
  if (x.size(0) == 1) return x[0];
  Tensor sum = at::empty(x.sizes().slice(1), x.options());
  const int64_t count = x.size(0), size = sum.numel();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "ordered_sum", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = sum.mutable_data_ptr<scalar_t>();
    // Pieces that stay in the first cache over the summands.
    at::parallel_for(0, (size + 1023) / 1024, 16, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece * 1024, last = std::min(size, first + 1024);
        for (int64_t j = first; j < last; ++j) to[j] = count ? from[j] : scalar_t(0);
        for (int64_t i = 1; i < count; ++i) {
          for (int64_t j = first; j < last; ++j) to[j] += from[i * size + j];
        }
      }
    });
  });
  return sum;
}

// The same over the second dimension: (B, K, ...) -> (B, ...).
Tensor sum_directions(const Tensor& x) {
  if (x.size(1) == 1) return x.squeeze(1);
  Tensor sum = at::empty({x.size(0), x.size(2), x.size(3)}, x.options());
  const int64_t count = x.size(1), size = x.size(2) * x.size(3), pieces = (size + 1023) / 1024;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sum_directions", [&] {
    at::parallel_for(0, x.size(0) * pieces, 16, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t batch = piece / pieces, first = piece % pieces * 1024, last = std::min(size, first + 1024);
        const scalar_t* from = x.const_data_ptr<scalar_t>() + batch * count * size;
        scalar_t* to = sum.mutable_data_ptr<scalar_t>() + batch * size;
        for (int64_t j = first; j < last; ++j) to[j] = count ? from[j] : scalar_t(0);
        for (int64_t i = 1; i < count; ++i) {
          for (int64_t j = first; j < last; ++j) to[j] += from[i * size + j];
        }
      }
    });
  });
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> directional_scan_backward(
    const OptionalTensor& dy_, const OptionalTensor& dlast_, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& src, int64_t tokens,
    const OptionalTensor& delta_bias, const Tensor& checkpoints_, bool delta_softplus, bool in_scan_order) {
  const Arguments a(u, delta, A, B, C, D, src, tokens, delta_bias, delta_softplus, in_scan_order);
  const auto options = u.options();
  const int64_t batch = a.batch, K = a.directions, N = a.states, width = a.channels;
  Tensor dy = at::zeros({1, 1, 1, 1}, options).expand({batch, K, tokens, width});
  if (dy_) {
    check(*dy_, "grad_y", {batch, K, tokens, width}, u);
    dy = *dy_;
  }
  dy = with_contiguous_channels(dy);
  Tensor dlast;
  if (dlast_) {
    check(*dlast_, "grad_last", {batch, K, N, width}, u);
    dlast = dlast_->contiguous();
  }
  Tensor checkpoints = checkpoints_.contiguous();
  check(checkpoints, "checkpoints", {batch, K, a.checkpoints(), N, width}, u);

  Tensor du;
  Tensor ddelta = at::empty({batch, K, a.rows, width}, options);
  Tensor dA = at::empty({batch, K, width, N}, options);
  Tensor dD = at::empty({batch, K, width}, options);
  Tensor dbias = at::empty({batch, K, width}, options);
  Tensor dB, dC;
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "directional_scan_backward", [&] {
    Problem<scalar_t> p = a.problem<scalar_t>();
    const Kernel<scalar_t>& k = kernel<scalar_t>();
    // Sums in place save memory, above all the time to have it mapped; the order of summation is the same.
    const int64_t items = items_of_sequence(p, k), enough = 4 * at::get_num_threads();
    const bool shared = u.dim() == 3;
    p.dB_in_parts = batch * (shared ? 1 : K) < enough;
    p.du_in_parts = !shared || (p.dB_in_parts && batch * items < enough);
    du = p.du_in_parts ? at::empty({batch, K, a.rows, width}, options) : at::empty({batch, a.rows, width}, options);
    dB = at::empty({p.dB_in_parts ? items : 1, batch, K, a.rows, N}, options);
    dC = at::empty_like(dB);
    p.checkpoints = checkpoints.mutable_data_ptr<scalar_t>();
    p.dy = dy.const_data_ptr<scalar_t>(), p.dy_strides = strides(dy);
    p.dlast = dlast.defined() ? dlast.const_data_ptr<scalar_t>() : nullptr;
    p.du = du.mutable_data_ptr<scalar_t>(), p.ddelta = ddelta.mutable_data_ptr<scalar_t>();
    p.dA = dA.mutable_data_ptr<scalar_t>();
    p.dB = dB.mutable_data_ptr<scalar_t>(), p.dC = dC.mutable_data_ptr<scalar_t>();
    p.dD = dD.mutable_data_ptr<scalar_t>(), p.dbias = dbias.mutable_data_ptr<scalar_t>();
    for_each_item(p, k, true, k.backward, !p.du_in_parts, !p.dB_in_parts);
    if (shared && p.du_in_parts) du = sum_directions(du);
    if (width == 0) dB.zero_(), dC.zero_();
  });
  return {du,
          ddelta,
          ordered_sum(dA),
          ordered_sum(dB),
          ordered_sum(dC),
          ordered_sum(dD),
          ordered_sum(dbias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("directional_scan", directional_scan);
  m.impl("directional_scan_backward", directional_scan_backward);
}

}  // namespace mmlocalmamba

namespace {

PyObject* instruction_sets(PyObject*, PyObject*) {
  const std::vector<std::string> names = mmlocalmamba::instruction_sets();
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(names.size()));
  for (size_t i = 0; list && i < names.size(); ++i) {
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), PyUnicode_FromString(names[i].c_str()));
  }
  return list;
}

PyMethodDef methods[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS, "Names of the instruction sets this machine can run, best first."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Importing the module registers the kernels.
PyMODINIT_FUNC PyInit__cpu() {
  PyObject* self = PyModule_Create(&module);
  if (self) PyModule_AddStringConstant(self, "TORCH_VERSION", TORCH_VERSION);
  return self;
}
