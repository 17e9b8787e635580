// What stands around the scan in a mixer, on the CPU: products with weights, LocalVim's convolution along the scans,
// and the sum of the gated directions.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "host.h"

namespace mmlocalmamba {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Linear

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

Tensor multiply(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (weight.dim() == 3) {  // a product for each direction, whose rows lie together
    TORCH_CHECK_VALUE(!bias && x.dim() == 4 && x.size(1) == weight.size(0), "x must be (B, K, T, I) and weight (K, O, I) ",
                      "without bias, got ", x.sizes(), " and ", weight.sizes());
    std::vector<Tensor> y;
    for (int64_t k = 0; k < weight.size(0); ++k) y.push_back(multiply(x.select(1, k), weight[k], std::nullopt));
    return at::stack(y).transpose(0, 1);
  }
  // oneDNN would not ask.
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() >= 2 && x.size(-1) == weight.size(1) &&
                        (!bias || bias->sizes() == at::IntArrayRef({weight.size(0)})),
                    "x must be (..., I), weight (O, I) and bias (O,), got ", x.sizes(), ", ", weight.sizes(), " and ",
                    bias ? bias->sizes() : at::IntArrayRef());
  const auto& product = mkldnn_linear();
  if (!product || x.scalar_type() != at::kFloat || weight.scalar_type() != at::kFloat || x.numel() == 0 ||
      weight.numel() == 0) {
    return at::linear(x, weight, bias);
  }
  return product->call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolution

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

Tensor directional_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& src) {
  const ConvArguments a(x, weight, bias, src);
  Tensor y = at::empty({a.directions, a.batch, a.steps, a.channels}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "directional_conv", [&] {
    ConvProblem<scalar_t> p = a.problem<scalar_t>();
    p.y = y.mutable_data_ptr<scalar_t>();
    const auto& kernel = kernels<scalar_t>().conv;
    const int64_t items = pieces(p.channels, kernel.channels);
    for_each(p.batch * p.directions * items, kernel.scratch(p.width), [&](int64_t i, void* scratch) {
      kernel.forward(p, Item{i / items / p.directions, i / items % p.directions, i % items}, scratch);
    });
  });
  return y.transpose(0, 1);
}

