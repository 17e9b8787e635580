// Products with weights on the CPU.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

#include "host.h"

namespace mmlocalmamba {
namespace {

using MkldnnLinear = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);

// oneDNN's product, where torch has it: float32 sgemm of MKL runs at less than half its speed on AMD's processors.
const std::optional<c10::TypedOperatorHandle<MkldnnLinear>>& mkldnn_linear() {
  static const auto handle = []() -> std::optional<c10::TypedOperatorHandle<MkldnnLinear>> {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!schema || !schema->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
    return schema->typed<MkldnnLinear>();
  }();
  return handle;
}

// oneDNN multiplies bfloat16 on AVX-512 and its like only, and raises elsewhere; it also obeys ONEDNN_MAX_CPU_ISA.
bool has_bf16() {
  static const bool has = [] {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    return schema && schema->typed<bool()>().call();
  }();
  return has;
}

Tensor weight_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (weight.dim() == 3) {  // a product for each direction, whose rows are contiguous
    TORCH_CHECK_VALUE(!bias && x.dim() == 4 && x.size(1) == weight.size(0),
                      "x must be (B, K, T, I) and weight (K, O, I) without bias, got ", x.sizes(), " and ", weight.sizes());
    std::vector<Tensor> y;
    for (int64_t k = 0; k < weight.size(0); ++k) y.push_back(weight_product(x.select(1, k), weight[k], std::nullopt));
    return at::stack(y).transpose(0, 1);
  }
  // oneDNN would not check these shapes.
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 2 && x.size(-1) == weight.size(1) &&
                        (!bias || bias->sizes() == at::IntArrayRef({weight.size(0)})),
                    "x must be (..., I), weight (O, I) and bias (O,), got ", x.sizes(), ", ", weight.sizes(), " and ",
                    bias ? bias->sizes() : at::IntArrayRef());
  const auto& product = mkldnn_linear();
  const bool known = x.scalar_type() == at::kFloat || (x.scalar_type() == at::kBFloat16 && has_bf16());
  if (!product || !known || weight.scalar_type() != x.scalar_type() || x.numel() == 0 || weight.numel() == 0) {
    return at::linear(x, weight, bias);
  }
  return product->call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("linear", weight_product);
}

}  // namespace mmlocalmamba
