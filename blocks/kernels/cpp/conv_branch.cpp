// Training of a residual branch of 3×3 convolution in groups, batch norm, ReLU and Linear, forward and backward.

#include "calls.h"

namespace {

#include "words.h"
#include "driver.h"
#include "kept.h"

struct Shape {  // as in conv_branch.py
  int64_t batch;
  int32_t height, width, groups, threads;
  int64_t dim, last;  // last: whether channels in lie side by side in the convolution's weight
  double eps, momentum;

  int64_t each() const { return int64_t(height) * width; }
  int64_t rows() const { return batch * each(); }
  int64_t size() const { return rows() * dim; }
  int32_t group() const { return int32_t(dim / groups); }
  conv::Shape convolution(int flags) const { return {batch, height, width, groups, group(), group(), threads, flags}; }
};

enum { CONV, SCALE, SHIFT, PROJ };

template <class K>
struct ConvBranch : Linears<typename K::E> {
  using typename Linears<typename K::E>::E;
  using typename Linears<typename K::E>::Call;
  using Linears<E>::below, Linears<E>::learn, Linears<E>::parallel, Linears<E>::product_onto;

  const Shape& s;
  const float* const* w;  // the parameters, in the order above
  const Samples samples;

  struct Kept {  // for the backward pass: what the convolution gave, and ReLU; and of the norm what it says of itself
    E *y, *active;
    double* moments;
    float* folded;
    Kept(const Shape& s, Arena& arena)
        : y(arena.take<E>(s.size())), active(arena.take<E>(s.size())), moments(arena.take<double>(2 * s.dim)),
          folded(arena.take<float>(3 * s.dim)) {}
  };

  struct Forward {  // room
    float* filters;
    Forward(const Shape& s, Arena& arena) : filters(arena.take<float>(conv::POINTS * s.dim * s.group())) {}
  };

  struct Backward {  // room
    float *filters, *weight;
    E* below;
    Backward(const Shape& s, Arena& arena)
        : filters(arena.take<float>(conv::POINTS * s.dim * s.group())), weight(arena.take<float>(9 * s.dim * s.group())),
          below(arena.take<E>(s.size())) {}
  };

  void convolve(const E* x, int turned, float* filters, const E* base, E* to) const {
    const conv::Shape weight = s.convolution(turned | (s.last ? conv::LAST : 0)), map = s.convolution(0);
    need(Call::filters(&weight, w[CONV], filters, parallel));
    need(Call::convolve(&map, x, filters, nullptr, base, to, parallel));
  }

  void forward(const E* x, float* mean, float* variance, const Kept& k, const Forward& f, E* out) const {
    convolve(x, 0, f.filters, nullptr, k.y);
    need(Call::batch_norm(k.y, s.rows(), s.dim, w[SCALE], w[SHIFT], s.eps, s.momentum, mean, variance, k.moments,
                          k.folded, true, k.active, s.threads, parallel));
    const int32_t* places = samples.from(0);
    if (samples.rows)
      product_onto(x, {k.active, places}, samples.rows, s.dim, w[PROJ], s.dim, nullptr, out, places, samples.by);
    samples.others(s.batch, [&](int64_t first, int64_t end) {
      std::memcpy(out + first * s.dim, x + first * s.dim, (end - first) * s.dim * sizeof(E));
    });
  }

  // `g`: where the gradients of the parameters go.
  void backward(const E* x, const Kept& k, const E* grad, const Backward& b, E* dx, float* const* g) const {
    const int32_t* places = samples.from(0);
    if (samples.rows) {
      learn({grad, places}, samples.rows, s.dim, {k.active, places}, s.dim, g[PROJ], nullptr, false, samples.by);
      below({grad, places}, samples.rows, s.dim, w[PROJ], s.dim, b.below, nullptr, places, samples.by);
    } else {
      std::memset(g[PROJ], 0, s.dim * s.dim * sizeof(float));
    }
    samples.others(s.batch, [&](int64_t first, int64_t end) {
      std::memset(b.below + first * s.dim, 0, (end - first) * s.dim * sizeof(E));
    });
    need(Call::batch_norm_back(k.y, b.below, s.rows(), s.dim, s.eps, k.moments, k.folded, true, g[SCALE], g[SHIFT],
                               b.below, s.threads, parallel));
    const conv::Shape shape = s.convolution(0);
    if constexpr (Linears<E>::SINGLE) {
      need(winograd_weight(&shape, x, b.below, b.weight, parallel));
    } else {
      need(Call::weigh(&shape, x, b.below, b.weight, parallel));
    }
    ordered(b.weight, g[CONV]);
    convolve(b.below, conv::TURNED, b.filters, grad, dx);
  }

  // The gradient of the convolution's weight, (groups, tap, out, in), as the weight lies.
  void ordered(const float* from, float* to) const {
    const int64_t n = s.group(), channel = s.last ? 1 : 9, tap = s.last ? n : 1;
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t t = 0; t < 9; ++t)
        for (int64_t o = 0; o < n; ++o, from += n)
          for (int64_t i = 0; i < n; ++i) to[(g * n + o) * 9 * n + t * tap + i * channel] = from[i];
  }
};

template <class K>
void room(const Shape& s, int64_t* bytes) {
  Arena kept{nullptr}, forward{nullptr}, backward{nullptr};
  typename ConvBranch<K>::Kept{s, kept}, typename ConvBranch<K>::Forward{s, forward};
  typename ConvBranch<K>::Backward{s, backward};
  bytes[0] = kept.used, bytes[1] = forward.used, bytes[2] = backward.used;
}

}  // namespace

// Channels of a group are multiples of 32. `kept`, `work`: of as many bytes as conv_branch_room says for what the forward
// pass keeps, and for the work of each pass. `keep`: what the branch of each sample is multiplied by, 0 or one number; or
// null. Each gives 0, or 1 where memory ran out.
#define FUNCTIONS(K, END)                                                                                         \
  int conv_branch_room##END(const Shape* s, int64_t* bytes, Parallel) { return room<K>(*s, bytes), 0; }           \
  int conv_branch_forward##END(const Shape* s, const K::E* x, const float* const* params, float* mean,            \
                               float* variance, const float* keep, char* kept, char* work, K::E* out,             \
                               Parallel parallel) {                                                               \
    Arena stays{kept}, room{work};                                                                                \
    return guarded([&] {                                                                                          \
      const ConvBranch<K> branch{{parallel, s->threads}, *s, params, {keep, s->batch, s->each()}};                \
      branch.forward(x, mean, variance, {*s, stays}, {*s, room}, out);                                            \
    });                                                                                                           \
  }                                                                                                               \
  int conv_branch_backward##END(const Shape* s, const K::E* x, const float* const* params, const float* keep,     \
                                char* kept, const K::E* grad, char* work, K::E* dx, float* const* grads,          \
                                Parallel parallel) {                                                              \
    Arena stays{kept}, room{work};                                                                                \
    return guarded([&] {                                                                                          \
      const ConvBranch<K> branch{{parallel, s->threads}, *s, params, {keep, s->batch, s->each()}};                \
      branch.backward(x, {*s, stays}, grad, {*s, room}, dx, grads);                                               \
    });                                                                                                           \
  }

extern "C" {
FUNCTIONS(Full, )
#ifdef __AVX512BF16__
FUNCTIONS(Half, _bf16)
#endif
}
