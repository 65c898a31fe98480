// The textbook encoder, forward and backward, by the kernels of norm, products, attention and GELU: one call for all.
//
// It adds nothing to what they do, but a small net loses a third of its time between them where each is called alone.

#include "calls.h"

namespace {

#include "words.h"
#include "driver.h"

struct Shape {  // as in encoder.py
  int64_t batch, count, rows;  // samples, tokens of each, and how many of these are wanted: the first
  int32_t dim, heads, hidden, threads;
  float eps1, eps2;
  int32_t layers;  // whether the kernel of two layers serves the MLP

  bool whole() const { return rows == count; }
  int64_t all() const { return batch * count; }
  int64_t some() const { return batch * rows; }
};

constexpr int64_t PIECE = 2048;  // rows of an MLP at a time, so that what is within stays in the cache

enum { NORM1_W, NORM1_B, QKV_W, QKV_B, PROJ_W, PROJ_B, NORM2_W, NORM2_B, FC1_W, FC1_B, FC2_W, FC2_B };

template <class K>
struct Encoder : Linears<typename K::E> {
  using typename Linears<typename K::E>::E;
  using typename Linears<typename K::E>::Call;
  using Linears<E>::below, Linears<E>::learn, Linears<E>::parallel, Linears<E>::product;

  const Shape& s;
  const float* const* w;  // the parameters, in the order above; without a bias null

  // What the backward pass wants of the forward pass. Queries, keys and values lie together in each token; where some
  // tokens alone are wanted, the queries of these before keys and values of all.
  struct Kept {
    float *stats1, *stats2, *softmax, *stream;
    E *qkv, *seen, *hidden;
    Kept(const Shape& s, Arena& arena)
        : stats1(arena.take<float>(2 * s.all())), stats2(arena.take<float>(2 * s.some())),
          softmax(arena.take<float>(2 * s.some() * s.heads)), stream(arena.take<float>(s.some() * s.dim)),
          qkv(arena.take<E>((s.some() + 2 * s.all()) * s.dim)), seen(arena.take<E>(s.some() * s.dim)),
          hidden(arena.take<E>(s.some() * s.hidden)) {}
  };

  struct Forward {  // room
    E *normed, *branch, *active, *first;
    float* stream;
    Forward(const Shape& s, Arena& arena)
        : normed(arena.take<E>(s.all() * s.dim)), branch(arena.take<E>(s.some() * s.dim)),
          active(arena.take<E>(s.some() * s.hidden)), first(arena.take<E>(s.whole() ? 0 : s.some() * s.dim)),
          stream(arena.take<float>(s.whole() ? 0 : s.some() * s.dim)) {}
  };

  struct Inference {  // room
    E *normed, *qkv, *seen, *branch, *first, *hidden;
    float *stream, *stats, *softmax;
    Inference(const Shape& s, Arena& arena)
        : normed(arena.take<E>(s.all() * s.dim)), qkv(arena.take<E>((s.some() + 2 * s.all()) * s.dim)),
          seen(arena.take<E>(s.some() * s.dim)), branch(arena.take<E>(s.some() * s.dim)),
          first(arena.take<E>(s.whole() ? 0 : s.some() * s.dim)),
          hidden(arena.take<E>(s.layers ? 0 : std::min(s.some(), PIECE) * s.hidden)),
          stream(arena.take<float>(s.whole() ? 0 : s.some() * s.dim)), stats(arena.take<float>(2 * s.all())),
          softmax(arena.take<float>(2 * s.some() * s.heads)) {}
  };

