// Batch normalisation of training on a matrix, a channel in each column, with ReLU behind it: torch's own sums over the
// rows are in float32 where channels come last, and so less exact the more rows there are.

#include "calls.h"

namespace {

#include "words.h"
#include "rows.h"

// Means, and sums of squares about them, of `count` rows more are put to those of `before`.
inline void merge(double* mean, double* square, double before, double other, double other_square, double count) {
  double apart = other - *mean, all = before + count;
  *mean += apart * (count / all);
  *square += other_square + apart * apart * (before * count / all);
}

template <class K>
void moments(const typename K::E* x, int64_t rows, int64_t width, double* mean, double* square) {
  for (int64_t first = 0; first < rows; first += BLOCK, x += BLOCK * width) {
    int count = int(std::min<int64_t>(BLOCK, rows - first));
    columns(width, [&](int64_t c, auto vectors) {
      constexpr int N = decltype(vectors)::value;
      V sum[N], left[N], about[N];
      for (int n = 0; n < N; ++n) sum[n] = left[n] = about[n] = set(0.0f);
      for (int r = 0; r < count; ++r)
        for (int n = 0; n < N; ++n) sum[n] = sum[n] + K::widen(x + r * width + c + n * LANES);
      for (int n = 0; n < N; ++n) sum[n] = sum[n] * set(1.0f / count);
      for (int r = 0; r < count; ++r)
        for (int n = 0; n < N; ++n) {
          V d = K::widen(x + r * width + c + n * LANES) - sum[n];
          left[n] = left[n] + d;
          about[n] = fma(d, d, about[n]);
        }
      float s[N * LANES], l[N * LANES], a[N * LANES];
      for (int n = 0; n < N; ++n)
        storeu(s + n * LANES, sum[n]), storeu(l + n * LANES, left[n]), storeu(a + n * LANES, about[n]);
      for (int i = 0; i < N * LANES; ++i) {
        double rest = double(l[i]) / count;
        merge(mean + c + i, square + c + i, double(first), s[i] + rest, a[i] - rest * l[i], count);
      }
    });
  }
}

// The mean of each column, and its variance.
template <class K>
void stats(const void* from, int64_t rows, int64_t width, double* mean, double* variance, int threads,
           Parallel parallel) {
  auto x = static_cast<const typename K::E*>(from);
  std::vector<double> room(size_t(threads) * 2 * width);
  std::vector<int64_t> counts(threads);
  int parts = split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int i) {
    double* own = room.data() + size_t(i) * 2 * width;
    counts[i] = end - first;
    moments<K>(x + first * width, end - first, width, own, own + width);
  });
  std::fill(mean, mean + width, 0.0), std::fill(variance, variance + width, 0.0);
  for (int64_t i = 0, before = 0; i < parts; before += counts[i++])
    for (int64_t c = 0; c < width; ++c) {
      const double* own = room.data() + size_t(i) * 2 * width + c;
      merge(mean + c, variance + c, double(before), own[0], own[width], double(counts[i]));
    }
  for (int64_t c = 0; c < width; ++c) variance[c] /= double(rows);
}

// x·scale + shift, and ReLU.
template <class K>
void apply(const void* from, int64_t rows, int64_t width, const float* scale, const float* shift, bool relu, void* to,
           int threads, Parallel parallel) {
  using E = typename K::E;
  const V low = set(relu ? 0.0f : -INFINITY);
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      const E* x = static_cast<const E*>(from) + r * width;
      E* y = static_cast<E*>(to) + r * width;
      for (int64_t c = 0; c < width; c += LANES)
        K::narrow(y + c, max(low, fma(K::widen(x + c), loadu(scale + c), loadu(shift + c))));
    }
  });
}

// The sums of each column: of the gradient behind ReLU's slope, and of its product with x less its mean.
template <class K>
void sums(const void* from, const void* given, int64_t rows, int64_t width, const float* scale, const float* shift,
          const float* mean, bool relu, double* sum, double* product, int threads, Parallel parallel) {
  using E = typename K::E;
  double* const to[] = {sum, product};
  column_sums<2>(rows, width, to, threads, parallel, [&](int64_t r, int64_t c, V* found) {
    V a = K::widen(static_cast<const E*>(from) + r * width + c);
    V d = K::widen(static_cast<const E*>(given) + r * width + c);
    if (relu) d = above(fma(a, loadu(scale + c), loadu(shift + c)), d);
    found[0] = found[0] + d;
    found[1] = fma(d, a - loadu(mean + c), found[1]);
  });
}

// gradient · scale + (x - mean) · slope + offset, the gradient of x.
template <class K>
void gradient(const void* from, const void* given, int64_t rows, int64_t width, const float* scale, const float* shift,
              const float* mean, const float* slope, const float* offset, bool relu, void* to, int threads,
              Parallel parallel) {
  using E = typename K::E;
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      const E *x = static_cast<const E*>(from) + r * width, *grad = static_cast<const E*>(given) + r * width;
      E* made = static_cast<E*>(to) + r * width;
      for (int64_t c = 0; c < width; c += LANES) {
        V a = K::widen(x + c), d = K::widen(grad + c), by = loadu(scale + c);
        if (relu) d = above(fma(a, by, loadu(shift + c)), d);
        K::narrow(made + c, fma(d, by, fma(a - loadu(mean + c), loadu(slope + c), loadu(offset + c))));
      }
    }
  });
}

