// LocalVMamba's convolution on the grid, on the CPU.

#include <torch/library.h>

#include <array>
#include <tuple>

#include "host.h"

namespace mmlocalmamba {
namespace {

struct Conv2dArguments {
  Tensor x, taps, bias;
  int64_t batch, height, width, channels;

  Conv2dArguments(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias_, int64_t height_, int64_t width_)
      : height(height_), width(width_) {
    check_tokens(x_, "x");
    TORCH_CHECK_VALUE(x_.dim() == 3 && height >= 0 && width >= 0 && x_.size(1) == height * width,
                      "x must be (B, height * width, D), got ", x_.sizes(), " for ", height, " x ", width);
    batch = x_.size(0), channels = x_.size(2);
    check(weight, "weight", {channels, 1, 3, 3}, compute_type(x_));
    if (bias_) check(*bias_, "bias", {channels}, compute_type(x_)), bias = bias_->contiguous();
    x = with_contiguous_channels(x_);
    taps = weight.reshape({channels, 9}).t().contiguous();
  }

  template <typename S>
  Conv2dProblem<S> problem() const {
    Conv2dProblem<S> p{};
    p.batch = batch, p.height = height, p.width = width, p.channels = channels;
    p.x = data<S>(x), p.x_strides = strides(x);
    p.taps = data<Compute<S>>(taps), p.bias = data<Compute<S>>(bias);
    return p;
  }

  template <typename S, typename Function>
  void run(const Conv2dProblem<S>& p, Function function) const {
    for_each(batch * height, kernels<S>().conv2d.scratch(width, channels),
             [&](int64_t i, void* scratch) { function(p, i / height, i % height, scratch); });
  }
};

Tensor conv2d_silu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t height, int64_t width) {
  const Conv2dArguments a(x, weight, bias, height, width);
  Tensor y = at::empty(x.sizes(), x.options());
  dispatch(x.scalar_type(), [&](auto element) {
    using S = decltype(element);
    Conv2dProblem<S> p = a.problem<S>();
    p.y = memory<S>(y);
    a.run(p, kernels<S>().conv2d.forward);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_silu_backward(const Tensor& dy_, const Tensor& x, const Tensor& weight,
                                                        const OptionalTensor& bias, int64_t height, int64_t width,
                                                        std::array<bool, 3> wanted) {
  const Conv2dArguments a(x, weight, bias, height, width);
  check(dy_, "grad", x.sizes(), x.scalar_type());
  const auto options = compute_options(x);
  const Tensor dy = with_contiguous_channels(dy_);
  const Tensor gradient = at::empty(x.sizes(), options), reverse = a.taps.flip(0);
  Tensor dx, parts, sums;
  if (wanted[0]) dx = at::empty(x.sizes(), x.options());
  if (wanted[1] || wanted[2]) parts = at::empty({a.batch * height, 10, a.channels}, options);
  dispatch(x.scalar_type(), [&](auto element) {
    using S = decltype(element);
    Conv2dProblem<S> p = a.problem<S>();
    p.dy = data<S>(dy), p.dy_strides = strides(dy);
    p.gradient = memory<Compute<S>>(gradient), p.parts = memory<Compute<S>>(parts), p.dx = memory<S>(dx);
    a.run(p, kernels<S>().conv2d.gradient);
    if (!wanted[0]) return;
    p.taps = data<Compute<S>>(reverse);
    a.run(p, kernels<S>().conv2d.backward);
  });
  if (parts.defined()) sums = ordered_sum(parts);
  return {wanted[0] ? dx : nothing(x),
          wanted[1] ? sums.narrow(0, 0, 9).t().reshape({a.channels, 1, 3, 3}) : nothing(weight),
          wanted[2] ? sums[9].clone() : nothing(weight)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("conv2d_silu", conv2d_silu);
  m.impl("conv2d_silu_backward", conv2d_silu_backward);
}

}  // namespace mmlocalmamba
