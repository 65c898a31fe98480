// What a branch of batch norm, Linear, ReLU and Linear does beside its products, each in one pass.

#include "vector.h"

namespace {

#include "words.h"
#include "rows.h"

// The gradient behind ReLU's slope, where `hidden` is what that gave, times a number for each `each` rows; and its sums.
template <class K>
void slope(const void* given, const void* hidden, const float* keep, int64_t each, int64_t rows, int64_t width, void* to,
           double* sum, int threads, Parallel parallel) {
  using E = typename K::E;
  column_sums<1>(rows, width, &sum, threads, parallel, [&](int64_t r, int64_t c, V* found) {
    int64_t at = r * width + c;
    V d = K::widen(static_cast<const E*>(given) + at);
    if (keep) d = d * set(keep[r / each]);
    if (hidden) d = above(K::widen(static_cast<const E*>(hidden) + at), d);
    if (to) K::narrow(static_cast<E*>(to) + at, d);
    found[0] = found[0] + d;
  });
}

// x + y, or y times a number for each `each` rows.
template <class K>
void added(const void* from, const void* branch, const float* keep, int64_t each, int64_t rows, int64_t width, void* to,
           int threads, Parallel parallel) {
  using E = typename K::E;
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      V by = set(keep ? keep[r / each] : 1.0f);
      for (int64_t at = r * width; at < (r + 1) * width; at += LANES)
        K::narrow(static_cast<E*>(to) + at, fma(K::widen(static_cast<const E*>(branch) + at), by,
                                                 K::widen(static_cast<const E*>(from) + at)));
    }
  });
}

// given + found · scale + (x - mean) · slope + offset.
template <class K>
void gradient(const void* given, const void* found, const void* from, int64_t rows, int64_t width, const float* scale,
              const float* mean, const float* slope, const float* offset, void* to, int threads, Parallel parallel) {
  using E = typename K::E;
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r)
      for (int64_t c = 0; c < width; c += LANES) {
        int64_t at = r * width + c;
        V a = K::widen(static_cast<const E*>(from) + at) - loadu(mean + c);
        V d = K::widen(static_cast<const E*>(given) + at) + fma(a, loadu(slope + c), loadu(offset + c));
        K::narrow(static_cast<E*>(to) + at, fma(K::widen(static_cast<const E*>(found) + at), loadu(scale + c), d));
      }
  });
}

// weight · scale, and bias + weight · shift.
template <class K>
void folded(const float* weight, const float* bias, const float* scale, const float* shift, int64_t rows, int64_t width,
            void* to, float* to_bias, int threads, Parallel parallel) {
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      V sum = set(0.0f);
      for (int64_t c = 0; c < width; c += LANES) {
        V w = loadu(weight + r * width + c);
        K::narrow(static_cast<typename K::E*>(to) + r * width + c, w * loadu(scale + c));
        sum = fma(w, loadu(shift + c), sum);
      }
      to_bias[r] = (bias ? bias[r] : 0.0f) + total(sum);
    }
  });
}

// Weight and bias of a layer with a norm of fixed statistics, which stands in front of it, or behind.
template <class K>
void fixed(const float* weight, const float* bias, const float* norm_weight, const float* norm_bias, const float* mean,
           const float* variance, double eps, bool behind, int64_t rows, int64_t width, void* to, float* to_bias,
           int threads, Parallel parallel) {
  const int64_t channels = behind ? rows : width;
  std::vector<float> scale(channels), shift(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double by = norm_weight[c] / std::sqrt(variance[c] + eps);
    scale[c] = float(by), shift[c] = float(norm_bias[c] - mean[c] * by);
  }
  if (!behind)
    return folded<K>(weight, bias, scale.data(), shift.data(), rows, width, to, to_bias, threads, parallel);
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      for (int64_t at = r * width; at < (r + 1) * width; at += LANES)
        K::narrow(static_cast<typename K::E*>(to) + at, loadu(weight + at) * set(scale[r]));
      to_bias[r] = shift[r] + (bias ? bias[r] * scale[r] : 0.0f);
    }
  });
}

// Of the folded weight's gradient and its bias's, in place, the weight's; and the sums over rows of gradient · weight and
// of bias · weight.
void unfolded(float* grad, const float* bias, const float* weight, const float* scale, const float* shift, int64_t rows,
              int64_t width, double* product, double* sum, int threads, Parallel parallel) {
  double* const to[] = {product, sum};
  column_sums<2>(rows, width, to, threads, parallel, [&](int64_t r, int64_t c, V* found) {
    V d = loadu(grad + r * width + c), w = loadu(weight + r * width + c), b = set(bias[r]);
    found[0] = fma(d, w, found[0]);
    found[1] = fma(b, w, found[1]);
    storeu(grad + r * width + c, fma(d, loadu(scale + c), b * loadu(shift + c)));
  });
}

}  // namespace

extern "C" {

// Widths are whole vectors.

int branch_unfolded(float* grad, const float* bias, const float* weight, const float* scale, const float* shift,
                    int64_t rows, int64_t width, double* product, double* sum, int threads, Parallel parallel) {
  return guarded([&] { unfolded(grad, bias, weight, scale, shift, rows, width, product, sum, threads, parallel); });
}

// Null may be: hidden, keep, to of the slope, and bias.
#define KERNELS(KIND, NAME)                                                                                           \
  int branch_slope##NAME(const void* given, const void* hidden, const float* keep, int64_t each, int64_t rows,        \
                         int64_t width, void* to, double* sum, int threads, Parallel parallel) {                      \
    return guarded([&] { slope<KIND>(given, hidden, keep, each, rows, width, to, sum, threads, parallel); });         \
  }                                                                                                                   \
  int branch_added##NAME(const void* x, const void* y, const float* keep, int64_t each, int64_t rows, int64_t width,  \
                         void* to, int threads, Parallel parallel) {                                                  \
    return guarded([&] { added<KIND>(x, y, keep, each, rows, width, to, threads, parallel); });                       \
  }                                                                                                                   \
  int branch_gradient##NAME(const void* given, const void* found, const void* x, int64_t rows, int64_t width,         \
                            const float* scale, const float* mean, const float* slope, const float* offset, void* to, \
                            int threads, Parallel parallel) {                                                         \
    return guarded([&] {                                                                                              \
      gradient<KIND>(given, found, x, rows, width, scale, mean, slope, offset, to, threads, parallel);                \
    });                                                                                                               \
  }                                                                                                                   \
  int branch_folded##NAME(const float* weight, const float* bias, const float* scale, const float* shift,             \
                          int64_t rows, int64_t width, void* to, float* to_bias, int threads, Parallel parallel) {    \
    return guarded([&] { folded<KIND>(weight, bias, scale, shift, rows, width, to, to_bias, threads, parallel); });   \
  }                                                                                                                   \
  int branch_fixed##NAME(const float* weight, const float* bias, const float* norm_weight, const float* norm_bias,    \
                         const float* mean, const float* variance, double eps, int behind, int64_t rows,              \
                         int64_t width, void* to, float* to_bias, int threads, Parallel parallel) {                   \
    return guarded([&] {                                                                                              \
      fixed<KIND>(weight, bias, norm_weight, norm_bias, mean, variance, eps, behind, rows, width, to, to_bias,        \
                  threads, parallel);                                                                                 \
    });                                                                                                               \
  }

KERNELS(Full, )
#ifdef __AVX512BF16__
KERNELS(Half, _bf16)
#endif
}
