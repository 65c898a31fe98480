// LayerNorm over rows of numbers together with what stands around it: the residual addition before it, its result in
// the precision of the product behind it, the sum of a row's two gradients. Each is one pass over memory.

#include "calls.h"

namespace {

#include "words.h"

using norm::CHUNK, norm::Rows, norm::Shape;

constexpr int MOST_DIM = 2048;  // numbers in a row

// A row that lies as (channels, words) by words; those are a multiple of LANES. `to` has room for LANES more.
inline void by_words(const float* x, int d, int words, float* to) {
  int c = d / words;
  for (int at = (c - 1) / LANES * LANES; at >= 0; at -= LANES)  // the last first, since it writes beyond its word
    for (int m = 0; m < words; m += LANES) {
      V y[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) y[i] = at + i < c ? loadu(x + (at + i) * words + m) : set(0.0f);
      turn(y);
      for (int i = 0; i < LANES; ++i) storeu(to + (m + i) * c + at, y[i]);
    }
}

// The reverse. `x` has room for LANES more.
inline void by_channels(const float* x, int d, int words, float* to) {
  int c = d / words;
  for (int at = 0; at < c; at += LANES)
    for (int m = 0; m < words; m += LANES) {
      V y[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) y[i] = loadu(x + (m + i) * c + at);
      turn(y);
      for (int i = 0; i < LANES && at + i < c; ++i) storeu(to + (at + i) * words + m, y[i]);
    }
}

// Calls work(first, end, chunk) for chunks of rows, in threads; which rows are in one does not depend on the threads.
template <class F>
void chunks(const Shape& s, Parallel parallel, const F& work) {
  int64_t count = (s.rows + CHUNK - 1) / CHUNK;
  int threads = int(std::max<int64_t>(1, std::min({int64_t(s.threads), count, s.rows * s.dim >> 15})));
  run(threads, parallel, [&](int t) {
    for (int64_t k = count * t / threads; k < count * (t + 1) / threads; ++k)
      work(k * CHUNK, std::min((k + 1) * CHUNK, s.rows), k);
  });
}

// The chunks' gradients of weight and bias, 2 · dim numbers each, together, those of the first chunks first.
inline void together(const Shape& s, const float* parts, float* grads) {
  int wide = 2 * s.dim;
  std::memcpy(grads, parts, wide * sizeof(float));
  for (int64_t k = 1; k * CHUNK < s.rows; ++k)
    for (int i = 0; i < wide; i += LANES) storeu(grads + i, loadu(grads + i) + loadu(parts + k * wide + i));
}

// Mean and inverse deviation of a row.
inline void moments(const float* x, int d, float eps, float* stats) {
  V sum = set(0.0f), other = sum;
  int i = 0;
  for (; i + LANES < d; i += 2 * LANES) sum += loadu(x + i), other += loadu(x + i + LANES);
  if (i < d) sum += loadu(x + i);
  stats[0] = total(sum + other) / d;
  V mean = set(stats[0]);
  sum = other = set(0.0f);
  for (i = 0; i + LANES < d; i += 2 * LANES) {
    V a = loadu(x + i) - mean, b = loadu(x + i + LANES) - mean;
    sum = fma(a, a, sum), other = fma(b, b, other);
  }
  if (i < d) {
    V a = loadu(x + i) - mean;
    sum = fma(a, a, sum);
  }
  stats[1] = 1.0f / std::sqrt(total(sum + other) / d + eps);
}

// The row as the norm goes through it, in `room` if not where it is.
inline const float* ordered(const Shape& s, const float* x, float* room) {
  if (!s.words) return x;
  by_words(x, s.dim, s.words, room);
  return room;
}

template <class K>
inline void normed(const float* x, const float* stats, const float* w, const float* b, int d, typename K::E* to) {
  V mean = set(stats[0]), by = set(stats[1]);
  for (int i = 0; i < d; i += LANES) K::narrow(to + i, fma((loadu(x + i) - mean) * by, loadu(w + i), loadu(b + i)));
}

template <class K>
void forward(const Shape& s, const float* x, const typename K::E* branch, const float* factor, const float* w,
             const float* b, float* sum, float* stats, typename K::E* to, Parallel parallel) {
  int d = s.dim;
  chunks(s, parallel, [&](int64_t first, int64_t end, int64_t) {
    float room[MOST_DIM + LANES];
    for (int64_t r = first; r < end; ++r) {
      const float* row = x + r * d;
      if (branch) {
        V by = set(factor ? factor[r / s.group] : 1.0f);
        for (int i = 0; i < d; i += LANES)
          storeu(sum + r * d + i, fma(by, K::widen(branch + r * d + i), loadu(row + i)));
        row = sum + r * d;
      }
      if (!to) continue;
      row = ordered(s, row, room);
      moments(row, d, s.eps, stats + 2 * r);
      normed<K>(row, stats + 2 * r, w, b, d, to + r * d);
    }
  });
}

template <class K>
void again(const Shape& s, const float* x, const float* w, const float* b, const float* stats,
           typename K::E* to, Parallel parallel) {
  chunks(s, parallel, [&](int64_t first, int64_t end, int64_t) {
    float room[MOST_DIM + LANES];
    for (int64_t r = first; r < end; ++r)
      normed<K>(ordered(s, x + r * s.dim, room), stats + 2 * r, w, b, s.dim, to + r * s.dim);
  });
}

// Of the gradient of a norm's result the gradient of its input, in `dx`; sums of the weights' gradients in `parts`.
template <class K, class G>
inline void row_back(const typename K::E* x, const typename G::E* grad, const float* stats, const float* w, int d,
                     float* parts, float* dx) {
  V mean = set(stats[0]), by = set(stats[1]), sum = set(0.0f), dot = sum;
  for (int i = 0; i < d; i += LANES) {
    V y = (K::widen(x + i) - mean) * by, g = G::widen(grad + i), h = g * loadu(w + i);
    storeu(parts + i, fma(g, y, loadu(parts + i)));
    storeu(parts + d + i, g + loadu(parts + d + i));
    storeu(dx + i, h);
    sum += h, dot = fma(h, y, dot);
  }
  sum = set(total(sum) / d), dot = set(total(dot) / d);
  for (int i = 0; i < d; i += LANES) {
    V y = (K::widen(x + i) - mean) * by;
    storeu(dx + i, (loadu(dx + i) - sum - y * dot) * by);
  }
}

template <class K>
void backward(const Shape& s, const float* x, const float* w, const float* stats, const typename K::E* grad,
              const float* stream, const float* factor, float* dx,
              typename K::E* dbranch, float* parts, float* grads, Parallel parallel) {
  int d = s.dim;
  chunks(s, parallel, [&](int64_t first, int64_t end, int64_t chunk) {
    float room[MOST_DIM + LANES], found[MOST_DIM + LANES];
    float* part = parts + chunk * 2 * d;
    std::memset(part, 0, 2 * d * sizeof(float));
    for (int64_t r = first; r < end; ++r) {
      row_back<Full, K>(ordered(s, x + r * d, room), grad + r * d, stats + 2 * r, w, d, part, found);
      const float* own = found;
      if (s.words) by_channels(found, d, s.words, room), own = room;
      V by = set(factor ? factor[r / s.group] : 1.0f);
      for (int64_t i = 0, k = r * d; i < d; i += LANES, k += LANES) {
        V g = loadu(own + i);
        if (stream) g += loadu(stream + k);
        storeu(dx + k, g);
        if (dbranch) K::narrow(dbranch + k, g * by);
      }
    }
  });
  together(s, parts, grads);
}

template <class K>
void scaled(const Shape& s, const float* x, const float* factor, typename K::E* to, Parallel parallel) {
  chunks(s, parallel, [&](int64_t first, int64_t end, int64_t) {
    for (int64_t r = first; r < end; ++r) {
      V by = set(factor ? factor[r / s.group] : 1.0f);
      for (int64_t k = r * s.dim; k < (r + 1) * s.dim; k += LANES) K::narrow(to + k, loadu(x + k) * by);
    }
  });
}

// What a norm makes of rows of any precision is added to others, where there are any.
template <class K>
void onto(const Shape& s, const typename K::E* x, const float* w, const float* b, const Rows& base, float* stats,
          const Rows& to, Parallel parallel) {
  int d = s.dim;
  chunks(s, parallel, [&](int64_t first, int64_t end, int64_t) {
    float room[MOST_DIM + LANES];
    for (int64_t r = first; r < end; ++r) {
      for (int i = 0; i < d; i += LANES) storeu(room + i, K::widen(x + r * d + i));
      moments(room, d, s.eps, stats + 2 * r);
      normed<Full>(room, stats + 2 * r, w, b, d, room);
      const float* below = base.at ? base.of(s, r) : nullptr;
      float* sum = to.of(s, r);
      for (int i = 0; i < d; i += LANES) storeu(sum + i, below ? loadu(room + i) + loadu(below + i) : loadu(room + i));
    }
  });
}

template <class K>
void onto_back(const Shape& s, const typename K::E* x, const float* w, const float* stats, const Rows& grad,
               typename K::E* dx, float* parts, float* grads, Parallel parallel) {
  int d = s.dim;
  chunks(s, parallel, [&](int64_t first, int64_t end, int64_t chunk) {
    float room[MOST_DIM + LANES];
    float* part = parts + chunk * 2 * d;
    std::memset(part, 0, 2 * d * sizeof(float));
    for (int64_t r = first; r < end; ++r) {
      row_back<K, Full>(x + r * d, grad.of(s, r), stats + 2 * r, w, d, part, room);
      for (int i = 0; i < d; i += LANES) K::narrow(dx + r * d + i, loadu(room + i));
    }
  });
  together(s, parts, grads);
}

}  // namespace

