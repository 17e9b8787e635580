// The sum over directions, LayerNorm and gate that follow LocalVMamba's scans, on the CPU.

#include <torch/library.h>

#include <array>
#include <tuple>

#include "host.h"

namespace mmlocalmamba {
namespace {

struct NormGateArguments {
  Tensor x, z, weight, bias;
  int64_t batch, directions, tokens, channels;

  NormGateArguments(const Tensor& x_, const OptionalTensor& z_, const Tensor& weight_, const Tensor& bias_) {
    check_tokens(x_, "y");
    TORCH_CHECK_VALUE(x_.dim() == 4 && x_.size(1) > 0, "y must be (B, K, L, D), got ", x_.sizes());
    batch = x_.size(0), directions = x_.size(1), tokens = x_.size(2), channels = x_.size(3);
    check(weight_, "weight", {channels}, compute_type(x_)), check(bias_, "bias", {channels}, compute_type(x_));
    if (z_) check(*z_, "z", {batch, tokens, channels}, x_.scalar_type()), z = with_contiguous_channels(*z_);
    x = with_contiguous_channels(x_), weight = weight_.contiguous(), bias = bias_.contiguous();
  }

  template <typename S>
  NormGateProblem<S> problem(double eps) const {
    NormGateProblem<S> p{};
    p.batch = batch, p.directions = directions, p.tokens = tokens, p.channels = channels, p.eps = eps;
    p.x = data<S>(x), p.x_strides = strides(x);
    if (z.defined()) p.z = data<S>(z), p.z_strides = strides(z);
    p.weight = data<Compute<S>>(weight), p.bias = data<Compute<S>>(bias);
    return p;
  }

  template <typename S, typename Function>
  void run(const NormGateProblem<S>& p, Function function) const {
    const int64_t count = ceil_div(tokens, kTokensPerItem);
    for_each(batch * count, kernels<S>().norm_gate.scratch(channels),
             [&](int64_t i, void* scratch) { function(p, i / count, i % count, scratch); });
  }
};

Tensor norm_gate(const Tensor& y, const OptionalTensor& z, const Tensor& weight, const Tensor& bias, double eps) {
  const NormGateArguments a(y, z, weight, bias);
  Tensor out = at::empty({a.batch, a.tokens, a.channels}, y.options());
  dispatch(y.scalar_type(), [&](auto element) {
    using S = decltype(element);
    NormGateProblem<S> p = a.problem<S>(eps);
    p.out = memory<S>(out);
    a.run(p, kernels<S>().norm_gate.forward);
  });
  return out;
}

// The gradient of y is the same for all directions: it is returned once, (B, 1, L, D).
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_gate_backward(const Tensor& dout_, const Tensor& y,
                                                              const OptionalTensor& z, const Tensor& weight,
                                                              const Tensor& bias, double eps,
                                                              std::array<bool, 4> wanted) {
  const NormGateArguments a(y, z, weight, bias);
  check(dout_, "grad", {a.batch, a.tokens, a.channels}, y.scalar_type());
  TORCH_CHECK_VALUE(z || !wanted[1], "there is no z whose gradient could be wanted");
  const Tensor dout = with_contiguous_channels(dout_);
  Tensor dx, dz, parts, sums;
  if (wanted[0]) dx = at::empty({a.batch, 1, a.tokens, a.channels}, y.options());
  if (wanted[1]) dz = at::empty(dout.sizes(), y.options());
  if (wanted[2] || wanted[3]) {
    parts = at::empty({ceil_div(a.tokens, kTokensPerItem) * a.batch, 2, a.channels}, compute_options(y));
  }
  dispatch(y.scalar_type(), [&](auto element) {
    using S = decltype(element);
    NormGateProblem<S> p = a.problem<S>(eps);
    p.dout = data<S>(dout), p.dout_strides = strides(dout);
    p.dx = memory<S>(dx), p.dz = memory<S>(dz), p.parts = memory<Compute<S>>(parts);
    a.run(p, kernels<S>().norm_gate.backward);
  });
  if (parts.defined()) sums = ordered_sum(parts);
  return {wanted[0] ? dx : nothing(y), wanted[1] ? dz : nothing(y), wanted[2] ? sums[0].clone() : nothing(weight),
          wanted[3] ? sums[1].clone() : nothing(weight)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("norm_gate", norm_gate);
  m.impl("norm_gate_backward", norm_gate_backward);
}

}  // namespace mmlocalmamba
