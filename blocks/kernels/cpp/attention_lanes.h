// Attention of many short sequences: a head in each lane, so that none is idle however few the tokens are; part of
// attention.cpp.
//
// Rows of a token, one of each head, become columns: a vector for each word. All products are then of vectors with
// vectors, in words along what they sum over, as is the softmax.

constexpr int SHORT = 64;                                               // tokens
constexpr int TALL = LANES == 16 ? 5 : 4, BROAD = LANES == 16 ? 5 : 3;  // what of a product is held in registers

struct Grid {  // of vectors
  V* at;
  int row, column;
  Grid turned() const { return {at, column, row}; }
  Grid from(int i, int j) const { return {at + i * row + j * column, row, column}; }
};

template <class K, int I, int J>
void tile(const Grid& a, const Grid& b, const Grid& c, int depth, bool add) {
  V s[I][J];
#pragma GCC unroll 5
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) s[i][j] = add ? *c.from(i, j).at : set(0.0f);
  const V *x = a.at, *y = b.at;
  for (int k = 0; k < depth; ++k, x += a.column, y += b.row) {
    V line[J];
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) line[j] = y[j * b.column];
#pragma GCC unroll 5
    for (int i = 0; i < I; ++i) {
      V by = x[i * a.row];
#pragma GCC unroll 5
      for (int j = 0; j < J; ++j) s[i][j] = K::dot(by, line[j], s[i][j]);
    }
  }
#pragma GCC unroll 5
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) *c.from(i, j).at = s[i][j];
}

using Tile = void (*)(const Grid&, const Grid&, const Grid&, int, bool);

template <class K, int... N>
constexpr std::array<Tile, sizeof...(N)> tiles(std::integer_sequence<int, N...>) {
  return {tile<K, N / BROAD + 1, N % BROAD + 1>...};
}

// c (+)= a·b in tiles that are as even as can be.
template <class K>
void multiply(const Grid& a, const Grid& b, const Grid& c, int rows, int columns, int depth, bool add) {
  static constexpr auto of = tiles<K>(std::make_integer_sequence<int, TALL * BROAD>());
  auto part = [](int left, int most) { return left / ((left + most - 1) / most); };
  for (int i = 0, tall; i < rows; i += tall) {
    tall = part(rows - i, TALL);
    for (int j = 0, broad; j < columns; j += broad) {
      broad = part(columns - j, BROAD);
      of[(tall - 1) * BROAD + broad - 1](a.from(i, 0), b.from(0, j), c.from(i, j), depth, add);
    }
  }
}

template <class K>
struct Group {  // the rows of heads, one in each lane; in lanes beyond the last one is that one again
  using E = typename K::E;
  E* at[LANES];
  int64_t token;
  int count;

  Group(const Rows& rows, int64_t heads, int64_t first, int64_t end) : token(rows.token), count(int(end - first)) {
    int64_t b = first / heads, h = first % heads;
    for (int i = 0; i < LANES; ++i) {
      at[i] = rows.of<E>(b, h);
      if (i + 1 < count && ++h == heads) h = 0, ++b;
    }
  }

  Word* row(int lane, int t, int word) const { return reinterpret_cast<Word*>(at[lane] + t * token) + word; }

  // At most LANES words of all tokens, from `first` on.
  void take(int tokens, int first, int words, const Grid& to) const {
    for (int t = 0; t < tokens; ++t) {
      V x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        x[i] = loadu(row(i, t, first), words);
        __builtin_prefetch(row(i, t + 2, first));  // the processor does not foresee this many rows
        __builtin_prefetch(row(i, t + 2, first + LANES));
      }
      turn(x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        if (i < words) *to.from(t, i).at = x[i];
    }
  }

  // As many words of numbers.
  void give(int tokens, int first, int words, const Grid& from) const {
    for (int t = 0; t < tokens; ++t) {
      V x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) x[i] = i < words ? K::close(from.from(t, i * K::U).at) : set(0.0f);
      turn(x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        if (i < count) storeu(row(i, t, first), x[i], words);
    }
  }
};

// act(a group's numbers of `kept`, first, count), up to a vector of them at a time.
template <class F>
void each_kept(const Shape& s, const float* kept, int64_t first, int64_t end, const F& act) {
  int width = 2 * s.queries;
  Rows rows{reinterpret_cast<char*>(const_cast<float*>(kept)), s.heads * width, 0, width};
  Group<Full> group(rows, s.heads, first, end);
  for (int i = 0; i < width; i += LANES) act(group, i, std::min(LANES, width - i));
}

