// Products with weights on the CPU, and those with GELU after them.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "host.h"

namespace mmlocalmamba {
namespace {

using MkldnnLinear = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);

// The library of the products in float32. MKL's are faster on Intel's processors, and run at less than half of oneDNN's
// speed on others.
std::atomic<Library> library{Library::kByProcessor};

bool by_mkl() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
#else
  constexpr bool intel = false;
#endif
  const Library wanted = library.load(std::memory_order_relaxed);
  return wanted == Library::kByProcessor ? intel && at::hasMKL() : wanted == Library::kMKL;
}

// oneDNN's product, where torch has it.
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

// glibc hands memory back to the system as soon as some megabytes of it are free, and gets it anew, page by page, for the
// next large tensor: up to a fifth of a forward pass. It waits for more once a block of this size has been freed, and
// then keeps up to twice as much. Nothing is touched here, so nothing is used.
void keep_freed_memory() {
  static const bool done = [] {
    at::empty({31 << 20}, at::kByte);
    return true;
  }();
  static_cast<void>(done);
}

Tensor weight_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  keep_freed_memory();
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
  const bool known = x.scalar_type() == at::kFloat ? !by_mkl() : x.scalar_type() == at::kBFloat16 && has_bf16();
  if (!product || !known || weight.scalar_type() != x.scalar_type() || x.numel() == 0 || weight.numel() == 0) {
    return at::linear(x, weight, bias);
  }
  return product->call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// Elements that one work item of GELU handles.
constexpr int64_t kPiece = 1 << 14;

// Returns GELU of the product and, to save it for the backward pass, the product; which is overwritten otherwise.
std::tuple<Tensor, Tensor> linear_gelu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool save) {
  check_tokens(x, "x");
  const Tensor product = weight_product(x, weight, bias).contiguous();
  if (product.scalar_type() == at::kDouble) return {at::gelu(product), save ? product : nothing(x)};
  Tensor out = save ? at::empty(product.sizes(), product.options()) : product;
  dispatch(product.scalar_type(), [&](auto element) {
    using S = decltype(element);
    const S* from = data<S>(product);
    S* to = memory<S>(out);
    const auto gelu = kernels<S>().gelu.forward;
    for_each(ceil_div(product.numel(), kPiece), 0, [&](int64_t i, void*) {
      gelu(from + i * kPiece, std::min(kPiece, product.numel() - i * kPiece), to + i * kPiece);
    });
  });
  return {out, save ? product : nothing(x)};
}

// Returns the gradient of the product.
Tensor linear_gelu_backward(const Tensor& dout_, const Tensor& product_) {
  check_tokens(product_, "product");
  check(dout_, "grad", product_.sizes(), product_.scalar_type());
  if (product_.scalar_type() == at::kDouble) return at::gelu_backward(dout_, product_);
  const Tensor dout = dout_.contiguous(), product = product_.contiguous();
  Tensor dx = at::empty(product.sizes(), product.options());
  dispatch(product.scalar_type(), [&](auto element) {
    using S = decltype(element);
    const S *slope = data<S>(dout), *from = data<S>(product);
    S* to = memory<S>(dx);
    const auto gelu = kernels<S>().gelu.backward;
    for_each(ceil_div(product.numel(), kPiece), 0, [&](int64_t i, void*) {
      const int64_t first = i * kPiece;
      gelu(slope + first, from + first, std::min(kPiece, product.numel() - first), to + first);
    });
  });
  return dx;
}

}  // namespace

void set_library(Library wanted) { library = wanted; }

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("linear", weight_product);
  m.impl("linear_gelu", linear_gelu);
  m.impl("linear_gelu_backward", linear_gelu_backward);
}

}  // namespace mmlocalmamba
