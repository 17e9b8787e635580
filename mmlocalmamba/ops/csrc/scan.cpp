// The selective scan on the CPU: argument checks, memory, the order of summation.

#include <torch/library.h>

#include <array>
#include <tuple>

#include "host.h"

namespace mmlocalmamba {
namespace {

template <typename S>
int64_t items_of_sequence(const ScanProblem<S>& p) {
  return ceil_div(p.channels, kernels<S>().scan.channels);
}

// Runs over all items in parallel, except along the named dimensions: there, one thread goes in ascending order.
template <typename S, typename Function>
void for_each_item(const ScanProblem<S>& p, bool backward, Function run, bool directions_in_order = false,
                   bool items_in_order = false) {
  const int64_t items = items_of_sequence(p), bytes = kernels<S>().scan.scratch(p.states, p.dt_rank, backward);
  const int64_t inner_items = items_in_order ? items : 1, inner_directions = directions_in_order ? p.directions : 1;
  const int64_t outer_items = items_in_order ? 1 : items, outer_directions = directions_in_order ? 1 : p.directions;
  for_each(p.batch * outer_directions * outer_items, bytes, [&](int64_t i, void* scratch) {
    const int64_t sequence = i / outer_items;
    for (int64_t direction = 0; direction < inner_directions; ++direction) {
      for (int64_t index = 0; index < inner_items; ++index) {
        run(p, Item{sequence / outer_directions, sequence % outer_directions + direction, i % outer_items + index},
            scratch);
      }
    }
  });
}

// Owns the memory that a ScanProblem points to.
struct ScanArguments {
  Tensor u, delta, A, B, C, D, bias, dt_weight, table;
  int64_t batch, directions, steps, rows, tokens, channels, states, dt_rank;
  bool in_scan_order, softplus;

  ScanArguments(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
            const OptionalTensor& D_, const OptionalTensor& table_, int64_t tokens_, const OptionalTensor& bias_,
            const OptionalTensor& dt_weight_, bool softplus_, bool in_scan_order_)
      : tokens(tokens_), in_scan_order(in_scan_order_), softplus(softplus_) {
    check_tokens(u_, "u");
    const at::ScalarType type = u_.scalar_type(), computed = compute_type(type);
    TORCH_CHECK_VALUE(delta_.dim() == 4 && A_.dim() == 3, "delta must be (B, K, L, D) and A (K, D, N), got ",
                      delta_.sizes(), " and ", A_.sizes());
    batch = delta_.size(0), directions = delta_.size(1), rows = delta_.size(2), channels = A_.size(1);
    states = A_.size(2), dt_rank = dt_weight_ ? dt_weight_->size(-1) : 0;
    if (u_.dim() == 3 && !in_scan_order) {
      check(u_, "u", {batch, rows, channels}, type);
    } else {
      check(u_, "u", {batch, directions, rows, channels}, type);
    }
    check(delta_, "delta", {batch, directions, rows, dt_weight_ ? dt_rank : channels}, type);
    check(A_, "A", {directions, channels, states}, computed);
    check(B_, "B", {batch, directions, rows, states}, type);
    check(C_, "C", {batch, directions, rows, states}, type);
    steps = rows;
    if (table_) {
      table = checked_table(*table_, directions, tokens);
      steps = table.size(1);
    }
    TORCH_CHECK_VALUE((in_scan_order ? steps : tokens) == rows, "delta has ", rows, " rows for ", steps, " steps and ",
                      tokens, " tokens");
    TORCH_CHECK_VALUE(table_ || tokens == steps, tokens, " tokens for ", steps, " steps need src");
    u = readable(u_);
    delta = readable(delta_);
    A = A_.contiguous();
    if (dt_weight_) {
      TORCH_CHECK_VALUE(dt_rank > 0, "dt_weight needs a rank of at least 1");
      check(*dt_weight_, "dt_weight", {directions, channels, dt_rank}, computed);
      dt_weight = dt_weight_->contiguous();
    }
    B = B_;
    C = C_;
    if (D_) check(*D_, "D", {directions, channels}, computed), D = D_->contiguous();
    if (bias_) check(*bias_, "delta_bias", {directions, channels}, computed), bias = bias_->contiguous();
  }

