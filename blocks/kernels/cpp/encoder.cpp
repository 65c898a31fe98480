// The textbook encoder, forward and backward, by the kernels of norm, products, attention and GELU: one call for all.
//
// It adds nothing to what they do, but a small net loses a third of its time between them where each is called alone. In
// training a branch is not computed for samples that stochastic depth drops.

#include "calls.h"

namespace {

#include "words.h"
#include "driver.h"
#include "kept.h"

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
  using Linears<E>::below, Linears<E>::learn, Linears<E>::parallel, Linears<E>::product, Linears<E>::product_onto;

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

  attention::Shape attention(const Samples& kept) const {
    const int d = s.dim / s.heads;
    const float scale = float(1.0 / std::sqrt(double(d)));
    return {kept.rows / kept.each, s.heads, int32_t(s.rows), int32_t(s.count), d, s.threads, scale};
  }

  // Samples whose attention is kept: all where some tokens alone are wanted.
  Samples attended(const float* keep) const { return {s.whole() ? keep : nullptr, s.batch, s.rows}; }

  // Up to what the attention's branch gives, 0 for samples that are dropped. `first`, `stream`: room for the tokens that
  // are wanted, if not all are. Gives where these lie.
  const float* attend(const float* x, const Samples& kept, float* stats, E* normed, E* first, float* stream, E* qkv,
                      float* softmax, E* seen, E* branch) const {
    const int64_t all = s.all(), some = s.some(), dim = s.dim;
    const int32_t* at = kept.from(0);
    kept.others(s.batch, [&](int64_t row, int64_t end) {
      std::memset(branch + row * dim, 0, (end - row) * dim * sizeof(E));
    });
    const norm::Shape every = tokens(s.count, s.eps1);
    need(Call::norm(&every, x, nullptr, nullptr, w[NORM1_W], w[NORM1_B], nullptr, stats, normed, parallel));
    if (!kept.rows) return x;
    const float *weight = w[QKV_W], *bias = w[QKV_B];
    if (s.whole()) {
      product({normed, at}, kept.rows, dim, weight, 3 * dim, bias, qkv);
    } else {
      gather(normed, first), gather(x, stream);
      product(first, some, dim, weight, dim, bias, qkv);
      product(normed, all, dim, weight + dim * dim, 2 * dim, bias ? bias + dim : nullptr, qkv + some * dim);
    }
    attention::Rows rows[4];
    places(qkv, rows), rows[3] = heads(seen);
    const attention::Shape shape = attention(kept);
    need(Call::attend(&shape, rows, softmax, parallel));
    product(seen, kept.rows, dim, w[PROJ_W], dim, w[PROJ_B], branch, products::NONE, at);
    return s.whole() ? x : stream;
  }

  void forward(const float* x, const float* first, const float* second, const Kept& k, const Forward& f,
               float* out) const {
    const int64_t dim = s.dim;
    const norm::Shape wanted = tokens(s.rows, s.eps2);
    const float* stream =
        attend(x, attended(first), k.stats1, f.normed, f.first, f.stream, k.qkv, k.softmax, k.seen, f.branch);
    need(Call::norm(&wanted, stream, f.branch, first, w[NORM2_W], w[NORM2_B], k.stream, k.stats2, f.normed, parallel));
    const Samples kept(second, s.batch, s.rows);
    const int32_t* at = kept.from(0);
    if (kept.rows) {
      product({f.normed, at}, kept.rows, dim, w[FC1_W], s.hidden, w[FC1_B], k.hidden);
      need(Call::activate(k.hidden, nullptr, f.active, kept.rows * s.hidden, s.threads, parallel));
      product_onto(k.stream, f.active, kept.rows, s.hidden, w[FC2_W], dim, w[FC2_B], out, at, kept.by);
    }
    kept.others(s.batch, [&](int64_t row, int64_t end) {
      std::memcpy(out + row * dim, k.stream + row * dim, (end - row) * dim * sizeof(float));
    });
  }

  void infer(const float* x, const Inference& i, float* out) const {
    const int64_t some = s.some(), dim = s.dim;
    const norm::Shape wanted = tokens(s.rows, s.eps2);
    const float* stream =
        attend(x, attended(nullptr), i.stats, i.normed, i.first, i.stream, i.qkv, i.softmax, i.seen, i.branch);
    need(Call::norm(&wanted, stream, i.branch, nullptr, w[NORM2_W], w[NORM2_B], out, i.stats, i.normed, parallel));
    if (s.layers)
      return this->two(i.normed, some, dim, w[FC1_W], w[FC1_B], products::GELU, s.hidden, w[FC2_W], w[FC2_B], dim, out);
    for (int64_t pieces = (some + PIECE - 1) / PIECE, piece = 0; piece < pieces; ++piece) {
      const int64_t at = some * piece / pieces, rows = some * (piece + 1) / pieces - at;
      float* own = out + at * dim;
      product(i.normed + at * dim, rows, dim, w[FC1_W], s.hidden, w[FC1_B], i.hidden, products::GELU);
      product_onto(own, i.hidden, rows, s.hidden, w[FC2_W], dim, w[FC2_B], own);
    }
  }

