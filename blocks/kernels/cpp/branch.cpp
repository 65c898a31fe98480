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

struct Shape {  // as in branch.py
  int64_t batch, each, piece;  // samples, rows of each, and samples that are worked on at a time
  int64_t dim, hidden, threads;
  double eps;

  int64_t rows() const { return batch * each; }
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
  using Linears<E>::below, Linears<E>::learn, Linears<E>::parallel, Linears<E>::product, Linears<E>::product_onto;

  const Shape& s;
  const float* const* w;  // the layers' weights and biases, in the order above
  const Norm norm;
  const Samples samples;

  struct Forward {  // room
    float *weight, *bias;
    Forward(const Shape& s, Arena& arena)
        : weight(arena.take<float>(s.hidden * s.dim)), bias(arena.take<float>(s.hidden)) {}
  };

  struct Backward {  // room
    E *dh, *below;
    double *total1, *total2, *found;
    float *sums1, *sums2, *slope, *offset;
    Backward(const Shape& s, Arena& arena)
        : dh(arena.take<E>(s.piece * s.each * s.hidden)), below(arena.take<E>(s.rows() * s.dim)),
          total1(arena.take<double>(s.hidden)), total2(arena.take<double>(s.dim)),
          found(arena.take<double>(2 * s.dim)), sums1(arena.take<float>(s.hidden)), sums2(arena.take<float>(s.dim)),
          slope(arena.take<float>(s.dim)), offset(arena.take<float>(s.dim)) {}
  };

  // Calls act(first row, rows) for each piece of the samples that are kept.
  template <class F>
  void pieces(const F& act) const {
    const int64_t most = s.piece * s.each;
    for (int64_t at = 0; at < samples.rows; at += most) act(at, std::min(most, samples.rows - at));
  }

  typename Linears<E>::Lines lines(const E* x, int64_t at) const { return {samples.of(x, at, s.dim), samples.from(at)}; }

  // `hidden`: rows of the samples that are kept.
  void forward(const E* x, E* hidden, const Forward& f, E* out) const {
    folded<Full>(w[W1], w[B1], norm.scale, norm.shift, s.hidden, s.dim, f.weight, f.bias, s.threads, parallel);
    pieces([&](int64_t at, int64_t rows) {
      E* h = hidden + at * s.hidden;
      product(lines(x, at), rows, s.dim, f.weight, s.hidden, f.bias, h, products::RELU);
      product_onto(samples.of(x, at, s.dim), h, rows, s.hidden, w[W2], s.dim, w[B2], samples.of(out, at, s.dim),
                   samples.from(at), samples.by);
    });
    samples.others(s.batch, [&](int64_t first, int64_t end) {
      std::memcpy(out + first * s.dim, x + first * s.dim, (end - first) * s.dim * sizeof(E));
    });
  }

  // `g`: where the gradients of the layers' parameters go, and those of the norm, in the order above.
  void backward(const E* x, const E* hidden, const E* grad, const Backward& b, E* dx, float* const* g) const {
    std::memset(b.total1, 0, s.hidden * sizeof(double)), std::memset(b.total2, 0, s.dim * sizeof(double));
    for (int i : {W1, W2})
      if (!samples.rows) std::memset(g[i], 0, s.dim * s.hidden * sizeof(float));
    pieces([&](int64_t at, int64_t rows) {
      const E* h = hidden + at * s.hidden;
      learn(lines(grad, at), rows, s.dim, h, s.hidden, g[W2], b.sums2, at > 0, samples.by);
      below(lines(grad, at), rows, s.dim, w[W2], s.hidden, b.dh, h, nullptr, samples.by);
      learn(b.dh, rows, s.hidden, lines(x, at), s.dim, g[W1], b.sums1, at > 0);
      below(b.dh, rows, s.hidden, w[W1], s.dim, samples.of(b.below, at, s.dim), nullptr, samples.from(at));
      for (int64_t i = 0; i < s.hidden; ++i) b.total1[i] += b.sums1[i];
      for (int64_t i = 0; i < s.dim; ++i) b.total2[i] += double(b.sums2[i]) * samples.by;
    });
    std::copy(b.total1, b.total1 + s.hidden, g[B1]), std::copy(b.total2, b.total2 + s.dim, g[B2]);
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