  struct Backward {  // room
    E *branch, *normed, *below, *first;
    float *stream, *parts;
    E *hidden, *active;  // in the first half
    E *seen, *qkv;       // and in the second
    Backward(const Shape& s, Arena& arena)
        : branch(arena.take<E>(s.some() * s.dim)), normed(arena.take<E>(s.all() * s.dim)),
          below(arena.take<E>(s.all() * s.dim)), first(arena.take<E>(s.whole() ? 0 : 2 * s.some() * s.dim)),
          stream(arena.take<float>(s.some() * s.dim)),
          parts(arena.take<float>(2 * s.dim * ((s.all() + norm::CHUNK - 1) / norm::CHUNK))) {
      Arena other = arena;
      hidden = arena.take<E>(s.some() * s.hidden), active = arena.take<E>(s.some() * s.hidden);
      seen = other.take<E>(s.some() * s.dim), qkv = other.take<E>((s.some() + 2 * s.all()) * s.dim);
      arena.used = std::max(arena.used, other.used);
    }
  };

  norm::Shape tokens(int64_t each, float eps = 0.0f) const { return {s.batch * each, each, s.dim, s.threads, 0, eps}; }

  // For each sample, where its tokens begin, and where those that are wanted do among these alone.
  template <class F>
  void each(const F& act) const {
    for (int64_t b = 0; b < s.batch; ++b) act(b * s.count * s.dim, b * s.rows * s.dim);
  }

  template <class X>
  void gather(const X* from, X* to) const {
    each([&](int64_t at, int64_t own) { std::memcpy(to + own, from + at, s.rows * s.dim * sizeof(X)); });
  }

  // Where queries, keys and values lie.
  void places(E* qkv, attention::Rows* to) const {
    const int64_t width = s.dim / s.heads, step = (s.whole() ? 3 : 2) * s.dim;
    E *kv = s.whole() ? qkv : qkv + s.some() * s.dim, *keys = s.whole() ? kv + s.dim : kv;
    const int64_t own = s.whole() ? step : s.dim;
    to[0] = {reinterpret_cast<char*>(qkv), s.rows * own, own, width};
    to[1] = {reinterpret_cast<char*>(keys), s.count * step, step, width};
    to[2] = {reinterpret_cast<char*>(keys + s.dim), s.count * step, step, width};
  }

  attention::Rows heads(E* x) const {
    return {reinterpret_cast<char*>(x), s.rows * s.dim, s.dim, s.dim / s.heads};
  }

  attention::Shape attention() const {
    const int d = s.dim / s.heads;
    return {s.batch, s.heads, int32_t(s.rows), int32_t(s.count), d, s.threads, float(1.0 / std::sqrt(double(d)))};
  }

  // Up to what the attention's branch gives. `first`, `stream`: room for the tokens that are wanted, if not all are.
  // Gives where these lie.
  const float* attend(const float* x, float* stats, E* normed, E* first, float* stream, E* qkv, float* softmax, E* seen,
                      E* branch) const {
    const int64_t all = s.all(), some = s.some(), dim = s.dim;
    const norm::Shape every = tokens(s.count, s.eps1);
    need(Call::norm(&every, x, nullptr, nullptr, w[NORM1_W], w[NORM1_B], nullptr, stats, normed, parallel));
    const float *weight = w[QKV_W], *bias = w[QKV_B];
    if (s.whole()) {
      product(normed, all, dim, weight, 3 * dim, bias, qkv);
    } else {
      gather(normed, first), gather(x, stream);
      product(first, some, dim, weight, dim, bias, qkv);
      product(normed, all, dim, weight + dim * dim, 2 * dim, bias ? bias + dim : nullptr, qkv + some * dim);
    }
    attention::Rows rows[4];
    places(qkv, rows), rows[3] = heads(seen);
    const attention::Shape shape = attention();
    need(Call::attend(&shape, rows, softmax, parallel));
    product(seen, some, dim, w[PROJ_W], dim, w[PROJ_B], branch);
    return s.whole() ? x : stream;
  }