  // `g`: where the gradients of the parameters go. That of a norm's bias lies behind that of its weight.
  void backward(const float* x, const float* first, const float* second, const Kept& k, const float* grad,
                const Backward& b, float* dx, float* const* g) const {
    const int64_t dim = s.dim;
    const norm::Shape every = tokens(s.count), wanted = tokens(s.rows);
    auto nothing = [&](int at, int64_t out, int64_t in) {
      std::memset(g[at], 0, out * in * sizeof(float));
      if (g[at + 1]) std::memset(g[at + 1], 0, out * sizeof(float));
    };
    auto no_gradient = [&](int64_t row, int64_t end) {
      std::memset(b.below + row * dim, 0, (end - row) * dim * sizeof(E));
    };
    const E* given = b.branch;
    if constexpr (sizeof(E) == sizeof(float)) {
      given = grad;
    } else {
      need(Call::scale(&wanted, grad, nullptr, b.branch, parallel));
    }
    need(Call::norm_again(&wanted, k.stream, w[NORM2_W], w[NORM2_B], k.stats2, b.normed, parallel));
    const Samples kept(second, s.batch, s.rows);
    if (const int32_t* at = kept.from(0); kept.rows) {
      below({given, at}, kept.rows, dim, w[FC2_W], s.hidden, b.hidden, nullptr, nullptr, kept.by);
      need(Call::activate(k.hidden, b.hidden, b.active, kept.rows * s.hidden, s.threads, parallel));
      learn({given, at}, kept.rows, dim, b.active, s.hidden, g[FC2_W], g[FC2_B], false, kept.by);
      for (int64_t i = 0; g[FC2_B] && i < dim; ++i) g[FC2_B][i] *= kept.by;
      learn(b.hidden, kept.rows, s.hidden, {b.normed, at}, dim, g[FC1_W], g[FC1_B]);
      below(b.hidden, kept.rows, s.hidden, w[FC1_W], dim, b.below, nullptr, at);
    } else {
      nothing(FC1_W, s.hidden, dim), nothing(FC2_W, dim, s.hidden);
    }
    kept.others(s.batch, no_gradient);
    need(Call::norm_back(&wanted, k.stream, w[NORM2_W], k.stats2, b.below, grad, first, b.stream, b.branch, b.parts,
                         g[NORM2_W], parallel));
    attend_back(x, attended(first), k, b, g, nothing, no_gradient);
    need(Call::norm_back(&every, x, w[NORM1_W], k.stats1, b.below, s.whole() ? b.stream : nullptr, nullptr, dx, nullptr,
                         b.parts, g[NORM1_W], parallel));
    if (s.whole()) return;
    each([&](int64_t at, int64_t own) {
      for (int64_t i = 0; i < s.rows * dim; i += LANES)
        storeu(dx + at + i, loadu(dx + at + i) + loadu(b.stream + own + i));
    });
  }

  // From the gradient of the attention's branch to that of what its norm gives.
  template <class Nothing, class NoGradient>
  void attend_back(const float* x, const Samples& kept, const Kept& k, const Backward& b, float* const* g,
                   const Nothing& nothing, const NoGradient& no_gradient) const {
    const int64_t all = s.all(), some = s.some(), dim = s.dim;
    kept.others(s.batch, no_gradient);
    if (!kept.rows) return nothing(QKV_W, 3 * dim, dim), nothing(PROJ_W, dim, dim);
    const norm::Shape every = tokens(s.count);
    const int32_t* at = kept.from(0);
    learn({b.branch, at}, kept.rows, dim, k.seen, dim, g[PROJ_W], g[PROJ_B]);
    below({b.branch, at}, kept.rows, dim, w[PROJ_W], dim, b.seen);
    attention::Rows rows[7];
    places(k.qkv, rows), rows[3] = heads(b.seen), places(b.qkv, rows + 4);
    const attention::Shape shape = attention(kept);
    need(Call::attend_back(&shape, rows, k.softmax, parallel));
    need(Call::norm_again(&every, x, w[NORM1_W], w[NORM1_B], k.stats1, b.normed, parallel));
    float *qkv = g[QKV_W], *bias = g[QKV_B];
    if (s.whole()) {
      learn(b.qkv, kept.rows, 3 * dim, {b.normed, at}, dim, qkv, bias);
      below(b.qkv, kept.rows, 3 * dim, w[QKV_W], dim, b.below, nullptr, at);
      return;
    }
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
