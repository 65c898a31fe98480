// Matrix products of a Linear layer: of rows with its weight, and the gradients of both.
//
// Both factors are brought into panels, in which what is multiplied at a time lies together: some rows of the first, two
// vectors of columns of the second. A block of the first stays in the second-level cache while the panels of the second
// go by. What comes behind the product is done before it is written.

#include "calls.h"

namespace {

#include "words.h"
#include "gemm.h"

constexpr int BLOCK = 480 * 1024, MOST_PANELS = 16;  // bytes and panels of a block
constexpr int FEW = 8;  // tiles of rows for each thread, below which blocks are divided by columns too
constexpr int DEPTH = 544;  // words that a gradient of weights sums before it adds to memory
constexpr int64_t SMALL = 128 * 1024;  // numbers of a gradient that each thread may have a part of its own of

using products::Size;

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
  const int threads = int(std::max(1.0, std::min(double(size.threads), double(m) * n * k / (1 << 20))));
  const int64_t tall = std::max<int64_t>(2, std::min<int64_t>(MOST_PANELS, BLOCK / (4 * HIGH * most)));
  const bool split = threads > 1 && m < FEW * HIGH * threads;
  const Blocks blocks(m, tall, split ? 1 : threads);
  const int64_t panels = (n + WIDE - 1) / WIDE;
  const int64_t groups = split ? std::min(panels, (4 * threads + blocks.count() - 1) / blocks.count()) : 1;
  std::vector<int64_t> shares = blocks.of;  // of all blocks for each group, the groups one after the other
  if (split) {
    shares.assign(threads + 1, 0);
    for (int t = 1; t <= threads; ++t) shares[t] = blocks.count() * groups * t / threads;
  }

  // A panel's last vector reaches beyond it; and panels a whole number of pages apart would share places in the cache.
  const int64_t room_a = blocks.largest * (most * HIGH + LANES) + LANES * HIGH, room_b = panels * (most * WIDE + LANES);
  Arena arena{memory((room_b + threads * room_a) * sizeof(float) + 64 * (threads + 1))};
  float* columns = arena.take<float>(room_b);
  float* blocks_of = arena.take<float>(threads * room_a);

  if (c.sums) std::memset(c.sums, 0, m * sizeof(float));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = bound(chunk), end = bound(chunk + 1), words = (end - first + U - 1) / U;
    const int64_t part = part_of(words);
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
    const Tasks tasks(shares);
    run(threads, parallel, [&](int t) {
      float* rows = blocks_of + t * room_a;
      tasks.each(t, [&](int64_t task) {
        const int64_t group = task / blocks.count(), block = task % blocks.count();
        const int64_t row = blocks.row(block), last = blocks.row(block + 1);
        if (a.turned) {
          pack_across<K, EA, HIGH>(a, row, last, first, end, words, rows, gap_a);
        } else {
          for (int64_t r = row; r < last; r += HIGH)
            pack_along<K, EA, HIGH>(a, r, m, first, words, rows + (r - row) / HIGH * gap_a, HIGH);
        }
        const int64_t from = panels * group / groups, to = panels * (group + 1) / groups;
        const int64_t tiles = (to - from) * ((last - row + HIGH - 1) / HIGH);
        const int64_t next = task + 1 < shares[t + 1] ? blocks.row((task + 1) % blocks.count()) : m;
        const Later<K, EB> later(a, b, size, row, next, last - row, first, end, words, tiles);
        int64_t count = 0;
        for (int64_t p = from; p < to; ++p)
          for (int64_t r = row; r < last; r += HIGH, ++count)
            tile<K>(rows + (r - row) / HIGH * gap_a, columns + p * gap_b, words, part, c, n, r,
                    int(std::min<int64_t>(HIGH, last - r)), p * WIDE, chunk > 0, later.of(count));
        if (c.sums && group == 0)
          for (int64_t r = row; r < last; r += HIGH)
            add_sums<K>(rows + (r - row) / HIGH * gap_a, words, c.sums + r, int(std::min<int64_t>(HIGH, last - r)));
      });
    });
  }
}

// A turned factor from k on.
template <class E>
Factor behind(const Factor& f, int64_t k) {
  return f.places ? Factor{f.at, f.step, 1, f.single, f.places + k} : Factor{f.of<E>(0, k), f.step, 1, f.single, nullptr};
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
    product<K, EB>(behind<typename K::E>(a, from), behind<EB>(b, from),
                   Result{own, 1, NONE, nullptr, nullptr, c.sums ? own + m * n : nullptr}, Size{m, n, to - from, 1}, parallel);
  });
  run(threads, parallel, [&](int t) {
    auto add_up = [&](const float* own, int64_t count, const float* base, float by, float* to) {
      for (int64_t i = count * t / threads; i < count * (t + 1) / threads; ++i) {
        float sum = 0.0f;
        for (int s = 0; s < threads; ++s) sum += own[s * each + i];
        to[i] = (base ? base[i] : 0.0f) + sum * by;
      }
    };
    add_up(parts.get(), m * n, static_cast<const float*>(c.base), c.by, static_cast<float*>(c.at));
    if (c.sums) add_up(parts.get() + m * n, m, nullptr, 1.0f, c.sums);
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
