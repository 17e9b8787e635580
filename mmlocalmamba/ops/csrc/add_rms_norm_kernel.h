// The residual stream between two blocks, token by token: sum, rotation, RMSNorm.

namespace mmlocalmamba {
namespace {

template <typename T>
int64_t norm_scratch(int64_t channels) {
  return aligned((channels + kLanes<T>) * sizeof(T));
}

template <typename S, typename R, typename T = Compute<S>>
void add_rms_norm(const AddRMSNormProblem<S, R>& p, int64_t batch, int64_t piece, void* memory) {
  const TokenRange tokens(p.tokens, piece);
  const int64_t D = p.channels;
  T* sum = static_cast<T*>(memory);  // of one token
  for (int64_t l = tokens.begin; l < tokens.end; ++l) {
    const S* x = p.x + batch * p.x_strides.batch + l * p.x_strides.row;
    R* stream = p.sum + (batch * p.tokens + l) * D;
    S* out = p.out + (batch * p.tokens + l) * D;
    if (p.residual) {
      const R* residual = p.residual + batch * p.residual_strides.batch + l * p.residual_strides.row;
      for_channels<T>(D, [&](int64_t d, int lanes) { store(sum + d, load(x + d, lanes) + load(residual + d, lanes)); });
    } else {
      for_channels<T>(D, [&](int64_t d, int lanes) { store(sum + d, load(x + d, lanes)); });
    }
    if (p.cosine) {
      const T *cosine = p.cosine + l * D, *sine = p.sine + l * D;
      for (int64_t d = 0; d < D; d += 2) {
        const T a = sum[d], b = sum[d + 1];
        sum[d] = a * cosine[d] - b * sine[d];
        sum[d + 1] = b * cosine[d + 1] + a * sine[d + 1];
      }
    }
    V<T> squares{};
    for_channels<T>(D, [&](int64_t d, int lanes) {
      const V<T> f = load(sum + d);
      store(stream + d, f, lanes);
      squares += f * f;
    });
    const T inverse = T(1) / __builtin_sqrt(lane_sum<T>(squares) / D + p.eps);
    for_channels<T>(D, [&](int64_t d, int lanes) {
      store(out + d, load(sum + d) * load(p.weight + d, lanes) * inverse, lanes);
    });
  }
}

}  // namespace
}  // namespace mmlocalmamba
