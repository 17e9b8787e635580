// The sum over directions that SCAttn gates, on the CPU.

#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>

#include "host.h"

namespace mmlocalmamba {
namespace {

struct SCAttnSumArguments {
  Tensor y, z;
  int64_t batch, directions, tokens, channels;

  SCAttnSumArguments(const Tensor& y_, const OptionalTensor& z_) {
    check_tokens(y_, "y");
    TORCH_CHECK_VALUE(y_.dim() == 4, "y must be (B, K, L, D), got ", y_.sizes());
    batch = y_.size(0), directions = y_.size(1), tokens = y_.size(2), channels = y_.size(3);
    y = y_.contiguous();
    if (z_) check(*z_, "z", {batch, tokens, channels}, y_.scalar_type()), z = with_contiguous_channels(*z_);
  }

  template <typename S>
  SCAttnSumProblem<S> problem() const {
    SCAttnSumProblem<S> p{};
    p.batch = batch, p.directions = directions, p.tokens = tokens, p.channels = channels;
    p.y = data<S>(y);
    if (z.defined()) p.z = data<S>(z), p.z_strides = strides(z);
    return p;
  }

  Tensor parts() const {
    return at::empty({ceil_div(tokens, kTokensPerItem), batch, directions, channels}, compute_options(y));
  }

  template <typename S, typename Function>
  void run(const SCAttnSumProblem<S>& p, Function function) const {
    const int64_t count = ceil_div(tokens, kTokensPerItem);
    for_each(batch * count, kernels<S>().scattn_sum.scratch(directions, channels),
             [&](int64_t i, void* scratch) { function(p, i / count, i % count, scratch); });
  }
};

// SCAttn's weights and biases.
struct Attention {
  Tensor norm_weight, norm_bias, reduce_weight, reduce_bias, select_weight, select_bias;

  Attention(const Tensor& y, const Tensor& norm_weight_, const Tensor& norm_bias_, const Tensor& reduce_weight_,
            const Tensor& reduce_bias_, const Tensor& select_weight_, const Tensor& select_bias_)
      : norm_weight(norm_weight_.contiguous()), norm_bias(norm_bias_.contiguous()),
        reduce_weight(reduce_weight_.contiguous()), reduce_bias(reduce_bias_.contiguous()),
        select_weight(select_weight_.contiguous()), select_bias(select_bias_.contiguous()) {
    const int64_t channels = y.size(-1), reduced = reduce_bias.numel();
    const at::ScalarType type = compute_type(y);
    check(norm_weight, "norm_weight", {channels}, type), check(norm_bias, "norm_bias", {channels}, type);
    check(reduce_weight, "reduce_weight", {reduced, channels}, type);
    check(reduce_bias, "reduce_bias", {reduced}, type);
    check(select_weight, "select_weight", {channels, reduced}, type);
    check(select_bias, "select_bias", {channels}, type);
  }

