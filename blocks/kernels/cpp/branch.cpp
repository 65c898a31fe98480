// Training of a residual branch of batch norm, Linear, ReLU and Linear, forward and backward.

#include "calls.h"

namespace {

#include "words.h"
#include "driver.h"
#include "rows.h"
#include "fold.h"
#include "kept.h"

// given + found · scale + (x - mean) · slope + offset; nothing is found for samples that are dropped.
template <class K>
void gradient(const typename K::E* given, const typename K::E* found, const typename K::E* from, const Samples& samples,
              int64_t rows, int64_t width, const float* scale, const float* mean, const float* slope,
              const float* offset, typename K::E* to, int threads, Parallel parallel) {
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      const bool dropped = samples.dropped(r / samples.each);
      for (int64_t c = 0; c < width; c += LANES) {
        int64_t at = r * width + c;
        V a = K::widen(from + at) - loadu(mean + c);
        V d = K::widen(given + at) + fma(a, loadu(slope + c), loadu(offset + c));
        K::narrow(to + at, dropped ? d : fma(K::widen(found + at), loadu(scale + c), d));
      }
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

constexpr int64_t SMALL = 64 * 1024;  // numbers of a weight of which each thread may have a gradient of its own
constexpr int64_t CACHED = 2 * 1024 * 1024;  // bytes between the layers that it then works on at a time

struct Shape {  // as in branch.py
  int64_t batch, each, most;  // samples, rows of each, and rows that all threads work on at a time
  int64_t dim, hidden, threads;
  double eps;

  int64_t rows() const { return batch * each; }
  bool small() const { return dim * hidden <= SMALL; }
  int64_t parts() const { return small() ? threads : 1; }
};

enum { W1, B1, W2, B2, SCALE, SHIFT };

struct Norm {  // as batch_norm.cpp gives it
  const double *mean, *variance;
  const float *scale, *shift, *centre;
  Norm(const Shape& s, const double* moments, const float* folded)
      : mean(moments), variance(moments + s.dim), scale(folded), shift(folded + s.dim), centre(folded + 2 * s.dim) {}
};

template <class K>
struct Branch : Linears<typename K::E> {
  using typename Linears<typename K::E>::E;
  using Linears<E>::parallel;

  // Rows that are worked on at a time, of those of one part.
  static int64_t piece(const Shape& s) {
    const int64_t cached = std::max<int64_t>(CACHED / (s.hidden * sizeof(E)), 1);
    return std::min({s.most, s.rows() / s.parts() + K::U, s.small() ? cached : s.most});
  }

  const Shape& s;
  const float* const* w;  // the layers' weights and biases, in the order above
  const Norm norm;
  const Samples samples;

  struct Forward {  // room
    float *weight, *bias;
    Forward(const Shape& s, Arena& arena)
        : weight(arena.take<float>(s.hidden * s.dim)), bias(arena.take<float>(s.hidden)) {}
  };

  struct Part {  // room for a part of the rows, and for what it gives the gradients
    E* dh;
    float *sums1, *sums2;
    double *total1, *total2;
    float* weights[2] = {};  // of the first part those that are asked for
    Part(const Shape& s, bool first, Arena& arena)
        : dh(arena.take<E>(piece(s) * s.hidden)), sums1(arena.take<float>(s.hidden)), sums2(arena.take<float>(s.dim)),
          total1(arena.take<double>(s.hidden)), total2(arena.take<double>(s.dim)) {
      if (!first)
        for (float*& weight : weights) weight = arena.take<float>(s.dim * s.hidden);
    }
  };

  struct Backward {  // room
    E* below;
    double* found;
    float *slope, *offset;
    std::vector<Part> parts;
    Backward(const Shape& s, Arena& arena)
        : below(arena.take<E>(s.rows() * s.dim)), found(arena.take<double>(2 * s.dim)), slope(arena.take<float>(s.dim)),
          offset(arena.take<float>(s.dim)) {
      for (int64_t i = 0; i < s.parts(); ++i) parts.emplace_back(s, i == 0, arena);
    }
  };

  // Calls act(layers, part, first row, rows) for each piece of the samples that are kept. Where weights are small a thread
  // goes through a part of the rows by itself, in pieces that stay in its cache; else all threads share each piece.
  template <class F>
  void pieces(const F& act) const {
    const int parts = int(s.parts());
    run(parts, parallel, [&](int part) {
      auto bound = [&](int64_t i) { return i == parts ? samples.rows : samples.rows * i / parts / K::U * K::U; };
      const Linears<E> layers{parallel, parts > 1 ? 1 : s.threads};
      for (int64_t at = bound(part), end = bound(part + 1), most = piece(s); at < end; at += most)
        act(layers, part, at, std::min(most, end - at));
    });
  }

  typename Linears<E>::Lines lines(const E* x, int64_t at) const { return {samples.of(x, at, s.dim), samples.from(at)}; }

  // `hidden`: rows of the samples that are kept.
  void forward(const E* x, E* hidden, const Forward& f, E* out) const {
    folded<Full>(w[W1], w[B1], norm.scale, norm.shift, s.hidden, s.dim, f.weight, f.bias, s.threads, parallel);
    pieces([&](const Linears<E>& layers, int, int64_t at, int64_t rows) {
      E* h = hidden + at * s.hidden;
      layers.product(lines(x, at), rows, s.dim, f.weight, s.hidden, f.bias, h, products::RELU);
      layers.product_onto(samples.of(x, at, s.dim), h, rows, s.hidden, w[W2], s.dim, w[B2], samples.of(out, at, s.dim),
                          samples.from(at), samples.by);
    });
    samples.others(s.batch, [&](int64_t first, int64_t end) {
      std::memcpy(out + first * s.dim, x + first * s.dim, (end - first) * s.dim * sizeof(E));
    });
  }

  // `g`: where the gradients of the layers' parameters go, and those of the norm, in the order above.
  void backward(const E* x, const E* hidden, const E* grad, const Backward& b, E* dx, float* const* g) const {
    auto weight = [&](const Part& part, int i) { return &part == &b.parts[0] ? g[i ? W2 : W1] : part.weights[i]; };
    const bool add = s.small() || !samples.rows;  // not only to pieces before: a part may have none
    const int64_t size = s.dim * s.hidden;
    for (const Part& part : b.parts) {
      std::fill_n(part.total1, s.hidden, 0.0), std::fill_n(part.total2, s.dim, 0.0);
      for (int i = 0; add && i < 2; ++i) std::fill_n(weight(part, i), size, 0.0f);
    }
    pieces([&](const Linears<E>& layers, const int i, int64_t at, int64_t rows) {
      const Part& part = b.parts[i];
      const E* h = hidden + at * s.hidden;
      layers.learn(lines(grad, at), rows, s.dim, h, s.hidden, weight(part, 1), part.sums2, add || at > 0, samples.by);
      layers.below(lines(grad, at), rows, s.dim, w[W2], s.hidden, part.dh, h, nullptr, samples.by);
      layers.learn(part.dh, rows, s.hidden, lines(x, at), s.dim, weight(part, 0), part.sums1, add || at > 0);
      layers.below(part.dh, rows, s.hidden, w[W1], s.dim, samples.of(b.below, at, s.dim), nullptr, samples.from(at));
      for (int64_t c = 0; c < s.hidden; ++c) part.total1[c] += part.sums1[c];
      for (int64_t c = 0; c < s.dim; ++c) part.total2[c] += double(part.sums2[c]) * samples.by;
    });
    for (size_t p = 1; p < b.parts.size(); ++p) {
      const Part& part = b.parts[p];
      for (int64_t c = 0; c < s.hidden; ++c) b.parts[0].total1[c] += part.total1[c];
      for (int64_t c = 0; c < s.dim; ++c) b.parts[0].total2[c] += part.total2[c];
    }
    run(int(b.parts.size()), parallel, [&](int64_t t) {
      const int64_t parts = b.parts.size();
      for (int i = 0; i < 2; ++i)
        for (int64_t p = 1; p < parts; ++p)
          for (int64_t c = size * t / parts; c < size * (t + 1) / parts; ++c)
            weight(b.parts[0], i)[c] += b.parts[p].weights[i][c];
    });
    std::copy_n(b.parts[0].total1, s.hidden, g[B1]), std::copy_n(b.parts[0].total2, s.dim, g[B2]);
    // The sums over all rows that a norm's gradient needs, without another look at the rows.
    unfolded(g[W1], g[B1], w[W1], norm.scale, norm.shift, s.hidden, s.dim, b.found, b.found + s.dim, s.threads, parallel);
    float *dscale = g[SCALE], *dshift = g[SHIFT];
    for (int64_t c = 0; c < s.dim; ++c) {
      const double shift = b.found[s.dim + c], root = 1.0 / std::sqrt(norm.variance[c] + s.eps);
      const double scale = (b.found[c] - norm.mean[c] * shift) * root, by = -norm.scale[c] / double(s.rows());
      dscale[c] = float(scale), dshift[c] = float(shift);
      b.slope[c] = float(by * root * scale), b.offset[c] = float(by * shift);
    }
    gradient<K>(grad, b.below, x, samples, s.rows(), s.dim, norm.scale, norm.centre, b.slope, b.offset, dx, s.threads, parallel);
  }
};

template <class K>
void room(const Shape& s, int64_t* bytes) {
  Arena forward{nullptr}, backward{nullptr};
  typename Branch<K>::Forward{s, forward}, typename Branch<K>::Backward{s, backward};
  bytes[0] = forward.used, bytes[1] = backward.used;
}

}  // namespace

// Widths are whole vectors. `work`: of as many bytes as branch_room says for each pass. `keep`: what the branch of each
// sample is multiplied by, 0 or one number; or null. Each gives 0, or 1 where memory ran out.
#define FUNCTIONS(K, END)                                                                                             \
  int branch_room##END(const Shape* s, int64_t* bytes, Parallel) { return room<K>(*s, bytes), 0; }                    \
  int branch_forward##END(const Shape* s, const K::E* x, const float* const* layers, const double* moments,           \
                          const float* folded, const float* keep, K::E* hidden, char* work, K::E* out,                \
                          Parallel parallel) {                                                                        \
    Arena room{work};                                                                                                 \
    return guarded([&] {                                                                                              \
      const Samples kept(keep, s->batch, s->each);                                                                    \
      Branch<K>{{parallel, s->threads}, *s, layers, {*s, moments, folded}, kept}.forward(x, hidden, {*s, room}, out); \
    });                                                                                                               \
  }                                                                                                                   \
  int branch_backward##END(const Shape* s, const K::E* x, const float* const* layers, const double* moments,          \
                           const float* folded, const float* keep, const K::E* hidden, const K::E* grad, char* work,  \
                           K::E* dx, float* const* grads, Parallel parallel) {                                        \
    Arena room{work};                                                                                                 \
    return guarded([&] {                                                                                              \
      const Samples kept(keep, s->batch, s->each);                                                                    \
      Branch<K>{{parallel, s->threads}, *s, layers, {*s, moments, folded}, kept}.backward(x, hidden, grad,            \
                                                                                          {*s, room}, dx, grads);     \
    });                                                                                                               \
  }

extern "C" {
FUNCTIONS(Full, )
#ifdef __AVX512BF16__
FUNCTIONS(Half, _bf16)
#endif
}