std::tuple<Tensor, Tensor, Tensor> directional_conv_backward(const Tensor& dy_, const Tensor& x, const Tensor& weight,
                                                             const OptionalTensor& bias, const OptionalTensor& src) {
  const ConvArguments a(x, weight, bias, src);
  check(dy_, "grad", {a.batch, a.directions, a.steps, a.channels}, x);
  const Tensor dy = with_contiguous_channels(dy_);
  Tensor dx = at::empty({a.batch, a.tokens, a.channels}, x.options());
  Tensor dweight = at::empty({a.batch, a.directions, a.channels, a.width}, x.options());
  Tensor dbias = at::empty({a.batch, a.directions, a.channels}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "directional_conv_backward", [&] {
    ConvProblem<scalar_t> p = a.problem<scalar_t>();
    p.dy = dy.const_data_ptr<scalar_t>(), p.dy_strides = strides(dy);
    p.dx = dx.mutable_data_ptr<scalar_t>();
    p.dweight = dweight.mutable_data_ptr<scalar_t>(), p.dbias = dbias.mutable_data_ptr<scalar_t>();
    const auto& kernel = kernels<scalar_t>().conv;
    const int64_t items = pieces(p.channels, kernel.channels);
    for_each(p.batch * items, kernel.scratch(p.width), [&](int64_t i, void* scratch) {
      for (int64_t direction = 0; direction < p.directions; ++direction) {
        kernel.backward(p, Item{i / items, direction, i % items}, scratch);
      }
    });
  });
  return {dx, ordered_sum(dweight), ordered_sum(dbias)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Merge

struct MergeArguments {
  Tensor y, z;
  int64_t batch, directions, tokens, channels;

  MergeArguments(const Tensor& y_, const OptionalTensor& z_) {
    TORCH_CHECK_TYPE(y_.scalar_type() == at::kFloat || y_.scalar_type() == at::kDouble,
                     "y must be float32 or float64, got ", y_.scalar_type());
    TORCH_CHECK_VALUE(y_.dim() == 4, "y must be (B, K, L, D), got ", y_.sizes());
    batch = y_.size(0), directions = y_.size(1), tokens = y_.size(2), channels = y_.size(3);
    y = y_.contiguous();
    if (z_) check(*z_, "z", {batch, tokens, channels}, y_), z = with_contiguous_channels(*z_);
  }

  template <typename T>
  MergeProblem<T> problem() const {
    MergeProblem<T> p{};
    p.batch = batch, p.directions = directions, p.tokens = tokens, p.channels = channels;
    p.y = y.const_data_ptr<T>();
    if (z.defined()) p.z = z.const_data_ptr<T>(), p.z_strides = strides(z);
    return p;
  }

  Tensor parts() const { return at::empty({pieces(tokens, kPiece), batch, directions, channels}, y.options()); }

  template <typename T, typename Function>
  void run(const MergeProblem<T>& p, Function function) const {
    const int64_t count = pieces(tokens, kPiece);
    for_each(batch * count, kernels<T>().merge.scratch(directions, channels),
             [&](int64_t i, void* scratch) { function(p, i / count, i % count, scratch); });
  }
};

// SCAttn's weights and biases.
struct Attention {
  Tensor norm_weight, norm_bias, reduce_weight, reduce_bias, select_weight, select_bias;

  Attention(const Tensor& like, const Tensor& norm_weight_, const Tensor& norm_bias_, const Tensor& reduce_weight_,
            const Tensor& reduce_bias_, const Tensor& select_weight_, const Tensor& select_bias_)
      : norm_weight(norm_weight_.contiguous()), norm_bias(norm_bias_.contiguous()),
        reduce_weight(reduce_weight_.contiguous()), reduce_bias(reduce_bias_.contiguous()),
        select_weight(select_weight_.contiguous()), select_bias(select_bias_.contiguous()) {
    const int64_t channels = like.size(-1), reduced = reduce_bias.numel();
    check(norm_weight, "norm_weight", {channels}, like), check(norm_bias, "norm_bias", {channels}, like);
    check(reduce_weight, "reduce_weight", {reduced, channels}, like);
    check(reduce_bias, "reduce_bias", {reduced}, like);
    check(select_weight, "select_weight", {channels, reduced}, like);
    check(select_bias, "select_bias", {channels}, like);
  }

  // The mean over tokens from its parts, the reduced features before GELU, and the gate. They are vectors for each
  // image and direction: too small for calls of products that would have to be set up.
  template <typename T>
  void gate(const MergeArguments& a, const Tensor& parts, Tensor& average, Tensor& reduced, Tensor& gate) const {
    const auto& product = kernels<T>().merge.product;
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

// Returns out, and what the backward pass needs: the mean of the normalised features over tokens (B, K, D), mean and
// inverse deviation of each token, SCAttn's features before GELU, and the gate.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scattn_sum(
    const Tensor& y, const OptionalTensor& z, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
    const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& select_weight, const Tensor& select_bias) {
  const MergeArguments a(y, z);
  const Attention attention(y, norm_weight, norm_bias, reduce_weight, reduce_bias, select_weight, select_bias);
  Tensor mean = at::empty({a.batch, a.directions, a.tokens}, y.options()), inverse = at::empty_like(mean);
  Tensor out = at::empty({a.batch, a.tokens, a.channels}, y.options()), parts = a.parts();
  Tensor average = at::empty({a.batch, a.directions, a.channels}, y.options()), gate = at::empty_like(average);
  Tensor reduced = at::empty({a.batch, a.directions, reduce_bias.size(0)}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "scattn_sum", [&] {
    MergeProblem<scalar_t> p = a.problem<scalar_t>();
    p.eps = eps;
    p.mean = mean.mutable_data_ptr<scalar_t>(), p.inverse = inverse.mutable_data_ptr<scalar_t>();
    p.parts = parts.mutable_data_ptr<scalar_t>();
    a.run(p, kernels<scalar_t>().merge.statistics);
    attention.gate<scalar_t>(a, parts, average, reduced, gate);
    p.gate = gate.const_data_ptr<scalar_t>();
    p.out = out.mutable_data_ptr<scalar_t>();
    a.run(p, kernels<scalar_t>().merge.forward);
  });
  return {out, average, mean, inverse, reduced, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scattn_sum_backward(
    const Tensor& dout_, const Tensor& y, const OptionalTensor& z, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& reduce_weight, const Tensor& select_weight, const Tensor& average, const Tensor& mean,
    const Tensor& inverse, const Tensor& reduced, const Tensor& gate) {
  const MergeArguments a(y, z);
  check(dout_, "grad", {a.batch, a.tokens, a.channels}, y);
  const Tensor dout = dout_.contiguous();
  Tensor parts = a.parts(), dy = at::empty(a.y.sizes(), y.options());
  Tensor dz = z ? at::empty({a.batch, a.tokens, a.channels}, y.options()) : at::empty({0}, y.options());
  Tensor dnorm_weight, dnorm_bias, dreduce_weight, dreduce_bias, dselect_weight, dselect_bias;
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "scattn_sum_backward", [&] {
    MergeProblem<scalar_t> p = a.problem<scalar_t>();
    p.mean = mean.mutable_data_ptr<scalar_t>(), p.inverse = inverse.mutable_data_ptr<scalar_t>();
    p.parts = parts.mutable_data_ptr<scalar_t>();
    p.dout = dout.const_data_ptr<scalar_t>();
    p.gate = gate.const_data_ptr<scalar_t>();
    a.run(p, kernels<scalar_t>().merge.reduce);
    // Back through the attention, whose inputs are a vector for each image and direction.
    const auto rows = [](const Tensor& x) { return x.flatten(0, 1); };
    const Tensor dselect = rows(at::sigmoid_backward(ordered_sum(parts), gate));
    dselect_weight = dselect.t().mm(at::gelu(rows(reduced)));
    dselect_bias = dselect.sum(0);
    const Tensor dreduce = at::gelu_backward(dselect.mm(select_weight), rows(reduced));
    dreduce_weight = dreduce.t().mm(at::addcmul(norm_bias, rows(average), norm_weight));
    dreduce_bias = dreduce.sum(0);
    const Tensor dnorm = dreduce.mm(reduce_weight);
    dnorm_weight = (dnorm * rows(average)).sum(0);
    dnorm_bias = dnorm.sum(0);
    const Tensor dmean = (dnorm * norm_weight).div_(a.tokens);
    p.dmean = dmean.const_data_ptr<scalar_t>();
    p.dy = dy.mutable_data_ptr<scalar_t>();
    p.dz = dz.mutable_data_ptr<scalar_t>();
    a.run(p, kernels<scalar_t>().merge.backward);
  });
  return {dy, dz, dnorm_weight, dnorm_bias, dreduce_weight, dreduce_bias, dselect_weight, dselect_bias};
}

// ---------------------------------------------------------------------------------------------------------------------
// Norm

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x_, const OptionalTensor& residual_, const Tensor& weight_,
                                        double eps, const OptionalTensor& cosine_, const OptionalTensor& sine_) {
  TORCH_CHECK_TYPE(x_.scalar_type() == at::kFloat || x_.scalar_type() == at::kDouble, "x must be float32 or float64, got ",
                   x_.scalar_type());
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
    NormProblem<scalar_t> p{};
    p.batch = batch, p.tokens = tokens, p.channels = channels, p.eps = eps;
    p.x = x.const_data_ptr<scalar_t>(), p.x_strides = strides(x);
    if (residual_) p.residual = residual.const_data_ptr<scalar_t>(), p.residual_strides = strides(residual);
    if (cosine_) p.cosine = cosine.const_data_ptr<scalar_t>(), p.sine = sine.const_data_ptr<scalar_t>();
    p.weight = weight.const_data_ptr<scalar_t>();
    p.sum = sum.mutable_data_ptr<scalar_t>(), p.out = out.mutable_data_ptr<scalar_t>();
    const int64_t count = pieces(tokens, kPiece);
    for_each(batch * count, 0, [&](int64_t i, void*) { kernels<scalar_t>().norm(p, i / count, i % count); });
  });
  return {out, sum};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("linear", multiply);
  m.impl("directional_conv", directional_conv);
  m.impl("directional_conv_backward", directional_conv_backward);
  m.impl("scattn_sum", scattn_sum);
  m.impl("scattn_sum_backward", scattn_sum_backward);
  m.impl("add_rms_norm", add_rms_norm);
}

}  // namespace mmlocalmamba
