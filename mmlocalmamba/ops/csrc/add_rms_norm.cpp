// The residual stream between two blocks, on the CPU: sum, rotation, RMSNorm.

#include <torch/library.h>

#include <tuple>

#include "host.h"

namespace mmlocalmamba {
namespace {

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x_, const OptionalTensor& residual_, const Tensor& weight_,
                                        double eps, const OptionalTensor& cosine_, const OptionalTensor& sine_) {
  TORCH_CHECK_TYPE(x_.scalar_type() == at::kFloat || x_.scalar_type() == at::kDouble,
                   "x must be float32 or float64, got ", x_.scalar_type());
  TORCH_CHECK_VALUE(x_.dim() == 3, "x must be (B, L, C), got ", x_.sizes());
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  check(weight_, "weight", {channels}, x_);
  const Tensor x = with_contiguous_channels(x_), weight = weight_.contiguous();
  Tensor residual, cosine, sine;
  if (residual_) check(*residual_, "residual", x.sizes(), x), residual = with_contiguous_channels(*residual_);
  TORCH_CHECK_VALUE(cosine_.has_value() == sine_.has_value(), "cos and sin are needed both, or none");
  if (cosine_) {
    TORCH_CHECK_VALUE(channels % 2 == 0, "to be turned, channels must be pairs, got ", channels);
    check(*cosine_, "cos", {tokens, channels}, x), check(*sine_, "sin", {tokens, channels}, x);
    cosine = cosine_->contiguous(), sine = sine_->contiguous();
  }
  Tensor sum = at::empty({batch, tokens, channels}, x.options()), out = at::empty_like(sum);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "add_rms_norm", [&] {
    AddRMSNormProblem<scalar_t> p{};
    p.batch = batch, p.tokens = tokens, p.channels = channels, p.eps = eps;
    p.x = x.const_data_ptr<scalar_t>(), p.x_strides = strides(x);
    if (residual_) p.residual = residual.const_data_ptr<scalar_t>(), p.residual_strides = strides(residual);
    if (cosine_) p.cosine = cosine.const_data_ptr<scalar_t>(), p.sine = sine.const_data_ptr<scalar_t>();
    p.weight = weight.const_data_ptr<scalar_t>();
    p.sum = sum.mutable_data_ptr<scalar_t>(), p.out = out.mutable_data_ptr<scalar_t>();
    const int64_t count = ceil_div(tokens, kTokensPerItem);
    const auto kernel = kernels<scalar_t>().add_rms_norm;
    for_each(batch * count, 0, [&](int64_t i, void*) { kernel(p, i / count, i % count); });
  });
  return {out, sum};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("add_rms_norm", add_rms_norm);
}

}  // namespace mmlocalmamba
