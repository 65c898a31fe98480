// Matrix products of a Linear layer: of rows with its weight, and the gradients of both.
//
// Both factors are brought into panels, in which what is multiplied at a time lies together: some rows of the first, two
// vectors of columns of the second. A block of the first stays in the second-level cache while the panels of the second
// go by. What comes behind the product is done before it is written.

#include "vector.h"

namespace {

#include "words.h"

constexpr int HIGH = LANES == 16 ? 12 : 6, VECTORS = 2, WIDE = VECTORS * LANES;  // of a tile, held in registers
constexpr int BLOCK = 480 * 1024, MOST_PANELS = 16;                              // bytes and panels of a block
constexpr int DEPTH = 544;  // words that a gradient of weights sums before it adds to memory
constexpr int64_t SMALL = 128 * 1024;  // numbers of a gradient that each thread may have a part of its own of
constexpr int PART = 256;  // words that are summed one by one, since rounding grows with their number
constexpr int AHEAD = 8;    // words ahead of those that are packed: their rows lie too far apart to be foreseen

enum { NONE, RELU, GELU };

struct Factor {  // as in products.py: element (row, k) lies at row · step + k, or turned at k · step + row
  const void* at;
  int64_t step;
  int32_t turned, single;  // single: float32, whatever the kind

  template <class E>
  const E* of(int64_t row, int64_t k) const {
    return static_cast<const E*>(at) + (turned ? k * step + row : row * step + k);
  }
};

struct Result {
  void* at;
  int32_t single, add, act, spare;
  const float* bias;
  float* sums;  // of the rows of the first factor, which is turned
};

struct Size {
  int64_t m, n, k, threads;
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
  for (int64_t w = 0; w < words; w += LANES) {
    V x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      x[i] = i < COUNT && row + i < rows ? taken<K>(f.of<E>(row + i, k + w * K::U)) : set(0.0f);
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

// Adds the sums of a panel's rows to the first `count` of `to`.
template <class K>
void add_sums(const float* panel, int64_t words, float* to, int count) {
  const V one = set(K::word(1.0f, 1.0f));
  V sum[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  for (int64_t w = 0; w < words; ++w, panel += HIGH) sum[w % 4] = K::dot(one, loadu(panel), sum[w % 4]);
  float line[LANES];
  storeu(line, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int i = 0; i < count; ++i) to[i] += line[i];
}

// What is asked of memory meanwhile: some of the first factor's next block.
struct Ahead {
  const char* at;
  int64_t pace;  // bytes for each word
};

// What a thread may want next: another block of the first factor, or of both factors the words behind these.
template <class K, class EB>
struct Later {
  using EA = typename K::E;
  struct Lines {  // in each tile one of them of each word
    const char* at = nullptr;
    int64_t count = 0, step = 0;
  } first, second;
  const char* rows;
  int64_t pace = 0, words;

  Later(const Factor& a, const Factor& b, const Size& size, int64_t row, int64_t next, int64_t high, int64_t from,
        int64_t to, int64_t words, int64_t tiles)
      : words(words) {
    const bool more = next < size.m, on = !more && to < size.k;
    rows = reinterpret_cast<const char*>(a.of<EA>(more ? next : row, from));
    if (!a.turned) {
      pace = (high * (to - from) * sizeof(EA) / tiles + words - 1) / words;
    } else if (more || on) {
      first = lines(more ? a.of<EA>(next, from) : a.of<EA>(0, to), std::min(high, size.m), a.step);
      if (on && b.turned) second = lines(b.of<EB>(0, to), size.n, b.step);
    }
  }

  template <class E>
  static Lines lines(const E* at, int64_t count, int64_t step) {
    return {reinterpret_cast<const char*>(at), (count * int64_t(sizeof(E)) + 63) / 64 * K::U, step * int64_t(sizeof(E))};
  }

  Ahead of(int64_t tile) const {
    auto line = [](const Lines& l, int64_t i) { return Ahead{l.at + i / K::U * 64 + i % K::U * l.step, l.step * K::U}; };
    if (tile < first.count) return line(first, tile);
    if (tile - first.count < second.count) return line(second, tile - first.count);
    return Ahead{rows + tile * words * pace, pace};
  }
};

// Products of the panels' next words, for a tile.
template <class K>
inline void multiply(const float*& a, const float*& b, int64_t words, Ahead& ahead, V (&s)[HIGH][VECTORS]) {
#pragma GCC unroll 12
  for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) s[r][v] = set(0.0f);
  for (int64_t w = 0; w < words; ++w, a += HIGH, b += WIDE, ahead.at += ahead.pace) {
    _mm_prefetch(ahead.at, _MM_HINT_T1);
    V x[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) x[v] = loadu(b + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r) {
      V y = set(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) s[r][v] = K::dot(y, x[v], s[r][v]);
    }
  }
}

// One tile of the result; `again` where what is there already is a part of the sum.
template <class K>
void tile(const float* a, const float* b, int64_t words, int64_t part, const Result& c, int64_t n, int64_t row,
          int rows, int64_t column, int vectors, bool again, Ahead ahead) {
  using E = typename K::E;
  const bool add = c.add || again, single = c.single || K::U == 1;
  auto place = [&](int r, int v) { return (row + r) * n + column + v * LANES; };
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v)
      __builtin_prefetch(static_cast<const char*>(c.at) + place(r, v) * (single ? sizeof(float) : sizeof(E)), 0, 3);
  V s[HIGH][VECTORS];
  multiply<K>(a, b, std::min(words, part), ahead, s);
  for (int64_t done = part; done < words; done += part) {
    V sum[HIGH][VECTORS];
    std::memcpy(sum, s, sizeof s);
    multiply<K>(a, b, std::min(words - done, part), ahead, s);
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) s[r][v] += sum[r][v];
  }
  if (c.bias) {
    V bias[VECTORS];
    for (int v = 0; v < VECTORS; ++v) bias[v] = v < vectors ? loadu(c.bias + column + v * LANES) : set(0.0f);
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) s[r][v] += bias[v];
  }
  if (c.act == RELU)
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) s[r][v] = max(s[r][v], set(0.0f));
  if (c.act == GELU)
    for (int r = 0; r < HIGH; ++r) {
      V p[VECTORS];
      for (int v = 0; v < VECTORS; ++v) p[v] = s[r][v];
      phi<VECTORS>(p);
      for (int v = 0; v < VECTORS; ++v) s[r][v] = max(s[r][v], set(-5.2f)) * p[v];  // below, Φ is no longer exact, nor 0
    }
  auto give = [&](int r, int v) {
    if (single) {
      float* to = static_cast<float*>(c.at) + place(r, v);
      storeu(to, add ? loadu(to) + s[r][v] : s[r][v]);
    } else {
      E* to = static_cast<E*>(c.at) + place(r, v);
      K::narrow(to, add ? K::widen(to) + s[r][v] : s[r][v]);
    }
  };
  if (rows == HIGH && vectors == VECTORS) {
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) give(r, v);
  } else {
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) give(r, v);
  }
}

