// Scaled dot-product attention of many heads, forward and backward, in float32 and, with AVX-512, in bfloat16.
//
// A head's keys and values are brought into the order of the products once; then blocks of queries go through scores,
// softmax and mixing inside the second-level cache. Rows are read and written where they lie, at any distance. For the
// backward pass only each query's largest score and the inverse of its sum are kept, and the scores computed again.
// Many heads on short sequences are worked on side by side (attention_lanes.h).

#include "calls.h"

namespace {

#include "words.h"

using attention::Rows, attention::Shape;

enum { Q, K_, V_, OUT, DQ = 4, DK, DV };

constexpr int BLOCK_BYTES = 256 * 1024, MOST_ROWS = 96;  // of scores

inline float highest(V a) {
  float x[LANES], y[4];
  storeu(x, a);
  __m128 top = _mm_loadu_ps(x);
  for (int i = 4; i < LANES; i += 4) top = _mm_max_ps(_mm_loadu_ps(x + i), top);
  _mm_storeu_ps(y, top);
  return std::max(std::max(y[0], y[1]), std::max(y[2], y[3]));
}

struct Plan {
  int n, m, d, words, wide_m, wide_d, block;
  float c;  // scores times this are exponents of 2
  float beyond[LANES];  // what makes scores of the last vector that belong to no key the lowest

  template <class K>
  static Plan of(const Shape& s) {
    Plan p;
    p.n = s.queries, p.m = s.keys, p.d = s.d, p.words = s.d / K::U, p.c = s.scale * LOG2E;
    p.wide_m = up(s.keys, LANES), p.wide_d = up(s.d, LANES);
    int rows = BLOCK_BYTES / (int(sizeof(float)) * p.wide_m) / ROWS * ROWS;
    p.block = std::max(ROWS, std::min({rows, MOST_ROWS, up(s.queries, ROWS)}));
    for (int i = 0; i < LANES; ++i) p.beyond[i] = p.wide_m - LANES + i < p.m ? 0.0f : -INFINITY;
    return p;
  }
};

struct Room {
  float *keys, *values, *key_rows, *queries, *grads, *s, *ds, *y, *dk, *dv;

  void lay(const Plan& p, Arena& a, bool back) {
    int m = up(p.m, ROWS);
    keys = a.take<float>(p.words * p.wide_m);
    s = a.take<float>(p.block * p.wide_m), y = a.take<float>(p.block * p.wide_d);
    values = a.take<float>(back ? p.words * p.wide_m : p.m * p.wide_d);
    if (!back) return;
    key_rows = a.take<float>(p.m * p.wide_d), ds = a.take<float>(p.block * p.wide_m);
    queries = a.take<float>(p.block * p.wide_d), grads = a.take<float>(p.block * p.wide_d);
    dk = a.take<float>(m * p.wide_d), dv = a.take<float>(m * p.wide_d);
  }