// Each function for float32 and, with _bf16 behind its name, for bfloat16.
// `grads`: of the norm's weight, then of its bias; `parts`: room for those of each CHUNK rows. What is null is not
// there, or not wanted. Gives 0.
#define FUNCTIONS(K, END)                                                                                             \
  int norm_forward##END(const Shape* s, const float* x, const K::E* branch, const float* factor, const float* w,      \
                        const float* b, float* sum, float* stats, K::E* to, Parallel parallel) {                      \
    return guarded([&] { forward<K>(*s, x, branch, factor, w, b, sum, stats, to, parallel); });                       \
  }                                                                                                                   \
  int norm_again##END(const Shape* s, const float* x, const float* w, const float* b, const float* stats,             \
                      K::E* to, Parallel parallel) {                                                                  \
    return guarded([&] { again<K>(*s, x, w, b, stats, to, parallel); });                                              \
  }                                                                                                                   \
  int norm_backward##END(const Shape* s, const float* x, const float* w, const float* stats, const K::E* grad,        \
                         const float* stream, const float* factor, float* dx, K::E* dbranch, float* parts,            \
                         float* grads, Parallel parallel) {                                                           \
    return guarded([&] { backward<K>(*s, x, w, stats, grad, stream, factor, dx, dbranch, parts, grads, parallel); }); \
  }                                                                                                                   \
  int norm_scaled##END(const Shape* s, const float* x, const float* factor, K::E* to, Parallel parallel) {            \
    return guarded([&] { scaled<K>(*s, x, factor, to, parallel); });                                                  \
  }                                                                                                                   \
  int norm_onto##END(const Shape* s, const K::E* x, const float* w, const float* b, const Rows* base,                 \
                      float* stats, const Rows* to, Parallel parallel) {                                              \
    return guarded([&] { onto<K>(*s, x, w, b, *base, stats, *to, parallel); });                                       \
  }                                                                                                                   \
  int norm_onto_back##END(const Shape* s, const K::E* x, const float* w, const float* stats, const Rows* grad,        \
                          K::E* dx, float* parts, float* grads, Parallel parallel) {                                  \
    return guarded([&] { onto_back<K>(*s, x, w, stats, *grad, dx, parts, grads, parallel); });                        \
  }

extern "C" {
FUNCTIONS(Full, )
#ifdef __AVX512BF16__
FUNCTIONS(Half, _bf16)
#endif
}