// From the moments: the norm's scale and shift on x; and the running statistics, where there are any.
void fold(int64_t rows, int64_t width, const double* mean, const double* variance, const float* weight,
          const float* bias, double eps, double momentum, float* running_mean, float* running_var, float* folded) {
  for (int64_t c = 0; c < width; ++c) {
    double scale = weight[c] / std::sqrt(variance[c] + eps);
    folded[c] = float(scale);
    folded[width + c] = float(bias[c] - mean[c] * scale);
    folded[2 * width + c] = float(mean[c]);
    if (!running_mean) continue;
    double unbiased = variance[c] * double(rows) / double(rows - 1);
    running_mean[c] = float((1.0 - momentum) * running_mean[c] + momentum * mean[c]);
    running_var[c] = float((1.0 - momentum) * running_var[c] + momentum * unbiased);
  }
}

// From the sums over the columns: slope and offset of the gradient of x, and the gradients of weight and bias.
void back(int64_t rows, int64_t width, const double* mean, const double* variance, double eps, const float* folded,
          const double* sum, const double* product, float* slope, float* offset, float* weight, float* bias) {
  for (int64_t c = 0; c < width; ++c) {
    // The mean of which `product` knows is rounded.
    double root = 1.0 / std::sqrt(variance[c] + eps), scale = folded[c];
    double exact = product[c] - (mean[c] - folded[2 * width + c]) * sum[c];
    slope[c] = float(-scale * root * root * exact / double(rows));
    offset[c] = float(-scale * sum[c] / double(rows));
    weight[c] = float(exact * root);
    bias[c] = float(sum[c]);
  }
}

template <class K>
int forward(const void* x, int64_t rows, int64_t width, const float* weight, const float* bias, double eps,
            double momentum, float* running_mean, float* running_var, double* moments, float* folded, int relu,
            void* to, int threads, Parallel parallel) {
  return guarded([&] {
    stats<K>(x, rows, width, moments, moments + width, threads, parallel);
    fold(rows, width, moments, moments + width, weight, bias, eps, momentum, running_mean, running_var, folded);
    if (to) apply<K>(x, rows, width, folded, folded + width, relu, to, threads, parallel);
  });
}

template <class K>
int backward(const void* x, const void* grad, int64_t rows, int64_t width, double eps, const double* moments,
             const float* folded, int relu, float* weight, float* bias, void* to, int threads, Parallel parallel) {
  return guarded([&] {
    std::vector<double> found(2 * width);
    std::vector<float> line(2 * width);
    double *sum = found.data(), *product = sum + width;
    float *slope = line.data(), *offset = slope + width;
    const float *shift = folded + width, *mean = shift + width;
    sums<K>(x, grad, rows, width, folded, shift, mean, relu, sum, product, threads, parallel);
    back(rows, width, moments, moments + width, eps, folded, sum, product, slope, offset, weight, bias);
    if (to) gradient<K>(x, grad, rows, width, folded, shift, mean, slope, offset, relu, to, threads, parallel);
  });
}

}  // namespace

extern "C" {

// Rows of whole vectors. `moments`: mean and variance; `folded`: scale and shift on x, and the mean in float32. Where
// there are running statistics, they are brought on. `to` may be null, so may the running statistics.
int batch_norm(const void* x, int64_t rows, int64_t width, const float* weight, const float* bias, double eps,
               double momentum, float* running_mean, float* running_var, double* moments, float* folded, int relu,
               void* to, int threads, Parallel parallel) {
  return forward<Full>(x, rows, width, weight, bias, eps, momentum, running_mean, running_var, moments, folded, relu,
                       to, threads, parallel);
}

// The gradients of weight, bias and, where `to` is not null, of x.
int batch_norm_back(const void* x, const void* grad, int64_t rows, int64_t width, double eps, const double* moments,
                    const float* folded, int relu, float* weight, float* bias, void* to, int threads,
                    Parallel parallel) {
  return backward<Full>(x, grad, rows, width, eps, moments, folded, relu, weight, bias, to, threads, parallel);
}

#ifdef __AVX512BF16__
int batch_norm_bf16(const void* x, int64_t rows, int64_t width, const float* weight, const float* bias, double eps,
                    double momentum, float* running_mean, float* running_var, double* moments, float* folded, int relu,
                    void* to, int threads, Parallel parallel) {
  return forward<Half>(x, rows, width, weight, bias, eps, momentum, running_mean, running_var, moments, folded, relu,
                       to, threads, parallel);
}

int batch_norm_back_bf16(const void* x, const void* grad, int64_t rows, int64_t width, double eps,
                         const double* moments, const float* folded, int relu, float* weight, float* bias, void* to,
                         int threads, Parallel parallel) {
  return backward<Half>(x, grad, rows, width, eps, moments, folded, relu, weight, bias, to, threads, parallel);
}
#endif
}