  static Room of(const Plan& p, bool back) {
    Room r;
    Arena count{nullptr};
    r.lay(p, count, back);
    Arena arena{memory(count.used)};
    r.lay(p, arena, back);
    return r;
  }
};

// A row of scores to weights up to their sum, in place, in the kind's elements. Gives the highest and the inverse sum.
template <class K>
void softmax(const Plan& p, float* s, float* kept) {
  float* last = s + p.wide_m - LANES;
  storeu(last, loadu(last) + loadu(p.beyond));
  V top = loadu(s);
  for (int j = LANES; j < p.wide_m; j += LANES) top = max(loadu(s + j), top);
  kept[0] = highest(top) * p.c;
  V sum = set(0.0f), c = set(p.c), least = set(-kept[0]);
  auto* to = reinterpret_cast<typename K::E*>(s);  // never ahead of what is read
  for (int j = 0; j < p.wide_m; j += LANES) {
    V e = exp2(fma(loadu(s + j), c, least));
    sum += e;
    K::narrow(to + j, e);
  }
  kept[1] = 1.0f / total(sum);
}

template <class K>
void forward_head(const Plan& p, const Rows* rows, int64_t b, int64_t h, int first, int end, float* kept) {
  using E = typename K::E;
  Room r = Room::of(p, false);
  auto words = [&](int which, int row) { return reinterpret_cast<const Word*>(rows[which].of<E>(b, h, row)); };
  pack_columns(words(K_, 0), rows[K_].token / K::U, p.m, p.words, r.keys, p.wide_m);
  pack_rows<K>(rows[V_].of<E>(b, h), rows[V_].token, p.m, p.d, r.values, p.wide_d);
  for (int i = first; i < end; i += p.block) {
    int count = std::min(p.block, end - i);
    product<K>(words(Q, i), rows[Q].token / K::U, 1, r.keys, p.wide_m, r.s, p.wide_m, count, p.wide_m, p.words, false);
    for (int k = 0; k < count; ++k) softmax<K>(p, r.s + k * p.wide_m, kept + 2 * (i + k));
    product<K>(r.s, p.wide_m, 1, r.values, p.wide_d, r.y, p.wide_d, count, p.wide_d, (p.m + K::U - 1) / K::U, false);
    give_rows<K>(r.y, p.wide_d, count, p.d, kept + 2 * i + 1, 2, rows[OUT].of<E>(b, h, i), rows[OUT].token);
  }
}

// Scores s and gradients of weights ds to weights and gradients of scores; in the order that the products want.
template <class K>
void softmax_back(const Plan& p, float* s, float* ds, int count, const float* kept) {
  for (int k = 0; k < count; k += K::U) {
    V dot[K::U];
    for (int u = 0; u < K::U; ++u) {
      float *x = s + (k + u) * p.wide_m, *y = ds + (k + u) * p.wide_m;
      dot[u] = set(0.0f);
      if (k + u >= count) {  // the second of two that are woven
        std::memset(x, 0, p.wide_m * sizeof(float)), std::memset(y, 0, p.wide_m * sizeof(float));
        continue;
      }
      V c = set(p.c), least = set(-kept[2 * (k + u)]), inv = set(kept[2 * (k + u) + 1]);
      storeu(x + p.wide_m - LANES, loadu(x + p.wide_m - LANES) + loadu(p.beyond));
      for (int j = 0; j < p.wide_m; j += LANES) {
        V e = exp2(fma(loadu(x + j), c, least)) * inv;
        dot[u] = fma(e, loadu(y + j), dot[u]);
        storeu(x + j, e);
      }
      dot[u] = set(total(dot[u]));
    }
    float *x = s + k * p.wide_m, *y = ds + k * p.wide_m;
    for (int j = 0; j < p.wide_m; j += LANES) {
      V e = loadu(x + j), g = e * (loadu(y + j) - dot[0]);
      if constexpr (K::U == 1) {
        storeu(y + j, g);
      } else {
        float *x1 = x + p.wide_m + j, *y1 = y + p.wide_m + j;
        V e1 = loadu(x1), g1 = e1 * (loadu(y1) - dot[K::U - 1]);
        storeu(x + j, K::weave(K::round(e), K::round(e1)));
        storeu(x1, K::weave(K::round(g), K::round(g1)));
        K::narrow(reinterpret_cast<uint16_t*>(y) + j, g), K::narrow(reinterpret_cast<uint16_t*>(y + p.wide_m) + j, g1);
      }
    }
  }
}

template <class K>
void backward_head(const Plan& p, const Rows* rows, int64_t b, int64_t h, const float* kept, float scale) {
  using E = typename K::E;
  constexpr int U = K::U;
  Room r = Room::of(p, true);
  auto words = [&](int which, int row) { return reinterpret_cast<const Word*>(rows[which].of<E>(b, h, row)); };
  pack_columns(words(K_, 0), rows[K_].token / U, p.m, p.words, r.keys, p.wide_m);
  pack_columns(words(V_, 0), rows[V_].token / U, p.m, p.words, r.values, p.wide_m);
  pack_rows<K>(rows[K_].of<E>(b, h), rows[K_].token, p.m, p.d, r.key_rows, p.wide_d);
  for (int i = 0; i < p.n; i += p.block) {
    int count = std::min(p.block, p.n - i), w = p.wide_m, d = p.wide_d, depth = (count + U - 1) / U;
    product<K>(words(Q, i), rows[Q].token / U, 1, r.keys, w, r.s, w, count, w, p.words, false);
    product<K>(words(OUT, i), rows[OUT].token / U, 1, r.values, w, r.ds, w, count, w, p.words, false);
    softmax_back<K>(p, r.s, r.ds, count, kept + 2 * i);
    pack_rows<K>(rows[Q].of<E>(b, h, i), rows[Q].token, count, p.d, r.queries, d);
    pack_rows<K>(rows[OUT].of<E>(b, h, i), rows[OUT].token, count, p.d, r.grads, d);
    product<K>(r.s, 1, U * w, r.grads, d, r.dv, d, p.m, d, depth, i > 0);
    product<K>(U == 1 ? r.ds : r.s + w, 1, U * w, r.queries, d, r.dk, d, p.m, d, depth, i > 0);
    product<K>(r.ds, w, 1, r.key_rows, d, r.y, d, count, d, (p.m + U - 1) / U, false);
    give_rows<K>(r.y, d, count, p.d, &scale, 0, rows[DQ].of<E>(b, h, i), rows[DQ].token);
  }
  const float one = 1.0f;
  give_rows<K>(r.dk, p.wide_d, p.m, p.d, &scale, 0, rows[DK].of<E>(b, h), rows[DK].token);
  give_rows<K>(r.dv, p.wide_d, p.m, p.d, &one, 0, rows[DV].of<E>(b, h), rows[DV].token);
}

#include "attention_lanes.h"

// work(task) for each of them, in threads.
template <class F>
void share(int64_t tasks, int threads, Parallel parallel, const F& work) {
  threads = int(std::min<int64_t>(threads, tasks));
  run(threads, parallel, [&](int t) {
    for (int64_t k = tasks * t / threads; k < tasks * (t + 1) / threads; ++k) work(k);
  });
}

int threads_for(const Shape& s) {
  double size = double(s.queries) * s.keys * s.d * s.batch * s.heads;
  return int(std::max(1.0, std::min(double(s.threads), size / (1 << 18))));
}

// Whether heads in lanes are faster: by the multiplications, with idle lanes and filled rows, and by what moving rows
// costs in as many; measured.
bool in_lanes(const Shape& s) {
  if (std::max(s.queries, s.keys) > SHORT) return false;
  double heads = double(s.batch * s.heads), lanes = LANES * std::ceil(heads / LANES);
  double ours = 4.0 * lanes / heads * s.queries * s.keys * s.d;
  double filled = double(up(s.queries, ROWS)) * (up(s.keys, LANES) * s.d + s.keys * up(s.d, LANES));
  return ours < filled + 1500.0 * (s.queries + s.keys);
}

// work(first, end) for groups of heads that fill a vector.
template <class F>
void all_groups(const Shape& s, Parallel parallel, const F& work) {
  int64_t heads = s.batch * s.heads;
  share((heads + LANES - 1) / LANES, threads_for(s), parallel, [&](int64_t group) {
    work(group * LANES, std::min(heads, (group + 1) * LANES));
  });
}

// work(batch, head, first query, end) for all of them; the queries of a head in parts if it may be split.
template <class F>
void all_heads(const Shape& s, bool split, Parallel parallel, const F& work) {
  int64_t heads = s.batch * s.heads;
  int threads = threads_for(s);
  int64_t parts = split ? std::max<int64_t>(1, std::min<int64_t>(threads / heads, s.queries / MOST_ROWS)) : 1;
  share(heads * parts, threads, parallel, [&](int64_t task) {
    int64_t head = task / parts, part = task % parts;
    work(head / s.heads, head % s.heads, int(s.queries * part / parts), int(s.queries * (part + 1) / parts));
  });
}

template <class K>
void forward(const Shape& s, const Rows* rows, float* kept, Parallel parallel) {
  if (in_lanes(s))
    return all_groups(s, parallel, [&](int64_t first, int64_t end) { forward_group<K>(s, rows, first, end, kept); });
  Plan p = Plan::of<K>(s);
  all_heads(s, true, parallel, [&](int64_t b, int64_t h, int first, int end) {
    forward_head<K>(p, rows, b, h, first, end, kept + 2 * (b * s.heads + h) * p.n);
  });
}

template <class K>
void backward(const Shape& s, const Rows* rows, const float* kept, Parallel parallel) {
  if (in_lanes(s))
    return all_groups(s, parallel, [&](int64_t first, int64_t end) { backward_group<K>(s, rows, first, end, kept); });
  Plan p = Plan::of<K>(s);
  all_heads(s, false, parallel, [&](int64_t b, int64_t h, int, int) {
    backward_head<K>(p, rows, b, h, kept + 2 * (b * s.heads + h) * p.n, s.scale);
  });
}

}  // namespace

extern "C" {

// Each gives 0, or 1 where memory ran out. `rows`: queries, keys, values, and the result; backward: its gradient, then
// the gradients of queries, keys and values. `kept`: two floats for each query of each head.
int attention_forward(const Shape* shape, const Rows* rows, float* kept, Parallel parallel) {
  return guarded([&] { forward<Full>(*shape, rows, kept, parallel); });
}

int attention_backward(const Shape* shape, const Rows* rows, const float* kept, Parallel parallel) {
  return guarded([&] { backward<Full>(*shape, rows, kept, parallel); });
}

#ifdef __AVX512BF16__
int attention_forward_bf16(const Shape* shape, const Rows* rows, float* kept, Parallel parallel) {
  return guarded([&] { forward<Half>(*shape, rows, kept, parallel); });
}

int attention_backward_bf16(const Shape* shape, const Rows* rows, const float* kept, Parallel parallel) {
  return guarded([&] { backward<Half>(*shape, rows, kept, parallel); });
}
#endif
}
