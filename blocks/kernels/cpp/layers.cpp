// Two Linear layers with an activation between them, without gradients.
//
// Of some rows all that lies between the layers is made at once, in the order in which the second layer multiplies it:
// it never leaves the second-level cache, nor is it packed.

#include "calls.h"

namespace {

#include "words.h"
#include "gemm.h"

constexpr int BLOCK = 640 * 1024, MOST_PANELS = 16;  // bytes and panels of rows, and of what is made of them

using Size = products::Layers;

// A tile of the first layer, as words of rows for the second.
template <class K>
void between(const float* a, const float* b, int64_t words, int64_t part, const float* bias, int act, Ahead ahead,
             float* to) {
  V s[HIGH][VECTORS];
  sums<K>(a, b, words, part, bias, act, ahead, s);
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; v += K::U, to += LANES * HIGH) {
    V x[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) x[r] = r < HIGH ? K::words(&s[r][v]) : set(0.0f);
    turn(x);
#pragma GCC unroll 16
    for (int w = 0; w < LANES; ++w) storeu(to + w * HIGH, x[w]);  // the later ones over what is too much of the earlier
  }
}

template <class K, int COUNT>
void pack(const Factor& f, int64_t row, int64_t rows, int64_t words, float* to, int apart) {
  f.single ? pack_along<K, float, COUNT>(f, row, rows, 0, words, to, apart)
           : pack_along<K, typename K::E, COUNT>(f, row, rows, 0, words, to, apart);
}

template <class K>
void layers(const Factor& x, const Factor& first, const float* bias, const Factor& second, const Result& c,
            const Size& s, int act, Parallel parallel) {
  const int64_t in = s.in / K::U, mid = s.hidden / K::U, panels[] = {s.hidden / WIDE, (s.out + WIDE - 1) / WIDE};
  const int64_t gap_in = in * WIDE + LANES, gap_mid = mid * WIDE + LANES;  // whole pages would share places in the cache
  const Blocks blocks(s.rows, std::min<int64_t>(MOST_PANELS, BLOCK / (4 * HIGH * (in + mid))), s.threads);
  const int threads = int(std::min(s.threads, blocks.count()));
  const int64_t room = blocks.largest * (HIGH * (in + mid) + 2 * LANES) + 2 * LANES;
  Arena arena{memory((panels[0] * gap_in + panels[1] * gap_mid + threads * room) * sizeof(float) + 64 * (threads + 3))};
  float *columns = arena.take<float>(panels[0] * gap_in), *columns2 = arena.take<float>(panels[1] * gap_mid);
  float* work = arena.take<float>(threads * room);
  run(threads, parallel, [&](int t) {
    for (int64_t p = panels[0] * t / threads; p < panels[0] * (t + 1) / threads; ++p)
      for (int i = 0; i < WIDE; i += LANES)
        pack<K, LANES>(first, p * WIDE + i, s.hidden, in, columns + p * gap_in + i, WIDE);
    for (int64_t p = panels[1] * t / threads; p < panels[1] * (t + 1) / threads; ++p)
      for (int i = 0; i < WIDE; i += LANES)
        pack<K, LANES>(second, p * WIDE + i, s.out, mid, columns2 + p * gap_mid + i, WIDE);
  });
  const int64_t gap_x = in * HIGH + LANES, gap_y = mid * HIGH + LANES;
  const Tasks tasks(blocks.of);
  run(threads, parallel, [&](int t) {
    float *rows = work + t * room, *made = rows + blocks.largest * gap_x;
    tasks.each(t, [&](int64_t block) {
      const int64_t from = blocks.row(block), to = blocks.row(block + 1);
      for (int64_t r = from; r < to; r += HIGH)
        pack<K, HIGH>(x, r, to, in, rows + (r - from) / HIGH * gap_x, HIGH);
      // Meanwhile the rows that this thread may have next are asked of memory.
      const int64_t row = x.step * (x.single ? sizeof(float) : sizeof(typename K::E));
      const char* ahead = static_cast<const char*>(x.at) + (to < s.rows ? to : from) * row;
      const int64_t pace = ((to - from) * row / (panels[0] * ((to - from + HIGH - 1) / HIGH)) + in - 1) / in;
      int64_t count = 0;
      for (int64_t p = 0; p < panels[0]; ++p)
        for (int64_t r = from; r < to; r += HIGH, ++count)
          between<K>(rows + (r - from) / HIGH * gap_x, columns + p * gap_in, in, part_of(in),
                     bias ? bias + p * WIDE : nullptr, act, Ahead{ahead + count * in * pace, pace},
                     made + (r - from) / HIGH * gap_y + p * (WIDE / K::U) * HIGH);
      for (int64_t p = 0; p < panels[1]; ++p)
        for (int64_t r = from; r < to; r += HIGH)
          tile<K>(made + (r - from) / HIGH * gap_y, columns2 + p * gap_mid, mid, part_of(mid), c, s.out, r,
                  int(std::min<int64_t>(HIGH, to - r)), p * WIDE, false, Ahead{ahead, 0});
    });
  });
}

template <class K>
int guarded_layers(const Factor* x, const Factor* first, const float* bias, const Factor* second, const Result* c,
                   const Size* s, Parallel parallel) {
  Result last = *c;
  last.act = NONE;
  return guarded([&] { layers<K>(*x, *first, bias, *second, last, *s, c->act, parallel); });
}

}  // namespace

extern "C" {

// c (+)= act(x · firstᵀ + bias) · secondᵀ + c.bias. `in` and `hidden` are whole words of vectors, `hidden` whole tiles,
// `out` whole vectors; what is in c.act stands between the layers. What is read is float32, or as the words.
int two_layers(const Factor* x, const Factor* first, const float* bias, const Factor* second, const Result* c,
               const Size* s, Parallel parallel) {
  return guarded_layers<Full>(x, first, bias, second, c, s, parallel);
}

#ifdef __AVX512BF16__
int two_layers_bf16(const Factor* x, const Factor* first, const float* bias, const Factor* second, const Result* c,
                    const Size* s, Parallel parallel) {
  return guarded_layers<Half>(x, first, bias, second, c, s, parallel);
}
#endif
}