  void forward(const float* x, const float* first, const float* second, const Kept& k, const Forward& f,
               float* out) const {
    const int64_t some = s.some(), dim = s.dim;
    const norm::Shape wanted = tokens(s.rows, s.eps2);
    const float* stream = attend(x, k.stats1, f.normed, f.first, f.stream, k.qkv, k.softmax, k.seen, f.branch);
    need(Call::norm(&wanted, stream, f.branch, first, w[NORM2_W], w[NORM2_B], k.stream, k.stats2, f.normed, parallel));
    product(f.normed, some, dim, w[FC1_W], s.hidden, w[FC1_B], k.hidden);
    need(Call::activate(k.hidden, nullptr, f.active, some * s.hidden, s.threads, parallel));
    product(f.active, some, s.hidden, w[FC2_W], dim, w[FC2_B], f.branch);
    need(Call::norm(&wanted, k.stream, f.branch, second, nullptr, nullptr, out, nullptr, nullptr, parallel));
  }

  void infer(const float* x, const Inference& i, float* out) const {
    const int64_t some = s.some(), dim = s.dim;
    const norm::Shape wanted = tokens(s.rows, s.eps2);
    const float* stream = attend(x, i.stats, i.normed, i.first, i.stream, i.qkv, i.softmax, i.seen, i.branch);
    need(Call::norm(&wanted, stream, i.branch, nullptr, w[NORM2_W], w[NORM2_B], out, i.stats, i.normed, parallel));
    if (s.layers)
      return this->two(i.normed, some, dim, w[FC1_W], w[FC1_B], products::GELU, s.hidden, w[FC2_W], w[FC2_B], dim, out);
    for (int64_t pieces = (some + PIECE - 1) / PIECE, piece = 0; piece < pieces; ++piece) {
      const int64_t at = some * piece / pieces, rows = some * (piece + 1) / pieces - at;
      product(i.normed + at * dim, rows, dim, w[FC1_W], s.hidden, w[FC1_B], i.hidden, products::GELU);
      product(i.hidden, rows, s.hidden, w[FC2_W], dim, w[FC2_B], i.branch + at * dim);
    }
    need(Call::norm(&wanted, out, i.branch, nullptr, nullptr, nullptr, out, nullptr, nullptr, parallel));
  }

  // `g`: where the gradients of the parameters go. That of a norm's bias lies behind that of its weight.
  void backward(const float* x, const float* first, const float* second, const Kept& k, const float* grad,
                const Backward& b, float* dx, float* const* g) const {
    const int64_t all = s.all(), some = s.some(), dim = s.dim;
    const norm::Shape every = tokens(s.count), wanted = tokens(s.rows);
    const E* branch = b.branch;
    if constexpr (sizeof(E) == sizeof(float)) branch = second ? branch : grad;
    if (branch == b.branch) need(Call::scale(&wanted, grad, second, b.branch, parallel));
    below(branch, some, dim, w[FC2_W], s.hidden, b.hidden);
    need(Call::activate(k.hidden, b.hidden, b.active, some * s.hidden, s.threads, parallel));
    learn(branch, some, dim, b.active, s.hidden, g[FC2_W], g[FC2_B]);
    need(Call::norm_again(&wanted, k.stream, w[NORM2_W], w[NORM2_B], k.stats2, b.normed, parallel));
    learn(b.hidden, some, s.hidden, b.normed, dim, g[FC1_W], g[FC1_B]);
    below(b.hidden, some, s.hidden, w[FC1_W], dim, b.below);
    need(Call::norm_back(&wanted, k.stream, w[NORM2_W], k.stats2, b.below, grad, first, b.stream, b.branch, b.parts,
                         g[NORM2_W], parallel));
    learn(b.branch, some, dim, k.seen, dim, g[PROJ_W], g[PROJ_B]);
    below(b.branch, some, dim, w[PROJ_W], dim, b.seen);
    attention::Rows rows[7];
    places(k.qkv, rows), rows[3] = heads(b.seen), places(b.qkv, rows + 4);
    const attention::Shape shape = attention();
    need(Call::attend_back(&shape, rows, k.softmax, parallel));
    need(Call::norm_again(&every, x, w[NORM1_W], w[NORM1_B], k.stats1, b.normed, parallel));
    float *qkv = g[QKV_W], *bias = g[QKV_B];
    if (s.whole()) {
      learn(b.qkv, all, 3 * dim, b.normed, dim, qkv, bias);
      below(b.qkv, all, 3 * dim, w[QKV_W], dim, b.below);
    } else {
      const E* kv = b.qkv + some * dim;
      E* queries = b.first + some * dim;
      gather(b.normed, b.first);
      learn(b.qkv, some, dim, b.first, dim, qkv, bias);
      learn(kv, all, 2 * dim, b.normed, dim, qkv + dim * dim, bias ? bias + dim : nullptr);
      below(b.qkv, some, dim, w[QKV_W], dim, queries);
      below(kv, all, 2 * dim, w[QKV_W] + dim * dim, dim, b.below);
      each([&](int64_t at, int64_t own) {  // the gradients that the queries' tokens have besides
        for (int64_t i = 0; i < s.rows * dim; i += LANES)
          K::narrow(b.below + at + i, K::widen(b.below + at + i) + K::widen(queries + own + i));
      });
    }
    need(Call::norm_back(&every, x, w[NORM1_W], k.stats1, b.below, s.whole() ? b.stream : nullptr, nullptr, dx, nullptr,
                         b.parts, g[NORM1_W], parallel));
    if (s.whole()) return;
    each([&](int64_t at, int64_t own) {
      for (int64_t i = 0; i < s.rows * dim; i += LANES) storeu(dx + at + i, loadu(dx + at + i) + loadu(b.stream + own + i));
    });
  }
};

template <class K>
void room(const Shape& s, int64_t* bytes) {
  Arena kept{nullptr}, forward{nullptr}, backward{nullptr}, inference{nullptr};
  typename Encoder<K>::Kept{s, kept}, typename Encoder<K>::Forward{s, forward};
  typename Encoder<K>::Backward{s, backward}, typename Encoder<K>::Inference{s, inference};
  bytes[0] = kept.used, bytes[1] = forward.used, bytes[2] = backward.used, bytes[3] = inference.used;
}

}  // namespace

