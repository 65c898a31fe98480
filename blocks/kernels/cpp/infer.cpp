// The branches of a convolutional block without gradients, several in one call: a 3×3 convolution in groups, batch norm,
// ReLU and a Linear, whose result is added to what came in; and batch norm and an MLP, added in their turn. And those of
// a block that mixes attention with convolution. It adds nothing to what the kernels do, but between their calls one
// thread alone is at work.

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

inline Affine affine(const float* const* norm, double eps, int64_t channels) {
  return {norm[0], norm[1], norm[2], norm[3], eps, channels};
}

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

  void infer(const E* x, const E* y, const Room& r, E* made) const {
    if (s.groups) y = convolved(x, r);
    if (y) product_onto(x, y, s.rows(), s.dim, w[PROJ_W], s.dim, w[PROJ_B], made);
    if (s.hidden) mlp(r, made);
  }

  const E* convolved(const E* x, const Room& r) const {
    const conv::Shape filters = s.convolution(s.last ? conv::LAST : 0), shape = s.convolution(conv::RELU);
    folded<Full>(w[CONV], nullptr, affine(w + NORM1, s.eps1, s.dim), true, s.dim, 9 * s.each(), r.weight, r.bias, s.threads, parallel);
    need(Call::filters(&filters, r.weight, r.filters, parallel));
    need(Call::convolve(&shape, x, r.filters, r.bias, nullptr, r.y, parallel));
    return r.y;
  }

  void mlp(const Room& r, E* made) const {
    const int64_t rows = s.rows(), dim = s.dim, hidden = s.hidden;
    const Affine norm2 = affine(w + NORM2, s.eps2, s.dim);
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

struct Mixed {  // as in infer.py
  int64_t batch;
  int32_t height, width, heads, pool, groups, threads;  // pool: tokens whose mean is one key
  int64_t attn, conv, hidden;                           // channels of the parts, and within the MLP
  double norm, pooled, project, eps1, eps2;             // what the norms add to variances
  int32_t last, layers;

  int64_t each() const { return int64_t(height) * width; }
  int64_t keys() const { return each() / pool; }
  int64_t rows() const { return batch * each(); }
  Shape convolution() const { return {batch, height, width, groups, threads, conv, 0, eps1, eps2, last, layers}; }
  Shape mlp() const { return {batch, height, width, 0, threads, attn + conv, hidden, eps1, eps2, last, layers}; }
};

enum {
  ATTN_NORM, Q_W = ATTN_NORM + 4, Q_B, K_W, K_B, V_W, V_B, POOLED, SEEN_W = POOLED + 4, SEEN_B, DOWN_W, DOWN_B, DOWN_NORM,
  BRANCHES = DOWN_NORM + 4
};

// Attention over part of the channels, added to what came in; a Linear of that, on which the convolution's branch goes;
// both side by side, and the MLP's branch on them.
template <class K>
struct Mixes : Linears<typename K::E> {
  using typename Linears<typename K::E>::E;
  using typename Linears<typename K::E>::Call;
  using Linears<E>::parallel, Linears<E>::product, Linears<E>::product_onto;

  const Mixed& s;
  const float* const* w;  // the parameters, in the order above, and then those of the branches; without pool, its are null
  const Shape conv_shape, mlp_shape;

  Mixes(const Mixed& s, const float* const* w, Parallel parallel)
      : Linears<E>{parallel, s.threads}, s(s), w(w), conv_shape(s.convolution()), mlp_shape(s.mlp()) {}

  struct Room {
    E *normed, *pooled, *q, *k, *v, *seen, *attended, *down, *convolved;
    float *softmax, *weight, *bias;
    typename Branches<K>::Room conv, mlp;
    Room(const Mixes& m, Arena& arena)
        : normed(arena.take<E>(m.s.rows() * m.s.attn)), pooled(arena.take<E>(m.s.batch * m.s.keys() * m.s.attn)),
          q(arena.take<E>(m.s.rows() * m.s.attn)), k(arena.take<E>(m.s.batch * m.s.keys() * m.s.attn)),
          v(arena.take<E>(m.s.batch * m.s.keys() * m.s.attn)), seen(normed), attended(arena.take<E>(m.s.rows() * m.s.attn)),
          down(arena.take<E>(m.s.rows() * m.s.conv)), convolved(arena.take<E>(m.s.rows() * m.s.conv)),
          softmax(arena.take<float>(2 * m.s.rows() * m.s.heads)), weight(arena.take<float>(m.s.conv * m.s.attn)),
          bias(arena.take<float>(m.s.conv)), conv(m.conv_shape, arena), mlp(m.mlp_shape, arena) {}
  };

  void infer(const E* x, const Room& r, E* made) const {
    const int64_t rows = s.rows(), keys = s.batch * s.keys(), attn = s.attn, conv = s.conv;
    normalised<K>(x, affine(w + ATTN_NORM, s.norm, attn), rows, attn, r.normed, s.threads, parallel);
    const E* y = s.pool > 1 ? pool(r) : r.normed;
    product(r.normed, rows, attn, w[Q_W], attn, w[Q_B], r.q);
    product(y, keys, attn, w[K_W], attn, w[K_B], r.k);
    product(y, keys, attn, w[V_W], attn, w[V_B], r.v);
    attend(r);
    product_onto(x, r.seen, rows, attn, w[SEEN_W], attn, w[SEEN_B], r.attended);
    folded<Full>(w[DOWN_W], w[DOWN_B], affine(w + DOWN_NORM, s.project, conv), true, conv, attn, r.weight, r.bias, s.threads,
                 parallel);
    product(r.attended, rows, attn, r.weight, conv, r.bias, r.down);
    Branches<K>{{parallel, s.threads}, conv_shape, w + BRANCHES}.infer(r.down, nullptr, r.conv, r.convolved);
    split(rows, attn + conv, s.threads, parallel, [&](int64_t first, int64_t end, int) {
      for (int64_t i = first; i < end; ++i) {
        E* const to = made + i * (attn + conv);
        std::memcpy(to, r.attended + i * attn, attn * sizeof(E));
        std::memcpy(to + attn, r.convolved + i * conv, conv * sizeof(E));
      }
    });
    Branches<K>{{parallel, s.threads}, mlp_shape, w + BRANCHES}.infer(made, nullptr, r.mlp, made);
  }

  // The means of tokens that follow each other, normalised; those that are left over at the end belong to no key.
  const E* pool(const Room& r) const {
    const Affine by = affine(w + POOLED, s.pooled, s.attn);
    const int64_t keys = s.keys(), width = s.attn;
    split(s.batch * keys, width, s.threads, parallel, [&](int64_t first, int64_t end, int) {
      for (int64_t i = first; i < end; ++i) {
        const E* from = r.normed + (i / keys * s.each() + i % keys * s.pool) * width;
        for (int64_t c = 0; c < width; c += LANES) {
          V sum = set(0.0f);
          for (int64_t k = 0; k < s.pool; ++k) sum += K::widen(from + k * width + c);
          K::narrow(r.pooled + i * width + c,
                    fma(sum * set(1.0f / s.pool), loadu(by.scale.data() + c), loadu(by.shift.data() + c)));
        }
      }
    });
    return r.pooled;
  }

  void attend(const Room& r) const {
    const int32_t keys = int32_t(s.keys()), d = int32_t(s.attn / s.heads);
    const attention::Shape shape{s.batch, s.heads, int32_t(s.each()), keys, d, s.threads, 1.0f / std::sqrt(float(d))};
    auto of = [&](E* at, int64_t tokens) {
      return attention::Rows{reinterpret_cast<char*>(at), tokens * s.attn, s.attn, d};
    };
    const attention::Rows rows[] = {of(r.q, s.each()), of(r.k, keys), of(r.v, keys), of(r.seen, s.each())};
    need(Call::attend(&shape, rows, r.softmax, parallel));
  }
};

template <class R, class S>
int64_t room(const S& s) {
  Arena arena{nullptr};
  R{s, arena};
  return arena.used;
}

}  // namespace

