// The causal depthwise convolution along scans, with channels in vector lanes.

namespace mmlocalmamba {
namespace {

// x and, in the backward pass, the gradient before SiLU: the chunk's steps behind the W - 1 before it.
template <typename T>
struct ConvScratch {
  int64_t* token;
  V<T> *x, *gradient;     // (block, W - 1 + step)
  V<T> *weight, *dweight; // (block, tap)
  V<T> *bias, *dbias;     // per block

  ConvScratch(Scratch& s, int64_t W)
      : token(s.take<int64_t>(kChunk + W)), x(s.take<V<T>>(kBlocks * (kChunk + W))),
        gradient(s.take<V<T>>(kBlocks * (kChunk + W))), weight(s.take<V<T>>(kBlocks * W)),
        dweight(s.take<V<T>>(kBlocks * W)), bias(s.take<V<T>>(kBlocks)), dbias(s.take<V<T>>(kBlocks)) {}
};

template <typename T>
int64_t conv_scratch(int64_t width) {
  Scratch scratch{nullptr};
  ConvScratch<T> arrays(scratch, width);
  return scratch.used;
}

template <typename S>
INLINE int64_t conv_token(const ConvProblem<S>& p, Item item, int64_t step) {
  if (step < 0 || step >= p.steps) return -1;
  return p.table ? p.table[item.direction * p.steps + step] : step;
}

template <typename S, typename T = Compute<S>>
void conv_open(const ConvProblem<S>& p, Item item, const Channels<T>& channels, const ConvScratch<T>& c) {
  for (int64_t block = 0; block < channels.blocks; ++block) {
    const int64_t channel = item.direction * p.channels + channels.begin(block);
    const int lanes = channels.lanes(block);
    c.bias[block] = p.bias ? load(p.bias + channel, lanes) : V<T>{};
    c.dbias[block] = V<T>{};
    for (int64_t j = 0; j < p.width; ++j) {
      c.weight[block * p.width + j] = c.dweight[block * p.width + j] = V<T>{};
      for (int lane = 0; lane < lanes; ++lane) {
        c.weight[block * p.width + j][lane] = p.weight[(channel + lane) * p.width + j];
      }
    }
    for (int64_t i = 0; i < p.width - 1; ++i) {
      c.x[block * (kChunk + p.width) + i] = c.gradient[block * (kChunk + p.width) + i] = V<T>{};
    }
  }
}

// The last W - 1 of a chunk come before those of the next.
template <typename T>
INLINE void conv_carry(V<T>* x, int64_t steps, int64_t W) {
  for (int64_t i = 0; i < W - 1; ++i) x[i] = x[steps + i];
}

template <typename T>
INLINE V<T> conv_at(const V<T>* x, const V<T>* weight, V<T> bias, int64_t W) {
  for (int64_t j = 0; j < W; ++j) bias += weight[j] * x[j];
  return bias;
}

template <typename S, typename T = Compute<S>>
void conv_forward(const ConvProblem<S>& p, Item item, void* memory) {
  const int64_t W = p.width;
  const Channels<T> channels(p.channels, item);
  Scratch scratch{static_cast<char*>(memory)};
  const ConvScratch<T> c(scratch, W);
  conv_open(p, item, channels, c);
  for (int64_t start = 0; start < p.steps; start += kChunk) {
    const int64_t steps = p.steps - start < kChunk ? p.steps - start : kChunk;
    for (int64_t t = 0; t < steps; ++t) c.token[t] = conv_token(p, item, start + t);
    for (int64_t block = 0; block < channels.blocks; ++block) {
      const int lanes = channels.lanes(block);
      const S* from = p.x + item.batch * p.x_strides.batch + channels.begin(block);
      S* y = p.y + ((item.direction * p.batch + item.batch) * p.steps + start) * p.channels + channels.begin(block);
      V<T>* x = c.x + block * (kChunk + W);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t next = conv_token(p, item, start + kChunk + t);
        PREFETCH(from, next, p.x_strides.row, 0);
        x[W - 1 + t] = c.token[t] < 0 ? V<T>{} : load(from + c.token[t] * p.x_strides.row, lanes);
      }
      side_by_side(steps, [&](int64_t t, auto count) __attribute__((always_inline)) {
        V<T> sums[count];
        for (int i = 0; i < count; ++i) sums[i] = conv_at<T>(x + t + i, c.weight + block * W, c.bias[block], W);
        silu<T, count>(sums, nullptr);
        for (int i = 0; i < count; ++i) store(y + (t + i) * p.channels, sums[i], lanes);
      });
      conv_carry<T>(x, steps, W);
    }
  }
}

template <typename S, typename T = Compute<S>>
void conv_backward(const ConvProblem<S>& p, Item item, void* memory) {
  const int64_t W = p.width, sequence = item.batch * p.directions + item.direction;
  const Channels<T> channels(p.channels, item);
  Scratch scratch{static_cast<char*>(memory)};
  const ConvScratch<T> c(scratch, W);
  conv_open(p, item, channels, c);
  // The gradient of a step's x is complete W - 1 steps later, hence as many steps more, which have no gradient.
  const int64_t total = p.steps + W - 1;
  for (int64_t start = 0; start < total; start += kChunk) {
    const int64_t steps = total - start < kChunk ? total - start : kChunk;
    for (int64_t t = 0; t < steps + W - 1; ++t) c.token[t] = conv_token(p, item, start - (W - 1) + t);
    for (int64_t block = 0; block < channels.blocks; ++block) {
      const int lanes = channels.lanes(block);
      const S* from = p.x + item.batch * p.x_strides.batch + channels.begin(block);
      const S* dy = p.dy + offset(p.dy_strides, item) + start * p.dy_strides.row + channels.begin(block);
      T* dx = p.dx ? p.dx + item.batch * p.tokens * p.channels + channels.begin(block) : nullptr;
      V<T>* x = c.x + block * (kChunk + W);
      V<T>* gradient = c.gradient + block * (kChunk + W);
      const V<T>* weight = c.weight + block * W;
      V<T>* dweight = c.dweight + block * W;
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t now = c.token[W - 1 + t], next = conv_token(p, item, start + kChunk + t);
        PREFETCH(from, next, p.x_strides.row, 0);
        if (dx) PREFETCH(dx, next, p.channels, 1);
        x[W - 1 + t] = now < 0 ? V<T>{} : load(from + now * p.x_strides.row, lanes);
      }
      const int64_t left = p.steps > start ? p.steps - start : 0, real = left < steps ? left : steps;
      side_by_side(real, [&](int64_t t, auto count) __attribute__((always_inline)) {
        V<T> sums[count], slopes[count];
        for (int i = 0; i < count; ++i) sums[i] = conv_at<T>(x + t + i, weight, c.bias[block], W);
        silu<T, count>(sums, slopes);
        for (int i = 0; i < count; ++i) {
          const V<T> g = load(dy + (t + i) * p.dy_strides.row, lanes) * slopes[i];
          gradient[W - 1 + t + i] = g;
          if (!p.dweight) continue;
          c.dbias[block] += g;
          for (int64_t j = 0; j < W; ++j) dweight[j] += g * x[t + i + j];
        }
      });
      for (int64_t t = real; t < steps; ++t) gradient[W - 1 + t] = V<T>{};
      for (int64_t t = 0; dx && t < steps; ++t) {
        const int64_t token = c.token[t];  // of step start + t - (W - 1)
        if (token < 0) continue;
        V<T> sum{};
        for (int64_t j = 0; j < W; ++j) sum += weight[j] * gradient[W - 1 + t - j];
        T* to = dx + token * p.channels;
        store(to, item.direction ? load(to, lanes) + sum : sum, lanes);
      }
      conv_carry<T>(x, steps, W);
      conv_carry<T>(gradient, steps, W);
    }
  }
  for (int64_t block = 0; p.dweight && block < channels.blocks; ++block) {
    const int64_t channel = sequence * p.channels + channels.begin(block);
    const int lanes = channels.lanes(block);
    store(p.dbias + channel, c.dbias[block], lanes);
    for (int lane = 0; lane < lanes; ++lane) {
      for (int64_t j = 0; j < W; ++j) p.dweight[(channel + lane) * W + j] = c.dweight[block * W + j][lane];
    }
  }
}

}  // namespace
}  // namespace mmlocalmamba
