// Between words and tokens, forward and backward: the norm of a token's words as one row, a Linear without a bias, a
// norm, and the addition to the tokens. One call for the kernels of these, as in encoder.cpp.

#include "calls.h"

namespace {

#include "words.h"
#include "driver.h"

struct Shape {  // as in onto.py
  int64_t batch, count, prefix;  // samples, tokens of each, and those before them
  int32_t words, row, dim, threads;  // a row is all words of a token; if `words` is not 0, they lie in it by channels
  float eps1, eps2;

  int64_t rows() const { return batch * count; }
  // The kernel of the norm goes by words itself where these fill its vectors; elsewhere the weights are turned.
  bool turned() const { return words % 16; }
};

enum { NORM1_W, NORM1_B, PROJ, NORM2_W, NORM2_B };

// Each row of a matrix of `rows` · `columns`, turned.
void turn(const float* from, int64_t count, int rows, int columns, float* to) {
  for (int64_t i = 0; i < count; ++i, from += rows * columns, to += rows * columns)
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

template <class K>
struct Onto : Linears<typename K::E> {
  using typename Linears<typename K::E>::E;
  using typename Linears<typename K::E>::Call;
  using Linears<E>::below, Linears<E>::learn, Linears<E>::parallel, Linears<E>::product;

  const Shape& s;
  const float* const* given;  // the parameters, in the order above

  struct Kept {
    float *stats1, *stats2;
    E* projected;
    Kept(const Shape& s, Arena& arena)
        : stats1(arena.take<float>(2 * s.rows())), stats2(arena.take<float>(2 * s.rows())),
          projected(arena.take<E>(s.rows() * s.dim)) {}
  };

  struct Forward {  // room
    E* normed;
    float *norm, *proj;  // turned weights
    Forward(const Shape& s, Arena& arena)
        : normed(arena.take<E>(s.rows() * s.row)), norm(arena.take<float>(s.turned() ? 2 * s.row : 0)),
          proj(arena.take<float>(s.turned() ? int64_t(s.dim) * s.row : 0)) {}
  };

  struct Backward : Forward {
    E *projected, *below;
    float *parts, *dnorm, *dproj;
    Backward(const Shape& s, Arena& arena)
        : Forward(s, arena), projected(arena.take<E>(s.rows() * s.dim)), below(arena.take<E>(s.rows() * s.row)),
          parts(arena.take<float>(2 * std::max(s.row, s.dim) * ((s.rows() + norm::CHUNK - 1) / norm::CHUNK))),
          dnorm(arena.take<float>(s.turned() ? 2 * s.row : 0)),
          dproj(arena.take<float>(s.turned() ? int64_t(s.dim) * s.row : 0)) {}
  };

  norm::Shape rows(int dim, float eps) const {
    return {s.rows(), s.count, dim, s.threads, dim == s.row && !s.turned() ? s.words : 0, eps};
  }

  // The first norm's parameters and the Linear's, as rows lie.
  std::array<const float*, 3> weights(const Forward& f) const {
    if (!s.turned()) return {given[NORM1_W], given[NORM1_B], given[PROJ]};
    const int channels = s.row / s.words;
    turn(given[NORM1_W], 1, s.words, channels, f.norm), turn(given[NORM1_B], 1, s.words, channels, f.norm + s.row);
    turn(given[PROJ], s.dim, s.words, channels, f.proj);
    return {f.norm, f.norm + s.row, f.proj};
  }

  void forward(const float* x, const norm::Rows& base, const norm::Rows& prefix, const Kept& k, const Forward& f,
               float* out) const {
    const auto [w, b, proj] = weights(f);
    const norm::Shape first = rows(s.row, s.eps1), second = rows(s.dim, s.eps2);
    need(Call::norm(&first, x, nullptr, nullptr, w, b, nullptr, k.stats1, f.normed, parallel));
    product(f.normed, s.rows(), s.row, proj, s.dim, nullptr, k.projected);
    const int64_t before = s.prefix * s.dim, each = before + s.count * s.dim;
    for (int64_t i = 0; before && i < s.batch; ++i)
      std::memcpy(out + i * each, prefix.at + i * prefix.sample, before * sizeof(float));
    const norm::Rows to{out + before, each};
    need(Call::onto(&second, k.projected, given[NORM2_W], given[NORM2_B], &base, k.stats2, &to, parallel));
  }

  // `g`: where the gradients of the parameters go. That of a norm's bias lies behind that of its weight.
  void backward(const float* x, const Kept& k, const norm::Rows& grad, const float* stream, const Backward& b,
                float* dx, float* const* g) const {
    const auto [w, bias, proj] = weights(b);
    const norm::Shape first = rows(s.row, 0.0f), second = rows(s.dim, 0.0f);
    float *dnorm = s.turned() ? b.dnorm : g[NORM1_W], *dproj = s.turned() ? b.dproj : g[PROJ];
    need(Call::onto_back(&second, k.projected, given[NORM2_W], k.stats2, &grad, b.projected, b.parts, g[NORM2_W],
                         parallel));
    need(Call::norm_again(&first, x, w, bias, k.stats1, b.normed, parallel));
    learn(b.projected, s.rows(), s.dim, b.normed, s.row, dproj, nullptr);
    below(b.projected, s.rows(), s.dim, proj, s.row, b.below);
    need(Call::norm_back(&first, x, w, k.stats1, b.below, stream, nullptr, dx, nullptr, b.parts, dnorm, parallel));
    if (!s.turned()) return;
    turn(dnorm, 2, s.row / s.words, s.words, g[NORM1_W]);
    turn(dproj, s.dim, s.row / s.words, s.words, g[PROJ]);
  }
};

template <class K>
void room(const Shape& s, int64_t* bytes) {
  Arena kept{nullptr}, forward{nullptr}, backward{nullptr};
  typename Onto<K>::Kept{s, kept}, typename Onto<K>::Forward{s, forward}, typename Onto<K>::Backward{s, backward};
  bytes[0] = kept.used, bytes[1] = forward.used, bytes[2] = backward.used;
}

}  // namespace

// Parameters and their gradients in the order above. `kept`, `work`: of as many bytes as onto_room says for what the
// forward pass keeps, and for the work of each pass. Each gives 0, or 1 where memory ran out.
#define FUNCTIONS(K, END)                                                                                             \
  int onto_room##END(const Shape* s, int64_t* bytes, Parallel) { return room<K>(*s, bytes), 0; }                      \
  int onto_forward##END(const Shape* s, const float* x, const float* const* params, const norm::Rows* base,           \
                        const norm::Rows* prefix, char* kept, char* work, float* out, Parallel parallel) {            \
    Arena stays{kept}, room{work};                                                                                    \
    return guarded([&] {                                                                                              \
      Onto<K>{{parallel, s->threads}, *s, params}.forward(x, *base, *prefix, {*s, stays}, {*s, room}, out);           \
    });                                                                                                               \
  }                                                                                                                   \
  int onto_backward##END(const Shape* s, const float* x, const float* const* params, char* kept,                      \
                         const norm::Rows* grad, const float* stream, char* work, float* dx, float* const* grads,     \
                         Parallel parallel) {                                                                         \
    Arena stays{kept}, room{work};                                                                                    \
    return guarded([&] {                                                                                              \
      Onto<K>{{parallel, s->threads}, *s, params}.backward(x, {*s, stays}, *grad, stream, {*s, room}, dx, grads);     \
    });                                                                                                               \
  }

extern "C" {
FUNCTIONS(Full, )
#ifdef __AVX512BF16__
FUNCTIONS(Half, _bf16)
#endif
}