// Widths are whole vectors, of a group multiples of 32. With `groups` y is what the convolution gives of x, else what is
// given; without y nothing is added before the MLP, and `made` is x. `work`: of as many bytes as …_room says.
// infer_folded: weight and bias of a layer, whose bias may be null, with a norm in front of it or behind. Each gives 0,
// or 1 where memory ran out.
#define FUNCTIONS(K, END)                                                                                             \
  int infer_room##END(const Shape* s, int64_t* bytes, Parallel) {                                                     \
    return *bytes = room<Branches<K>::Room>(*s), 0;                                                                   \
  }                                                                                                                   \
  int infer_branches##END(const Shape* s, const K::E* x, const K::E* y, const float* const* params, char* work,       \
                          K::E* made, Parallel parallel) {                                                            \
    Arena room{work};                                                                                                 \
    return guarded([&] { Branches<K>{{parallel, s->threads}, *s, params}.infer(x, y, {*s, room}, made); });           \
  }                                                                                                                   \
  int mixed_room##END(const Mixed* s, int64_t* bytes, Parallel) {                                                     \
    return *bytes = room<Mixes<K>::Room>(Mixes<K>(*s, nullptr, nullptr)), 0;                                          \
  }                                                                                                                   \
  int infer_mixed##END(const Mixed* s, const K::E* x, const float* const* params, char* work, K::E* made,             \
                       Parallel parallel) {                                                                           \
    Arena room{work};                                                                                                 \
    return guarded([&] {                                                                                              \
      const Mixes<K> mixes(*s, params, parallel);                                                                     \
      mixes.infer(x, {mixes, room}, made);                                                                            \
    });                                                                                                               \
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