// Parameters and their gradients in the order above; null where there is none. `kept`, `work`: of as many bytes as
// encoder_room says for what the forward pass keeps, and for the work of each pass. Each gives 0, or 1 where memory ran
// out.
#define FUNCTIONS(K, END)                                                                                           \
  int encoder_room##END(const Shape* s, int64_t* bytes, Parallel) { return room<K>(*s, bytes), 0; }                 \
  int encoder_forward##END(const Shape* s, const float* x, const float* const* params, const float* first,          \
                           const float* second, char* kept, char* work, float* out, Parallel parallel) {            \
    Arena stays{kept}, room{work};                                                                                  \
    return guarded([&] {                                                                                            \
      Encoder<K>{{parallel, s->threads}, *s, params}.forward(x, first, second, {*s, stays}, {*s, room}, out);       \
    });                                                                                                             \
  }                                                                                                                 \
  int encoder_inference##END(const Shape* s, const float* x, const float* const* params, char* work, float* out,    \
                             Parallel parallel) {                                                                   \
    Arena room{work};                                                                                               \
    return guarded([&] { Encoder<K>{{parallel, s->threads}, *s, params}.infer(x, {*s, room}, out); });              \
  }                                                                                                                 \
  int encoder_backward##END(const Shape* s, const float* x, const float* const* params, const float* first,         \
                            const float* second, char* kept, const float* grad, char* work, float* dx,              \
                            float* const* grads, Parallel parallel) {                                               \
    Arena stays{kept}, room{work};                                                                                  \
    return guarded([&] {                                                                                            \
      Encoder<K>{{parallel, s->threads}, *s, params}.backward(x, first, second, {*s, stays}, grad, {*s, room}, dx,  \
                                                              grads);                                               \
    });                                                                                                             \
  }

extern "C" {
FUNCTIONS(Full, )
#ifdef __AVX512BF16__
FUNCTIONS(Half, _bf16)
#endif
}