// The work on a group, part by part of its channels: all of a part is in the first-level cache.
template <class K>
struct Lanes {
  static constexpr int U = K::U;
  int n, m, words, step;  // words at a time
  Grid s, ds, part, kept;
  V *x, *y, *q, *k, *grad;

  Lanes(const Shape& shape, bool back) : n(shape.queries), m(shape.keys), words(shape.d / U) {
    step = std::min(words, LANES);
    Arena count{nullptr};
    lay(count, back);
    Arena arena{memory(count.used)};
    lay(arena, back);
  }

  void lay(Arena& a, bool back) {
    auto grid = [&](int rows, int columns) { return Grid{a.take<V>(rows * columns), columns, 1}; };
    int wide = back ? up(words, step) : step;
    s = grid(up(n, U), up(m, U)), part = grid(std::max(n, m), step * U), kept = grid(1, up(2 * n, LANES));
    x = a.take<V>(n * step), y = a.take<V>(m * step), k = a.take<V>(up(m, U) * wide);
    if (!back) return;
    ds = grid(up(n, U), up(m, U)), q = a.take<V>(up(n, U) * wide), grad = a.take<V>(up(n, U) * wide);
  }

  template <class F>
  void each_part(const F& act) const {
    for (int i = 0; i < words; i += step) act(i, std::min(step, words - i));
  }

  // The part of `count` words from i on.
  Grid taken(const Group<K>& from, int tokens, int i, int count, V* to) const {
    Grid words{to, step, 1};
    from.take(tokens, i, count, words);
    return words;
  }

  // Where that part has its place in words along the tokens.
  Grid tied(V* at, int tokens, int i) const { return {at + up(tokens, U) * i, step * U, 1}; }

  // A part, and the same tied.
  Grid taken(const Group<K>& from, int tokens, int i, int count, V* to, const Grid& tied) const {
    Grid words = U == 1 ? tied : Grid{to, step, 1};
    from.take(tokens, i, count, words);
    if constexpr (U == 2)
      for (int t = 0; t < tokens; t += U)
        for (int w = 0; w < count; ++w) {
          V next = t + 1 < tokens ? *words.from(t + 1, w).at : set(0.0f);
          K::tie(*words.from(t, w).at, next, tied.from(t / U, w * U).at);
        }
    return words;
  }
};

// x[j] = 2^(x[j]·c - top).
inline void exponentials(V* x, int n, V c, V top) {
  V least = set(0.0f) - top;
  int j = 0;
  for (; j + 4 <= n; j += 4) {
    V y[4] = {fma(x[j], c, least), fma(x[j + 1], c, least), fma(x[j + 2], c, least), fma(x[j + 3], c, least)};
    exp2<4>(y);
    x[j] = y[0], x[j + 1] = y[1], x[j + 2] = y[2], x[j + 3] = y[3];
  }
  for (; j < n; ++j) x[j] = exp2(fma(x[j], c, least));
}

// n numbers to words of them, in place.
template <class K>
inline void to_words(V* x, int n) {
  if constexpr (K::U == 2)
    for (int j = 0; j < n; j += 2) x[j / 2] = K::weave(x[j], j + 1 < n ? x[j + 1] : set(0.0f));
}

template <class K>
void forward_group(const Shape& shape, const Rows* rows, int64_t first, int64_t end, float* kept) {
  constexpr int U = K::U;
  Lanes<K> p(shape, false);
  auto group = [&](int which) { return Group<K>(rows[which], shape.heads, first, end); };
  const auto q = group(Q), k = group(K_), v = group(V_), out = group(OUT);
  p.each_part([&](int i, int count) {
    Grid a = p.taken(q, p.n, i, count, p.x), b = p.taken(k, p.m, i, count, p.y);
    multiply<K>(a, b.turned(), p.s, p.n, p.m, count, i > 0);
  });
  V c = set(shape.scale * LOG2E);
  for (int i = 0; i < p.n; ++i) {
    V* e = p.s.from(i, 0).at;
    V top = together(e, p.m, [](V a, V b) { return max(a, b); }) * c;
    exponentials(e, p.m, c, top);
    V inv = set(1.0f) / together(e, p.m, [](V a, V b) { return a + b; });
    for (int j = 0; j < p.m; ++j) e[j] = e[j] * inv;
    to_words<K>(e, p.m);
    *p.kept.from(0, 2 * i).at = top, *p.kept.from(0, 2 * i + 1).at = inv;
  }
  each_kept(shape, kept, first, end, [&](auto& to, int i, int count) { to.give(1, i, count, p.kept.from(0, i)); });
  p.each_part([&](int i, int count) {
    Grid b = p.tied(p.k, p.m, 0);
    p.taken(v, p.m, i, count, p.y, b);
    multiply<K>(p.s, b, p.part, p.n, count * U, (p.m + U - 1) / U, false);
    out.give(p.n, i, count, p.part);
  });
}

