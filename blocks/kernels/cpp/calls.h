// What kernels take that others call too, and these kernels; each is in float32 and, with _bf16 behind its name, in
// bfloat16, where what is of that precision is `E`. Where each stands it is told what it does.

#pragma once

#include "vector.h"

namespace norm {

struct Shape {  // as in norm.py
  int64_t rows, group;  // all rows, and those of one sample
  int32_t dim, threads;
  int32_t words;  // into which a row is divided, by whose channels it lies in memory while the norm goes by words; or 0
  float eps;
};

// Rows of float32, those of a sample together, the samples any distance apart.
struct Rows {
  float* at;
  int64_t sample;
  float* of(const Shape& s, int64_t row) const { return at + row / s.group * sample + row % s.group * s.dim; }
};

constexpr int CHUNK = 64;  // rows whose gradients of the weights are summed first

}  // namespace norm

namespace attention {

struct Shape {  // as in attention.py
  int64_t batch, heads;
  int32_t queries, keys, d, threads;
  float scale;
};

struct Rows {  // distances in elements
  char* at;
  int64_t batch, token, head;
  template <class E>
  E* of(int64_t b, int64_t h, int64_t row = 0) const {
    return reinterpret_cast<E*>(at) + b * batch + h * head + row * token;
  }
};

}  // namespace attention

namespace products {

struct Factor {  // as in products.py: element (row, k) lies at row · step + k, or turned at k · step + row
  const void* at;
  int64_t step;
  int32_t turned, single;  // single: float32, whatever the kind
  const int32_t* places;   // which row of memory, or turned which k, each is; or null for itself

  int64_t place(int64_t i) const { return places ? places[i] : i; }
  template <class E>
  const E* of(int64_t row, int64_t k) const {
    return static_cast<const E*>(at) + (turned ? place(k) * step + row : place(row) * step + k);
  }
};

struct Result {
  void* at;
  int32_t single, act;
  const void* base;  // to which it is added, as `at` in all: that itself, or other memory; or null
  const float* bias;
  float* sums;            // of the rows of the first factor, which is turned
  const void* mask;       // as `at` in all: where it is not above 0, nor is the product; or null
  const int32_t* places;  // of the rows, as a factor's
  float by = 1.0f;        // what all is multiplied by, but for sums
};

struct Size {
  int64_t m, n, k, threads;
};

enum { NONE, RELU, GELU };

struct Layers {  // as in layers.py
  int64_t rows, in, hidden, out, threads;
};

}  // namespace products

namespace conv {

struct Shape {  // as in conv.py; `in` and `out` of a group
  int64_t batch;
  int32_t height, width, groups, in, out, threads, flags;
};

enum { RELU = 1 };              // flags of a convolution: what comes behind it
enum { TURNED = 1, LAST = 2 };  // and of filters: for the way back; channels in lie side by side in the weight
constexpr int POINTS = 16;      // numbers that a filter becomes, at most

}  // namespace conv

#define KERNELS(E, END)                                                                                               \
  int norm_forward##END(const norm::Shape*, const float* x, const E* branch, const float* factor, const float* w,     \
                        const float* b, float* sum, float* stats, E* to, Parallel);                                   \
  int norm_again##END(const norm::Shape*, const float* x, const float* w, const float* b, const float* stats, E* to,  \
                      Parallel);                                                                                      \
  int norm_backward##END(const norm::Shape*, const float* x, const float* w, const float* stats, const E* grad,       \
                         const float* stream, const float* factor, float* dx, E* dbranch, float* parts, float* grads, \
                         Parallel);                                                                                   \
  int norm_scaled##END(const norm::Shape*, const float* x, const float* factor, E* to, Parallel);                     \
  int norm_onto##END(const norm::Shape*, const E* x, const float* w, const float* b, const norm::Rows* base,          \
                     float* stats, const norm::Rows* to, Parallel);                                                   \
  int norm_onto_back##END(const norm::Shape*, const E* x, const float* w, const float* stats, const norm::Rows* grad, \
                          E* dx, float* parts, float* grads, Parallel);                                               \
  int attention_forward##END(const attention::Shape*, const attention::Rows*, float* kept, Parallel);                 \
  int attention_backward##END(const attention::Shape*, const attention::Rows*, const float* kept, Parallel);          \
  int gemm##END(const products::Factor*, const products::Factor*, const products::Result*, const products::Size*,     \
                Parallel);                                                                                            \
  int two_layers##END(const products::Factor* x, const products::Factor* first, const float* bias,                    \
                      const products::Factor* second, const products::Result*, const products::Layers*, Parallel);    \
  int gelu##END(const void* x, void* grad, void* to, int64_t size, int threads, Parallel);                            \
  int conv_filters##END(const conv::Shape*, const float* weight, float* to, Parallel);                                \
  int conv_forward##END(const conv::Shape*, const E* map, const float* filters, const float* bias, const E* base,     \
                        E* to, Parallel);                                                                             \
  int conv_weight##END(const conv::Shape*, const E* map, const E* grad, float* to, Parallel);                         \
  int batch_norm##END(const void* x, int64_t rows, int64_t width, const float* weight, const float* bias, double eps, \
                      double momentum, float* running_mean, float* running_var, double* moments, float* folded,       \
                      int relu, void* to, int threads, Parallel);                                                     \
  int batch_norm_back##END(const void* x, const void* grad, int64_t rows, int64_t width, double eps,                  \
                           const double* moments, const float* folded, int relu, float* weight, float* bias,          \
                           void* to, int threads, Parallel);

extern "C" {
KERNELS(float, )
#ifdef __AVX512BF16__
KERNELS(uint16_t, _bf16)
#endif
int winograd_weight(const conv::Shape*, const float* map, const float* grad, float* to, Parallel);
}
#undef KERNELS