  // Computes the mean over tokens from its parts, the reduced features before GELU, and the gate. These are vectors for
  // each image and direction: too small for calls of a matrix product.
  template <typename T>
  void gate(const SCAttnSumArguments& a, const Tensor& parts, Tensor& average, Tensor& reduced, Tensor& gate) const {
    const auto& product = kernels<T>().scattn_sum.product;
    const int64_t rows = a.batch * a.directions, width = a.channels, count = parts.size(0), inner = reduce_bias.numel();
    const T *part = parts.const_data_ptr<T>(), *scale = norm_weight.const_data_ptr<T>();
    const T* shift = norm_bias.const_data_ptr<T>();
    T *averages = average.mutable_data_ptr<T>(), *reductions = reduced.mutable_data_ptr<T>();
    T* gates = gate.mutable_data_ptr<T>();
    for_each(rows, (width + inner) * sizeof(T), [&](int64_t row, void* scratch) {
      T *x = static_cast<T*>(scratch), *active = x + width;
      T *mean = averages + row * width, *before = reductions + row * inner;
      for (int64_t d = 0; d < width; ++d) {
        T sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += part[(i * rows + row) * width + d];
        mean[d] = sum / a.tokens;
        x[d] = shift[d] + mean[d] * scale[d];
      }
      product(reduce_weight.const_data_ptr<T>(), x, reduce_bias.const_data_ptr<T>(), inner, width, false, before);
      for (int64_t r = 0; r < inner; ++r) active[r] = before[r] / 2 * (1 + std::erf(before[r] * T(M_SQRT1_2)));
      product(select_weight.const_data_ptr<T>(), active, select_bias.const_data_ptr<T>(), width, inner, true,
              gates + row * width);
    });
  }
};

// Returns out, and the inputs of the backward pass: the mean of the normalised features over tokens (B, K, D), mean and
// inverse deviation of each token, SCAttn's features before GELU, and the gate.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scattn_sum(
    const Tensor& y, const OptionalTensor& z, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& select_weight, const Tensor& select_bias) {
  const SCAttnSumArguments a(y, z);
  const auto options = compute_options(y);
  const Attention attention(y, norm_weight, norm_bias, reduce_weight, reduce_bias, select_weight, select_bias);
  Tensor mean = at::empty({a.batch, a.directions, a.tokens}, options), inverse = at::empty_like(mean);
  Tensor out = at::empty({a.batch, a.tokens, a.channels}, y.options()), parts = a.parts();
  Tensor average = at::empty({a.batch, a.directions, a.channels}, options), gate = at::empty_like(average);
  Tensor reduced = at::empty({a.batch, a.directions, reduce_bias.size(0)}, options);
  dispatch(y.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    SCAttnSumProblem<S> p = a.problem<S>();
    p.eps = eps;
    p.mean = memory<T>(mean), p.inverse = memory<T>(inverse), p.parts = memory<T>(parts);
    a.run(p, kernels<S>().scattn_sum.statistics);
    attention.gate<T>(a, parts, average, reduced, gate);
    p.gate = data<T>(gate), p.out = memory<S>(out);
    a.run(p, kernels<S>().scattn_sum.forward);
  });
  return {out, average, mean, inverse, reduced, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scattn_sum_backward(
    const Tensor& dout_, const Tensor& y, const OptionalTensor& z, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& reduce_weight, const Tensor& select_weight, const Tensor& average, const Tensor& mean_,
    const Tensor& inverse_, const Tensor& reduced, const Tensor& gate_, std::array<bool, 8> wanted) {
  const SCAttnSumArguments a(y, z);
  const int64_t inner = reduce_weight.size(0);
  const at::ScalarType type = compute_type(y);
  check(dout_, "grad", {a.batch, a.tokens, a.channels}, y.scalar_type());
  check(norm_weight, "norm_weight", {a.channels}, type), check(norm_bias, "norm_bias", {a.channels}, type);
  check(reduce_weight, "reduce_weight", {inner, a.channels}, type);
  check(select_weight, "select_weight", {a.channels, inner}, type);
  check(average, "average", {a.batch, a.directions, a.channels}, type);
  check(mean_, "mean", {a.batch, a.directions, a.tokens}, type), check(inverse_, "inverse", mean_.sizes(), type);
  check(reduced, "reduced", {a.batch, a.directions, inner}, type), check(gate_, "gate", average.sizes(), type);
  TORCH_CHECK_VALUE(z || !wanted[1], "there is no z whose gradient could be wanted");
  const Tensor dout = dout_.contiguous(), mean = mean_.contiguous(), inverse = inverse_.contiguous();
  const Tensor gate = gate_.contiguous();
  Tensor parts = a.parts(), dy, dz = nothing(y);
  Tensor dnorm_weight = nothing(gate), dnorm_bias = nothing(gate), dreduce_weight = nothing(gate);
  Tensor dreduce_bias = nothing(gate), dselect_weight = nothing(gate), dselect_bias = nothing(gate);
  dispatch(y.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    SCAttnSumProblem<S> p = a.problem<S>();
    p.mean = memory<T>(mean), p.inverse = memory<T>(inverse), p.parts = memory<T>(parts);
    p.dout = data<S>(dout), p.gate = data<T>(gate);
    a.run(p, kernels<S>().scattn_sum.reduce);
    // Back through the attention, whose inputs are a vector for each image and direction.
    const auto rows = [](const Tensor& x) { return x.flatten(0, 1); };
    const Tensor dselect = rows(at::sigmoid_backward(ordered_sum(parts), gate));
    if (wanted[6]) dselect_weight = dselect.t().mm(at::gelu(rows(reduced)));
    if (wanted[7]) dselect_bias = dselect.sum(0);
    const Tensor dreduce = at::gelu_backward(dselect.mm(select_weight), rows(reduced));
    if (wanted[4]) dreduce_weight = dreduce.t().mm(at::addcmul(norm_bias, rows(average), norm_weight));
    if (wanted[5]) dreduce_bias = dreduce.sum(0);
    const Tensor dnorm = dreduce.mm(reduce_weight);
    if (wanted[2]) dnorm_weight = (dnorm * rows(average)).sum(0);
    if (wanted[3]) dnorm_bias = dnorm.sum(0);
    if (!wanted[0] && !wanted[1]) return;
    const Tensor dmean = (dnorm * norm_weight).div_(a.tokens);
    dy = at::empty(a.y.sizes(), y.options());
    if (wanted[1]) dz = at::empty(dout.sizes(), y.options());
    p.dmean = data<T>(dmean);
    p.dy = memory<S>(dy), p.dz = wanted[1] ? memory<S>(dz) : nullptr;
    a.run(p, kernels<S>().scattn_sum.backward);
  });
  return {wanted[0] ? dy : nothing(y), dz, dnorm_weight, dnorm_bias, dreduce_weight, dreduce_bias, dselect_weight,
          dselect_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("scattn_sum", scattn_sum);
  m.impl("scattn_sum_backward", scattn_sum_backward);
}

}  // namespace mmlocalmamba
