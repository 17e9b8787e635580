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
    TORCH_CHECK_TYPE(x_.scalar_type() == at::kFloat || x_.scalar_type() == at::kDouble,
                     "x must be float32 or float64, got ", x_.scalar_type());
    TORCH_CHECK_VALUE(x_.dim() == 3 && weight_.dim() == 3, "x must be (B, L, D) and weight (K, D, W), got ", x_.sizes(),
                      " and ", weight_.sizes());
    batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
    directions = weight_.size(0), width = weight_.size(2), steps = tokens;
    TORCH_CHECK_VALUE(width > 0, "weight must have at least one tap");
    check(weight_, "weight", {directions, channels, width}, x_);
    if (bias_) check(*bias_, "bias", {directions, channels}, x_), bias = bias_->contiguous();
    if (table_) {
      table = checked_table(*table_, directions, tokens);
      steps = table.size(1);
    }
    x = with_contiguous_channels(x_);
    weight = weight_.contiguous();
  }

  template <typename T>
  ConvProblem<T> problem() const {
    ConvProblem<T> p{};
    p.batch = batch, p.directions = directions, p.steps = steps, p.tokens = tokens, p.channels = channels;
    p.width = width;
    p.table = table.defined() ? table.const_data_ptr<int32_t>() : nullptr;
    p.x = x.const_data_ptr<T>(), p.x_strides = strides(x);
    p.weight = weight.const_data_ptr<T>();
    p.bias = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
    return p;
  }
};

Tensor directional_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& src,
                        const OptionalTensor&) {
  const ConvArguments a(x, weight, bias, src);
  Tensor y = at::empty({a.directions, a.batch, a.steps, a.channels}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "directional_conv", [&] {
    ConvProblem<scalar_t> p = a.problem<scalar_t>();
    p.y = y.mutable_data_ptr<scalar_t>();
    const auto& kernel = kernels<scalar_t>().conv;
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
  check(dy_, "grad", {a.batch, a.directions, a.steps, a.channels}, x);
  const Tensor dy = with_contiguous_channels(dy_);
  Tensor dx, dweight, dbias;
  if (wanted[0]) dx = at::empty({a.batch, a.tokens, a.channels}, x.options());
  if (wanted[1] || wanted[2]) {
    dweight = at::empty({a.batch, a.directions, a.channels, a.width}, x.options());
    dbias = at::empty({a.batch, a.directions, a.channels}, x.options());
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "directional_conv_backward", [&] {
    ConvProblem<scalar_t> p = a.problem<scalar_t>();
    p.dy = dy.const_data_ptr<scalar_t>(), p.dy_strides = strides(dy);
    p.dx = data_or_null<scalar_t>(dx);
    p.dweight = data_or_null<scalar_t>(dweight), p.dbias = data_or_null<scalar_t>(dbias);
    const auto& kernel = kernels<scalar_t>().conv;
    const int64_t items = ceil_div(p.channels, kernel.channels);
    for_each(p.batch * items, kernel.scratch(p.width), [&](int64_t i, void* scratch) {
      for (int64_t direction = 0; direction < p.directions; ++direction) {
        kernel.backward(p, Item{i / items, direction, i % items}, scratch);
      }
    });
  });
  return {wanted[0] ? dx : nothing(x), wanted[1] ? ordered_sum(dweight) : nothing(x),
          wanted[2] ? ordered_sum(dbias) : nothing(x)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("directional_conv", directional_conv);
  m.impl("directional_conv_backward", directional_conv_backward);
}

}  // namespace mmlocalmamba
