// The residual stream between two blocks, on the CPU: sum, rotation, RMSNorm.

#include <torch/library.h>

#include <tuple>

#include "host.h"

namespace mmlocalmamba {
namespace {

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x_, const OptionalTensor& residual_, const Tensor& weight_,
                                        double eps, const OptionalTensor& cosine_, const OptionalTensor& sine_) {
  check_tokens(x_, "x");
  TORCH_CHECK_VALUE(x_.dim() == 3, "x must be (B, L, C), got ", x_.sizes());
  const int64_t batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2);
  const at::ScalarType computed = compute_type(x_);
  check(weight_, "weight", {channels}, computed);
  const Tensor x = with_contiguous_channels(x_), weight = weight_.contiguous();
  Tensor residual, cosine, sine;
  const bool wide = residual_ && residual_->scalar_type() == computed;
  const at::ScalarType stream = wide ? computed : x.scalar_type();
  if (residual_) check(*residual_, "residual", x.sizes(), stream), residual = with_contiguous_channels(*residual_);
  TORCH_CHECK_VALUE(cosine_.has_value() == sine_.has_value(), "cos and sin are needed both, or none");
  if (cosine_) {
    TORCH_CHECK_VALUE(channels % 2 == 0, "to be turned, channels must be pairs, got ", channels);
    check(*cosine_, "cos", {tokens, channels}, computed), check(*sine_, "sin", {tokens, channels}, computed);
    cosine = cosine_->contiguous(), sine = sine_->contiguous();
  }
  Tensor out = at::empty({batch, tokens, channels}, x.options()), sum = at::empty(out.sizes(), x.options().dtype(stream));
  dispatch(x.scalar_type(), [&](auto element) {
    using S = decltype(element);
    const auto& set = kernels<S>().add_rms_norm;
    const auto run = [&](auto kernel, auto p) {
      using R = std::remove_pointer_t<decltype(p.sum)>;
      p.batch = batch, p.tokens = tokens, p.channels = channels, p.eps = eps;
      p.x = data<S>(x), p.x_strides = strides(x);
      if (residual_) p.residual = data<R>(residual), p.residual_strides = strides(residual);
      p.cosine = data<Compute<S>>(cosine), p.sine = data<Compute<S>>(sine), p.weight = data<Compute<S>>(weight);
      p.sum = memory<R>(sum), p.out = memory<S>(out);
      const int64_t count = ceil_div(tokens, kTokensPerItem);
      for_each(batch * count, set.scratch(channels),
               [&](int64_t i, void* scratch) { kernel(p, i / count, i % count, scratch); });
    };
    if (wide) {
      run(set.wide, AddRMSNormProblem<S, Compute<S>>{});
    } else {
      run(set.narrow, AddRMSNormProblem<S, S>{});
    }
  });
  return {out, sum};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("add_rms_norm", add_rms_norm);
}

}  // namespace mmlocalmamba