// c (+)= act(a · b + bias) of an (m, k) and an (n, k).
template <class K, class EB>
void product(const Factor& a, const Factor& b, const Result& c, const Size& size, Parallel parallel) {
  using EA = typename K::E;
  constexpr int U = K::U;
  const int64_t m = size.m, n = size.n, k = size.k;
  // Only sums may be made in parts: what comes behind wants all of it, as does a result of less precision.
  const int64_t chunks = a.turned ? std::max<int64_t>(1, k / (DEPTH * U)) : 1;
  auto bound = [&](int64_t i) { return i == chunks ? k : k * i / chunks / U * U; };
  const int64_t most = up(int(k / chunks / U) + 2, LANES);  // words of a part
  const int64_t high = HIGH * std::max<int64_t>(2, std::min<int64_t>(MOST_PANELS, BLOCK / (4 * HIGH * most)));
  const int64_t blocks = (m + high - 1) / high, panels = (n + WIDE - 1) / WIDE;
  const int threads = int(std::max(1.0, std::min(double(size.threads), double(m) * n * k / (1 << 20))));
  const int64_t groups = std::min<int64_t>(panels, threads > 1 ? (2 * threads + blocks - 1) / blocks : 1);

  // A panel's last vector reaches beyond it; and panels a whole number of pages apart would share places in the cache.
  const int64_t room_a = (high / HIGH) * (most * HIGH + LANES) + LANES * HIGH, room_b = panels * (most * WIDE + LANES);
  Arena arena{memory((room_b + threads * room_a) * sizeof(float) + 64 * (threads + 1))};
  float* columns = arena.take<float>(room_b);
  float* blocks_of = arena.take<float>(threads * room_a);

  if (c.sums) std::memset(c.sums, 0, m * sizeof(float));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = bound(chunk), end = bound(chunk + 1), words = (end - first + U - 1) / U;
    const int64_t part = words / ((words + PART - 1) / PART) + 1;
    const int64_t gap_a = words * HIGH + LANES, gap_b = words * WIDE + LANES;
    run(threads, parallel, [&](int t) {
      int64_t from = panels * t / threads, to = panels * (t + 1) / threads;
      if (b.turned)
        return pack_across<K, EB, WIDE>(b, from * WIDE, std::min(n, to * WIDE), first, end, words,
                                        columns + from * gap_b, gap_b);
      for (int64_t p = from; p < to; ++p)
        for (int i = 0; i < WIDE; i += LANES)
          pack_along<K, EB, LANES>(b, p * WIDE + i, n, first, words, columns + p * gap_b + i, WIDE);
    });
    std::atomic<int64_t> next{0};
    run(threads, parallel, [&](int t) {
      float* rows = blocks_of + t * room_a;
      for (int64_t task; (task = next++) < blocks * groups;) {
        int64_t row = task / groups * high, group = task % groups, last = std::min(row + high, m);
        if (a.turned) {
          pack_across<K, EA, HIGH>(a, row, last, first, end, words, rows, gap_a);
        } else {
          for (int64_t r = row; r < last; r += HIGH)
            pack_along<K, EA, HIGH>(a, r, m, first, words, rows + (r - row) / HIGH * gap_a, HIGH);
        }
        const int64_t from = panels * group / groups, to = panels * (group + 1) / groups;
        const int64_t tiles = (to - from) * ((last - row + HIGH - 1) / HIGH), next_row = row + threads * high / groups;
        const Later<K, EB> later(a, b, size, row, next_row, high, first, end, words, tiles);
        int64_t count = 0;
        for (int64_t p = from; p < to; ++p)
          for (int64_t r = row; r < last; r += HIGH, ++count)
            tile<K>(rows + (r - row) / HIGH * gap_a, columns + p * gap_b, words, part, c, n, r,
                    int(std::min<int64_t>(HIGH, last - r)), p * WIDE,
                    int(std::min<int64_t>(VECTORS, (n - p * WIDE) / LANES)), chunk > 0, later.of(count));
        if (c.sums && group == 0)
          for (int64_t r = row; r < last; r += HIGH)
            add_sums<K>(rows + (r - row) / HIGH * gap_a, words, c.sums + r, int(std::min<int64_t>(HIGH, last - r)));
      }
    });
  }
}

