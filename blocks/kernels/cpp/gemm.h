// Matrix products: factors in panels, in which what is multiplied at a time lies together, and tiles of the result.

constexpr int HIGH = LANES == 16 ? 12 : 6, VECTORS = 2, WIDE = VECTORS * LANES;  // of tiles held in registers
constexpr int PART = 256;  // words that are summed one by one, since rounding grows with their number
constexpr int AHEAD = 8;   // words ahead of those that are packed: their rows lie too far apart to be foreseen

using products::Factor, products::GELU, products::NONE, products::RELU, products::Result;

// Each thread's rows in blocks of tiles: the later the smaller, so that threads end together, also where one is slower
// and others take over what it has left.
struct Blocks {
  int64_t rows, largest = 0;
  std::vector<int64_t> starts, of{0};  // first rows of blocks, and first blocks of threads

  Blocks(int64_t rows, int64_t most, int64_t threads) : rows(rows) {
    const int64_t tiles = (rows + HIGH - 1) / HIGH;
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t end = tiles * (t + 1) / threads;
      for (int64_t at = tiles * t / threads, size; at < end; at += size) {
        size = std::max<int64_t>(1, std::min(threads == 1 ? end - at : (end - at) / 2, most));
        starts.push_back(at * HIGH), largest = std::max(largest, size);
      }
      of.push_back(count());
    }
  }
  int64_t count() const { return starts.size(); }
  int64_t row(int64_t block) const { return block < count() ? starts[block] : rows; }
};

// Vectors of words: of elements side by side, and of two rows' elements.
template <class K, class E>
inline V taken(const E* p) {
  if constexpr (sizeof(E) * K::U > sizeof(Word)) {
    return K::join(loadu(p), loadu(p + LANES));
  } else {
    return loadu(reinterpret_cast<const Word*>(p));
  }
}

template <class K, class E>
inline V woven(const E* a, const E* b) {
  if constexpr (sizeof(E) * K::U > sizeof(Word)) {
    return K::weave(loadu(a), loadu(b));
  } else {
    return K::weave(a, b);
  }
}

// Of COUNT rows the words from k on: to[word][row], words `apart` floats apart. It writes whole vectors, the later ones
// over what is too much of the earlier.
template <class K, class E, int COUNT>
void pack_along(const Factor& f, int64_t row, int64_t rows, int64_t k, int64_t words, float* to, int apart) {
  const E *lines[COUNT], *later[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    lines[i] = f.of<E>(std::min(row + i, rows - 1), k);
    later[i] = f.of<E>(std::min(row + COUNT + i, rows - 1), k);
  }
  for (int64_t w = 0; w < words; w += LANES) {
    V x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      x[i] = i < COUNT && row + i < rows ? taken<K>(lines[i % COUNT] + w * K::U) : set(0.0f);
      if (i < COUNT) _mm_prefetch(reinterpret_cast<const char*>(later[i % COUNT] + w * K::U), _MM_HINT_T0);
    }
    turn(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) storeu(to + (w + i) * apart, x[i]);
  }
}

// The same of a turned factor, from `row` to `rows` in panels of COUNT, `apart` floats apart.
template <class K, class E, int COUNT>
void pack_across(const Factor& f, int64_t row, int64_t rows, int64_t k, int64_t end, int64_t words, float* to,
                 int64_t apart) {
  static const E none[LANES] = {};
  constexpr int64_t NEED = up(COUNT, LANES);
  int64_t whole = rows - row < NEED ? 0 : (rows - row - NEED) / COUNT + 1;  // panels that may be read in whole vectors
  for (int64_t w = 0; w < words; ++w, k += K::U, to += COUNT) {
    const bool both = k + K::U <= end;  // the last of two that are woven may be missing
    const E *x = f.of<E>(row, k), *y = both ? f.of<E>(row, k + K::U - 1) : none;
    const int64_t ahead = AHEAD * K::U * f.step, on = both ? COUNT : 0;
    float* p = to;
    for (int64_t i = 0; i < whole; ++i, x += COUNT, y += on, p += apart)
#pragma GCC unroll 2
      for (int l = 0; l < COUNT; l += LANES) {
        _mm_prefetch(reinterpret_cast<const char*>(x + l + ahead), _MM_HINT_T0);
        if (K::U == 2) _mm_prefetch(reinterpret_cast<const char*>(x + l + ahead + f.step), _MM_HINT_T0);
        storeu(p + l, woven<K>(x + l, both ? y + l : y));
      }
    for (int64_t at = row + whole * COUNT; at < rows; at += COUNT, x += COUNT, y += on, p += apart)
      for (int l = 0; l < COUNT && at + l < rows; l += LANES) {
        E room[2][LANES];
        int count = int(std::min<int64_t>(LANES, rows - at - l));
        const E* second = both ? filled(y + l, count, LANES, room[1]) : none;
        storeu(p + l, woven<K>(filled(x + l, count, LANES, room[0]), second));
      }
  }
}

// What is asked of memory meanwhile: some of the first factor's next block.
struct Ahead {
  const char* at;
  int64_t pace;  // bytes for each word
};

