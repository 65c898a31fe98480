// The branches of a convolutional block without gradients, several in one call: a 3×3 convolution in groups, batch norm,
// ReLU and a Linear, whose result is added to what came in; and batch norm and an MLP, added in their turn. It adds
// nothing to what the kernels do, but between their calls one thread alone is at work.

#include "calls.h"

namespace {

#include "words.h"
#include "driver.h"
#include "rows.h"
#include "fold.h"

struct Shape {  // as in infer.py
  int64_t batch;
  int32_t height, width, groups, threads;
  int64_t dim, hidden;  // hidden: 0 where there is no MLP
  double eps1, eps2;
  int32_t last, layers;  // whether channels in lie side by side in the convolution's weight, and the kernel of two
                         // layers serves the MLP

  int64_t rows() const { return batch * height * width; }
  bool few() const { return rows() < hidden; }  // rows are fewer numbers than the MLP's first weight
  int32_t each() const { return int32_t(dim / groups); }
  conv::Shape convolution(int flags) const { return {batch, height, width, groups, each(), each(), threads, flags}; }
};

constexpr int64_t PIECE = 2048;  // rows of an MLP at a time, so that what is within stays in the cache

// A norm's parameters: weight, bias, mean and variance.
enum { CONV, NORM1, PROJ_W = NORM1 + 4, PROJ_B, NORM2, FC1_W = NORM2 + 4, FC1_B, FC2_W, FC2_B };

template <class K>
struct Branches : Linears<typename K::E> {
  using typename Linears<typename K::E>::E;
  using typename Linears<typename K::E>::Call;
  using Linears<E>::parallel, Linears<E>::product, Linears<E>::product_onto;

  const Shape& s;
  const float* const* w;  // the parameters, in the order above; without a convolution, or a bias, null

  struct Room {
    E *y, *hidden, *normed;
    float *weight, *bias, *filters, *weight1, *bias1;
    Room(const Shape& s, Arena& arena)
        : y(arena.take<E>(s.groups ? s.rows() * s.dim : 0)),
          hidden(arena.take<E>(s.layers ? 0 : std::min(s.rows(), PIECE) * s.hidden)),
          normed(arena.take<E>(s.few() ? s.rows() * s.dim : 0)),
          weight(arena.take<float>(s.groups ? 9 * s.dim * s.each() : 0)), bias(arena.take<float>(s.groups ? s.dim : 0)),
          filters(arena.take<float>(s.groups ? conv::POINTS * s.dim * s.each() : 0)),
          weight1(arena.take<float>(s.few() ? 0 : s.hidden * s.dim)), bias1(arena.take<float>(s.few() ? 0 : s.hidden)) {}
  };

  Affine norm(int at, double eps) const { return {w[at], w[at + 1], w[at + 2], w[at + 3], eps, s.dim}; }

  void infer(const E* x, const E* y, const Room& r, E* made) const {
    if (s.groups) y = convolved(x, r);
    if (y) product_onto(x, y, s.rows(), s.dim, w[PROJ_W], s.dim, w[PROJ_B], made);
    if (s.hidden) mlp(r, made);
  }

  const E* convolved(const E* x, const Room& r) const {
    const conv::Shape filters = s.convolution(s.last ? conv::LAST : 0), shape = s.convolution(conv::RELU);
    folded<Full>(w[CONV], nullptr, norm(NORM1, s.eps1), true, s.dim, 9 * s.each(), r.weight, r.bias, s.threads, parallel);
    need(Call::filters(&filters, r.weight, r.filters, parallel));
    need(Call::convolve(&shape, x, r.filters, r.bias, nullptr, r.y, parallel));
    return r.y;
  }

  void mlp(const Room& r, E* made) const {
    const int64_t rows = s.rows(), dim = s.dim, hidden = s.hidden;
    const Affine norm2 = norm(NORM2, s.eps2);
    const E* from = made;
    const float *weight = w[FC1_W], *bias = w[FC1_B];
    if (s.few()) {
      normalised<K>(made, norm2, rows, dim, r.normed, s.threads, parallel), from = r.normed;
    } else {
      folded<Full>(weight, bias, norm2, false, hidden, dim, r.weight1, r.bias1, s.threads, parallel);
      weight = r.weight1, bias = r.bias1;
    }
    if (s.layers) return this->two(from, rows, dim, weight, bias, products::RELU, hidden, w[FC2_W], w[FC2_B], dim, made);
    for (int64_t pieces = (rows + PIECE - 1) / PIECE, piece = 0; piece < pieces; ++piece) {
      const int64_t at = rows * piece / pieces, some = rows * (piece + 1) / pieces - at;
      E* own = made + at * dim;
      product(from + at * dim, some, dim, weight, hidden, bias, r.hidden, products::RELU);
      product_onto(own, r.hidden, some, hidden, w[FC2_W], dim, w[FC2_B], own);
    }
  }
};

template <class K>
void room(const Shape& s, int64_t* bytes) {
  Arena arena{nullptr};
  typename Branches<K>::Room{s, arena};
  *bytes = arena.used;
}

}  // namespace

// Widths are whole vectors, of a group multiples of 32. With `groups` y is what the convolution gives of x, else what is
// given; without y nothing is added before the MLP, and `made` is x. `work`: of as many bytes as infer_room says.
// infer_folded: weight and bias of a layer, whose bias may be null, with a norm in front of it or behind. Each gives 0,
// or 1 where memory ran out.
#define FUNCTIONS(K, END)                                                                                             \
  int infer_room##END(const Shape* s, int64_t* bytes, Parallel) { return room<K>(*s, bytes), 0; }                     \
  int infer_branches##END(const Shape* s, const K::E* x, const K::E* y, const float* const* params, char* work,       \
                          K::E* made, Parallel parallel) {                                                            \
    Arena room{work};                                                                                                 \
    return guarded([&] { Branches<K>{{parallel, s->threads}, *s, params}.infer(x, y, {*s, room}, made); });           \
  }                                                                                                                   \
  int infer_folded##END(const float* weight, const float* bias, const float* norm_weight, const float* norm_bias,     \
                        const float* mean, const float* variance, double eps, int behind, int64_t rows,               \
                        int64_t width, K::E* to, float* to_bias, int threads, Parallel parallel) {                    \
    return guarded([&] {                                                                                              \
      const Affine norm(norm_weight, norm_bias, mean, variance, eps, behind ? rows : width);                          \
      folded<K>(weight, bias, norm, behind, rows, width, to, to_bias, threads, parallel);                             \
    });                                                                                                               \
  }

extern "C" {
FUNCTIONS(Full, )
#ifdef __AVX512BF16__
FUNCTIONS(Half, _bf16)
#endif
}
