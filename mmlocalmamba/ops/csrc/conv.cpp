// LocalVim's convolution along the scans, on the CPU.

#include <torch/library.h>

#include <array>
#include <tuple>

#include "host.h"

namespace mmlocalmamba {
namespace {

struct ConvArguments {
  Tensor x, weight, bias, table;
  int64_t batch, directions, steps, tokens, channels, width;

  ConvArguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const OptionalTensor& table_) {
    check_tokens(x_, "x");
    TORCH_CHECK_VALUE(x_.dim() == 3 && weight_.dim() == 3, "x must be (B, L, D) and weight (K, D, W), got ", x_.sizes(),
                      " and ", weight_.sizes());
    batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
    directions = weight_.size(0), width = weight_.size(2), steps = tokens;
    TORCH_CHECK_VALUE(width > 0, "weight must have at least one tap");
    check(weight_, "weight", {directions, channels, width}, compute_type(x_));
    if (bias_) check(*bias_, "bias", {directions, channels}, compute_type(x_)), bias = bias_->contiguous();
    if (table_) {
      table = checked_table(*table_, directions, tokens);
      steps = table.size(1);
    }
    x = with_contiguous_channels(x_);
    weight = weight_.contiguous();
  }

  template <typename S>
  ConvProblem<S> problem() const {
    ConvProblem<S> p{};
    p.batch = batch, p.directions = directions, p.steps = steps, p.tokens = tokens, p.channels = channels;
    p.width = width;
    p.table = table.defined() ? table.const_data_ptr<int32_t>() : nullptr;
    p.x = data<S>(x), p.x_strides = strides(x);
    p.weight = data<Compute<S>>(weight), p.bias = data<Compute<S>>(bias);
    return p;
  }
};

Tensor directional_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& src,
                        const OptionalTensor&) {
  const ConvArguments a(x, weight, bias, src);
  Tensor y = at::empty({a.directions, a.batch, a.steps, a.channels}, x.options());
  dispatch(x.scalar_type(), [&](auto element) {
    using S = decltype(element);
    ConvProblem<S> p = a.problem<S>();
    p.y = memory<S>(y);
    const auto& kernel = kernels<S>().conv;
    const int64_t items = ceil_div(p.channels, kernel.channels);
    for_each(p.batch * p.directions * items, kernel.scratch(p.width), [&](int64_t i, void* scratch) {
      kernel.forward(p, Item{i / items / p.directions, i / items % p.directions, i % items}, scratch);
    });
  });
  return y.transpose(0, 1);
}

std::tuple<Tensor, Tensor, Tensor> directional_conv_backward(const Tensor& dy_, const Tensor& x, const Tensor& weight,
                                                             const OptionalTensor& bias, const OptionalTensor& src,
                                                             const OptionalTensor&, std::array<bool, 3> wanted) {
  const ConvArguments a(x, weight, bias, src);
  check(dy_, "grad", {a.batch, a.directions, a.steps, a.channels}, x.scalar_type());
  const auto options = compute_options(x);
  const Tensor dy = with_contiguous_channels(dy_);
  Tensor dx, dweight, dbias;
  if (wanted[0]) dx = at::empty({a.batch, a.tokens, a.channels}, options);
  if (wanted[1] || wanted[2]) {
    dweight = at::empty({a.batch, a.directions, a.channels, a.width}, options);
    dbias = at::empty({a.batch, a.directions, a.channels}, options);
  }
  dispatch(x.scalar_type(), [&](auto element) {
    using S = decltype(element);
    ConvProblem<S> p = a.problem<S>();
    p.dy = data<S>(dy), p.dy_strides = strides(dy);
    p.dx = memory<Compute<S>>(dx), p.dweight = memory<Compute<S>>(dweight), p.dbias = memory<Compute<S>>(dbias);
    const auto& kernel = kernels<S>().conv;
    const int64_t items = ceil_div(p.channels, kernel.channels);
    for_each(p.batch * items, kernel.scratch(p.width), [&](int64_t i, void* scratch) {
      for (int64_t direction = 0; direction < p.directions; ++direction) {
        kernel.backward(p, Item{i / items, direction, i % items}, scratch);
      }
    });
  });
  return {wanted[0] ? dx.to(x.scalar_type()) : nothing(x), wanted[1] ? ordered_sum(dweight) : nothing(weight),
          wanted[2] ? ordered_sum(dbias) : nothing(weight)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("directional_conv", directional_conv);
  m.impl("directional_conv_backward", directional_conv_backward);
}

}  // namespace mmlocalmamba