// Products of the panels' next words, for a tile of so many vectors; a panel has room for all.
template <class K, int COUNT>
inline void multiply(const float*& a, const float*& b, int64_t words, Ahead& ahead, V (&s)[HIGH][COUNT]) {
#pragma GCC unroll 12
  for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; ++v) s[r][v] = set(0.0f);
  for (int64_t w = 0; w < words; ++w, a += HIGH, b += WIDE, ahead.at += ahead.pace) {
    _mm_prefetch(ahead.at, _MM_HINT_T1);
    V x[COUNT];
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; ++v) x[v] = loadu(b + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r) {
      V y = set(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) s[r][v] = K::dot(y, x[v], s[r][v]);
    }
  }
}

// Of arrays that lie in registers all is copied so: one place that is not known to the compiler, and they would not.
template <int COUNT>
inline void copy(const V (&from)[HIGH][COUNT], V (&to)[HIGH][COUNT]) {
#pragma GCC unroll 12
  for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; ++v) to[r][v] = from[r][v];
}

// One tile of a product, with what comes behind it; `bias` belongs to its columns.
template <class K, int COUNT>
INLINE void sums(const float* a, const float* b, int64_t words, int64_t part, const float* bias, int act, Ahead ahead,
                 V (&s)[HIGH][COUNT]) {
  V before[HIGH][COUNT];
  bool more = false;
  for (; words > part; words -= part, more = true) {
    multiply<K>(a, b, part, ahead, s);
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) before[r][v] = more ? before[r][v] + s[r][v] : s[r][v];
  }
  multiply<K>(a, b, words, ahead, s);
  if (more)
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) s[r][v] += before[r][v];
  if (bias) {
    V shift[COUNT];
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; ++v) shift[v] = loadu(bias + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) s[r][v] += shift[v];
  }
  if (act == RELU)
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) s[r][v] = max(set(0.0f), s[r][v]);
  if (act == GELU) {
    V x[HIGH][COUNT];
    copy(s, x);
    for (int r = 0; r < HIGH; ++r) {
      V p[COUNT];
      for (int v = 0; v < COUNT; ++v) p[v] = x[r][v];
      phi<COUNT>(p);
      for (int v = 0; v < COUNT; ++v) x[r][v] = max(x[r][v], set(-5.2f)) * p[v];  // below, Φ is no longer exact, nor 0
    }
    copy(x, s);
  }
}

// One tile of the result; `again` where what is there already is a part of the sum.
template <class K, int COUNT>
INLINE void tile_of(const float* a, const float* b, int64_t words, int64_t part, const Result& c, int64_t n, int64_t row,
                    int rows, int64_t column, bool again, Ahead ahead) {
  using E = typename K::E;
  const bool single = c.single || K::U == 1;
  const int64_t size = single ? sizeof(float) : sizeof(E), wide = LANES * size;
  char* const to = static_cast<char*>(c.at);
  const char* const base = static_cast<const char*>(again ? c.at : c.base);
  const char* const mask = static_cast<const char*>(c.mask);
  int64_t places[HIGH];  // of rows, in bytes
  for (int r = 0; r < rows; ++r) places[r] = ((c.places ? c.places[row + r] : row + r) * n + column) * size;
  for (int r = 0; r < rows; ++r)  // lines that are far apart are not foreseen, also where they are only written
    for (int64_t at = places[r], end = at + COUNT * wide; at < end; at += 64) {
      __builtin_prefetch(to + at);
      if (base && base != to) __builtin_prefetch(base + at);
      if (mask) __builtin_prefetch(mask + at);
    }
  V s[HIGH][COUNT];
  sums<K>(a, b, words, part, c.bias ? c.bias + column : nullptr, c.act, ahead, s);
  if (c.by != 1.0f)
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) s[r][v] *= set(c.by);
  auto value = [&](const char* p) {
    return single ? loadu(reinterpret_cast<const float*>(p)) : K::widen(reinterpret_cast<const E*>(p));
  };
  auto give = [&](int64_t at, V (&x)[COUNT]) {
#pragma GCC unroll 2
    for (int v = 0; v < COUNT; ++v) {
      if (mask) x[v] = above(value(mask + at + v * wide), x[v]);
      if (base) x[v] += value(base + at + v * wide);
    }
    float* const line = reinterpret_cast<float*>(to + at);
    if (single) {
#pragma GCC unroll 2
      for (int v = 0; v < COUNT; ++v) storeu(line + v * LANES, x[v]);
    } else if constexpr (COUNT == K::U) {
      storeu(line, K::words(x));
    } else {
      K::narrow(reinterpret_cast<E*>(line), x[0]);
    }
  };
  if (rows == HIGH) {
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r) give(places[r], s[r]);
  } else {
    V some[HIGH][COUNT];
    copy(s, some);
    for (int r = 0; r < rows; ++r) give(places[r], some[r]);
  }
}

template <class K>
void tile(const float* a, const float* b, int64_t words, int64_t part, const Result& c, int64_t n, int64_t row, int rows,
          int64_t column, bool again, Ahead ahead) {
  if (n - column >= WIDE) {
    tile_of<K, VECTORS>(a, b, words, part, c, n, row, rows, column, again, ahead);
  } else {  // of the last panel, where the width is an odd number of vectors
    tile_of<K, 1>(a, b, words, part, c, n, row, rows, column, again, ahead);
  }
}

inline int64_t part_of(int64_t words) { return words / ((words + PART - 1) / PART) + 1; }