// The same; of the gradient of a small weight each thread has a part, over rows of its own.
template <class K, class EB>
void in_parts(const Factor& a, const Factor& b, const Result& c, const Size& size, Parallel parallel) {
  const int64_t m = size.m, n = size.n, k = size.k, each = m * n + m;
  const int threads = int(std::min(size.threads, k / DEPTH));
  if (threads < 2 || !a.turned || !b.turned || !c.single || m * n > SMALL)
    return product<K, EB>(a, b, c, size, parallel);
  std::unique_ptr<float[]> parts(new float[threads * each]);
  run(threads, parallel, [&](int t) {
    auto bound = [&](int64_t i) { return i == threads ? k : k * i / threads / K::U * K::U; };
    const int64_t from = bound(t), to = bound(t + 1);
    float* own = parts.get() + t * each;
    product<K, EB>(Factor{a.of<typename K::E>(0, from), a.step, 1, a.single}, Factor{b.of<EB>(0, from), b.step, 1, b.single},
                   Result{own, 1, 0, NONE, 0, nullptr, c.sums ? own + m * n : nullptr}, Size{m, n, to - from, 1}, parallel);
  });
  run(threads, parallel, [&](int t) {
    auto add_up = [&](const float* own, int64_t count, float* to, bool add) {
      for (int64_t i = count * t / threads; i < count * (t + 1) / threads; ++i) {
        float sum = add ? to[i] : 0.0f;
        for (int s = 0; s < threads; ++s) sum += own[s * each + i];
        to[i] = sum;
      }
    };
    add_up(parts.get(), m * n, static_cast<float*>(c.at), c.add);
    if (c.sums) add_up(parts.get() + m * n, m, c.sums, false);
  });
}

}  // namespace

extern "C" {

// n is whole vectors, and so are the words of a factor that is not turned. Gives 0, or 1 where memory ran out.
int gemm(const Factor* a, const Factor* b, const Result* c, const Size* size, Parallel parallel) {
  return guarded([&] { in_parts<Full, float>(*a, *b, *c, *size, parallel); });
}

#ifdef __AVX512BF16__
int gemm_bf16(const Factor* a, const Factor* b, const Result* c, const Size* size, Parallel parallel) {
  return guarded([&] {
    b->single ? in_parts<Half, float>(*a, *b, *c, *size, parallel)
              : in_parts<Half, uint16_t>(*a, *b, *c, *size, parallel);
  });
}
#endif
}