// Scores s and gradients of weights ds to weights and gradients of scores, in words along the queries, and the latter
// also along the keys.
template <class K>
void softmax_back(const Lanes<K>& p, float scale) {
  constexpr int U = K::U;
  V c = set(scale * LOG2E), by = set(scale);
  for (int i = 0; i < p.n; i += U) {
    V *e[U], *de[U];
    for (int u = 0; u < U; ++u) {
      e[u] = p.s.from(i + u, 0).at, de[u] = p.ds.from(i + u, 0).at;
      if (i + u >= p.n) {  // the second of two that are woven
        std::memset(e[u], 0, p.m * sizeof(V)), std::memset(de[u], 0, p.m * sizeof(V));
        continue;
      }
      V inv = *p.kept.from(0, 2 * (i + u) + 1).at, dot = set(0.0f);
      exponentials(e[u], p.m, c, *p.kept.from(0, 2 * (i + u)).at);
      for (int j = 0; j < p.m; ++j) e[u][j] = e[u][j] * inv, dot = fma(e[u][j], de[u][j], dot);
      for (int j = 0; j < p.m; ++j) de[u][j] = e[u][j] * by * (de[u][j] - dot);
    }
    if constexpr (U == 2) {
      for (int j = 0; j < p.m; ++j) {
        e[0][j] = K::weave(e[0][j], e[1][j]);
        e[1][j] = K::weave(de[0][j], de[1][j]);
      }
      for (V* x : de) to_words<K>(x, p.m);
    }
  }
}

template <class K>
void backward_group(const Shape& shape, const Rows* rows, int64_t first, int64_t end, const float* kept) {
  constexpr int U = K::U;
  Lanes<K> p(shape, true);
  auto group = [&](int which) { return Group<K>(rows[which], shape.heads, first, end); };
  const auto q = group(Q), k = group(K_), v = group(V_), grad = group(OUT);
  const auto dq = group(DQ), dk = group(DK), dv = group(DV);
  each_kept(shape, kept, first, end, [&](auto& from, int i, int count) { from.take(1, i, count, p.kept.from(0, i)); });
  p.each_part([&](int i, int count) {
    Grid a = p.taken(q, p.n, i, count, p.x, p.tied(p.q, p.n, i));
    Grid b = p.taken(k, p.m, i, count, p.y, p.tied(p.k, p.m, i));
    multiply<K>(a, b.turned(), p.s, p.n, p.m, count, i > 0);
    a = p.taken(grad, p.n, i, count, p.x, p.tied(p.grad, p.n, i)), b = p.taken(v, p.m, i, count, p.y);
    multiply<K>(a, b.turned(), p.ds, p.n, p.m, count, i > 0);
  });
  softmax_back(p, shape.scale);
  Grid w{p.s.at, p.s.row * U, 1}, dw = U == 1 ? p.ds : Grid{p.s.at + p.s.row, p.s.row * U, 1};
  int queries = (p.n + U - 1) / U, keys = (p.m + U - 1) / U;
  p.each_part([&](int i, int count) {
    multiply<K>(w.turned(), p.tied(p.grad, p.n, i), p.part, p.m, count * U, queries, false);
    dv.give(p.m, i, count, p.part);
    multiply<K>(dw.turned(), p.tied(p.q, p.n, i), p.part, p.m, count * U, queries, false);
    dk.give(p.m, i, count, p.part);
    multiply<K>(p.ds, p.tied(p.k, p.m, i), p.part, p.n, count * U, keys, false);
    dq.give(p.n, i, count, p.part);
  });
}