  // If rows are steps, they may be contiguous instead of channels.
  Tensor readable(const Tensor& x) const { return !table.defined() && in_columns(x) ? x : with_contiguous_channels(x); }

  // Uninitialised (B, K, size, D), laid out like x.
  Tensor like(const Tensor& x, int64_t size, at::TensorOptions options) const {
    return in_columns(x) ? at::empty({batch, directions, channels, size}, options).transpose(2, 3)
                         : at::empty({batch, directions, size, channels}, options);
  }

  template <typename S, typename T = Compute<S>>
  ScanProblem<S> problem() const {
    ScanProblem<S> p{};
    p.batch = batch, p.directions = directions, p.steps = steps, p.rows = rows, p.tokens = tokens;
    p.channels = channels, p.states = states, p.dt_rank = dt_rank;
    p.in_scan_order = in_scan_order, p.softplus = softplus;
    p.table = table.defined() ? table.const_data_ptr<int32_t>() : nullptr;
    p.u = data<S>(u), p.u_strides = strides(u);
    p.delta = data<S>(delta), p.delta_strides = strides(delta);
    p.B = data<S>(B), p.B_strides = strides(B), p.B_state_stride = B.stride(3);
    p.C = data<S>(C), p.C_strides = strides(C), p.C_state_stride = C.stride(3);
    p.A = data<T>(A), p.dt_weight = data<T>(dt_weight), p.D = data<T>(D), p.bias = data<T>(bias);
    return p;
  }

  int64_t checkpoints() const { return std::max<int64_t>((steps + kChunk - 1) / kChunk - 1, 0); }
};

std::tuple<Tensor, Tensor, Tensor> directional_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                    const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                    const OptionalTensor& src, int64_t tokens,
                                                    const OptionalTensor& delta_bias,
                                                    const OptionalTensor& dt_weight, bool delta_softplus,
                                                    bool in_scan_order, bool save) {
  const ScanArguments a(u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus, in_scan_order);
  const auto options = compute_options(u);
  Tensor y = a.like(a.u, a.tokens, u.options());
  Tensor last = at::empty({a.batch, a.directions, a.states, a.channels}, options);
  Tensor checkpoints = at::empty({a.batch, a.directions, save ? a.checkpoints() : 0, a.states, a.channels}, options);
  dispatch(u.scalar_type(), [&](auto element) {
    using S = decltype(element);
    ScanProblem<S> p = a.problem<S>();
    p.y = memory<S>(y), p.y_strides = strides(y);
    p.last = memory<Compute<S>>(last);
    p.checkpoints = save ? memory<Compute<S>>(checkpoints) : nullptr;
    for_each_item(p, false, kernels<S>().scan.forward);
  });
  return {y, last, checkpoints};
}

// Sum over the second dimension in ascending order: (B, K, ...) -> (B, ...).
Tensor sum_directions(const Tensor& x) {
  if (x.size(1) == 1) return x.squeeze(1);
  Tensor sum = at::empty({x.size(0), x.size(2), x.size(3)}, x.options());
  const int64_t count = x.size(1), size = x.size(2) * x.size(3), pieces = ceil_div(size, 1024);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sum_directions", [&] {
    at::parallel_for(0, x.size(0) * pieces, 16, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t batch = piece / pieces, first = piece % pieces * 1024, last = std::min(size, first + 1024);
        const scalar_t* from = x.const_data_ptr<scalar_t>() + batch * count * size;
        scalar_t* to = sum.mutable_data_ptr<scalar_t>() + batch * size;
        for (int64_t j = first; j < last; ++j) to[j] = count ? from[j] : scalar_t(0);
        for (int64_t i = 1; i < count; ++i) {
          for (int64_t j = first; j < last; ++j) to[j] += from[i * size + j];
        }
      }
    });
  });
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> directional_scan_backward(
    const OptionalTensor& dy_, const OptionalTensor& dlast_, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& src, int64_t tokens,
    const OptionalTensor& delta_bias, const OptionalTensor& dt_weight, const Tensor& checkpoints_, bool delta_softplus,
    bool in_scan_order, std::array<bool, 7> wanted) {
  const ScanArguments a(u, delta, A, B, C, D, src, tokens, delta_bias, dt_weight, delta_softplus, in_scan_order);
  // Gradients of a single step are written in the dtype of the tokens. Sums over steps, directions or channels have the
  // dtype of the computation.
  const auto options = u.options(), sums = compute_options(u);
  const at::ScalarType type = u.scalar_type(), computed = compute_type(u);
  const int64_t batch = a.batch, K = a.directions, N = a.states, width = a.channels;
  Tensor dy = at::zeros({1, 1, 1, 1}, options).expand({batch, K, tokens, width});
  if (dy_) {
    check(*dy_, "grad_y", {batch, K, tokens, width}, type);
    dy = *dy_;
  }
  dy = a.readable(dy);
  Tensor dlast;
  if (dlast_) {
    check(*dlast_, "grad_last", {batch, K, N, width}, computed);
    dlast = dlast_->contiguous();
  }
  Tensor checkpoints = checkpoints_.contiguous();
  check(checkpoints, "checkpoints", {batch, K, a.checkpoints(), N, width}, computed);

  Tensor du, ddelta, dA, dB, dC, dD = at::empty({batch, K, width}, sums), dbias = at::empty_like(dD);
  // With a factor of delta, the rows of each direction are contiguous, for the products that follow.
  if (wanted[1]) {
    ddelta = dt_weight ? at::empty({K, batch, a.rows, width}, sums).transpose(0, 1) : a.like(a.delta, a.rows, options);
  }
  if (wanted[2]) dA = at::empty({batch, K, width, N}, sums);
  dispatch(type, [&](auto element) {
    using S = decltype(element);
    using T = Compute<S>;
    ScanProblem<S> p = a.problem<S>();
    // Sums in place save memory and, above all, the time to map it. The order of summation is the same.
    const int64_t items = items_of_sequence(p), enough = 4 * at::get_num_threads();
    const bool shared = u.dim() == 3;
    p.dB_in_parts = batch * (shared ? 1 : K) < enough;
    p.du_in_parts = !shared || (p.dB_in_parts && batch * items < enough);
    if (wanted[0]) {
      du = p.du_in_parts ? a.like(a.u, a.rows, shared ? sums : options) : at::empty({batch, a.rows, width}, sums);
      p.du_strides = strides(du);
      if (shared) {
        p.du_sum = memory<T>(du);
      } else {
        p.du = memory<S>(du);
      }
    }
    if (wanted[3] || wanted[4]) {
      dB = at::empty({p.dB_in_parts ? items : 1, batch, K, a.rows, N}, sums);
      dC = at::empty_like(dB);
    }
    p.checkpoints = memory<T>(checkpoints);
    p.dy = data<S>(dy), p.dy_strides = strides(dy);
    p.dlast = data<T>(dlast);
    if (ddelta.defined()) {
      p.ddelta_strides = strides(ddelta);
      if (dt_weight) {
        p.dproduct = memory<T>(ddelta);
      } else {
        p.ddelta = memory<S>(ddelta);
      }
    }
    p.dA = memory<T>(dA), p.dB = memory<T>(dB), p.dC = memory<T>(dC), p.dD = memory<T>(dD), p.dbias = memory<T>(dbias);
    for_each_item(p, true, kernels<S>().scan.backward, !p.du_in_parts, !p.dB_in_parts);
    if (shared && p.du_in_parts && du.defined()) du = sum_directions(du);
    if (width == 0 && dB.defined()) dB.zero_(), dC.zero_();
  });
  const auto summed = [&](int64_t i, const Tensor& x, at::ScalarType as) {
    return wanted[i] ? ordered_sum(x).to(as) : at::empty({0}, options.dtype(as));
  };
  return {wanted[0] ? du.to(type) : nothing(u), wanted[1] ? ddelta : nothing(u), summed(2, dA, computed),
          summed(3, dB, type), summed(4, dC, type), summed(5, dD, computed), summed(6, dbias, computed)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmlocalmamba, CPU, m) {
  m.impl("directional_scan", directional_scan);
  m.impl("directional_scan_backward", directional_scan_backward);
}

}  // namespace mmlocalmamba
