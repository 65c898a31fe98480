// 3×3 convolutions of stride 1 in groups, on maps that lie by channels, forward and backward.
//
// A few rows of a group's map are copied with a border of zeros. There each of the nine shifts of the map is the same
// memory read from another place on, so that a convolution is nine matrix products without a copy for each; what they
// give for the border is thrown away. The gradient of the input is such a convolution too.

#include "calls.h"

namespace {

#include "words.h"
#include "taps.h"

constexpr int HIGH = LANES == 16 ? 12 : 6, WIDE = 2 * LANES;  // of tiles held in registers
constexpr int ROOM = 384 * 1024, SMALL = 192 * 1024;  // bytes of a strip, forward and for the gradient of weights

struct Shape : conv::Shape {
  int line() const { return width + 2; }
  int taps(int tap) const { return tap / 3 * line() + tap % 3; }
};

struct Strip {
  int64_t image;
  int group, first, rows;
};

// Calls work(strip, thread) for all strips of about `most` bytes, by turns the same in each run.
template <class F>
int strips(const Shape& s, int most, int64_t bytes, Parallel parallel, const F& work) {
  int rows = int(std::max<int64_t>(1, std::min<int64_t>(s.height, most / (bytes * s.line()) - 2)));
  int count = (s.height + rows - 1) / rows;
  int64_t all = s.batch * s.groups * count;
  int threads = int(std::min<int64_t>(s.threads, all));
  run(threads, parallel, [&](int t) {
    for (int64_t k = all * t / threads; k < all * (t + 1) / threads; ++k) {
      int part = int(k % count);
      work(Strip{k / count / s.groups, int(k / count % s.groups), s.height * part / count,
                 s.height * (part + 1) / count - s.height * part / count}, t);
    }
  });
  return threads;
}

// Rows of a group's `wide` channels from `first` on, between zeros; then zeros for what is read beyond.
template <class E>
void bordered(const E* map, const Shape& s, const Strip& at, int first, int rows, int wide, int before, int beyond,
              E* to) {
  int64_t step = int64_t(s.groups) * wide;
  for (int i = first; i < first + rows; ++i) {
    size_t line = size_t(s.line()) * wide;
    if (i < 0 || i >= s.height) {
      std::memset(to, 0, line * sizeof(E));
    } else {
      const E* from = map + ((at.image * s.height + i) * s.width) * step + int64_t(at.group) * wide;
      std::memset(to, 0, before * wide * sizeof(E));
      for (int j = 0; j < s.width; ++j) std::memcpy(to + (before + j) * wide, from + j * step, wide * sizeof(E));
      std::memset(to + (before + s.width) * wide, 0, (2 - before) * wide * sizeof(E));
    }
    to += line;
  }
  std::memset(to, 0, size_t(beyond) * wide * sizeof(E));
}

// Products of HIGH places from `map` on, in each of which lie `words` words; WORDS is their number if it is known. By
// itself, since a compiler that sees more keeps other things in the registers.
template <class K, int WORDS>
__attribute__((noinline)) void multiply(const Word* map, int line, const Word* weight, int words, int64_t step, V* to) {
  if (WORDS) words = WORDS;
  V y[HIGH][2];
#pragma GCC unroll 12
  for (int r = 0; r < HIGH; ++r) y[r][0] = y[r][1] = set(0.0f);
  for (int i = 0; i < 3; ++i, map += (line - 3) * int64_t(words))
    for (const Word* end = map + 3 * words; map < end; map += words)  // three shifts, each of a place
      for (const Word *a = map, *last = map + words; a < last; ++a, weight += step) {
        V x0 = loadu(weight), x1 = loadu(weight + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < HIGH; ++r) {
          V w = set(a[r * words]);
          y[r][0] = K::dot(w, x0, y[r][0]), y[r][1] = K::dot(w, x1, y[r][1]);
        }
      }
#pragma GCC unroll 12
  for (int r = 0; r < HIGH; ++r) to[2 * r] = y[r][0], to[2 * r + 1] = y[r][1];
}

// The filters: (groups, tap, words of channels that are summed over, the others).
template <class K>
void filters(const float* weight, const conv::Shape& s, float* to, Parallel parallel) {
  const bool turned = s.flags & conv::TURNED;
  const int deep = turned ? s.out : s.in, wide = turned ? s.in : s.out;
  each_group(weight, s, parallel, [&](int g, const Taps& taps) {
    float* p = to + int64_t(g) * 9 * deep * wide / K::U;
    for (int tap = 0; tap < 9; ++tap)
      for (int k = 0; k < deep; k += K::U)
        for (int c = 0; c < wide; c += LANES, p += LANES) {
          V x[K::U];
          for (int u = 0; u < K::U; ++u) x[u] = loadu(taps.of(k + u, tap) + c);
          storeu(p, K::close(x));
        }
  });
}

template <class K, int WORDS>
void forward(const Shape& s, const typename K::E* map, const Word* weight, const float* bias, const typename K::E* base,
             typename K::E* to, Parallel parallel) {
  using E = typename K::E;
  const int words = s.in / K::U;
  strips(s, ROOM, s.in * sizeof(E), parallel, [&](const Strip& at, int) {
    const int count = at.rows * s.line();
    E* rows = reinterpret_cast<E*>(memory(((at.rows + 2) * s.line() + HIGH + 2) * s.in * sizeof(E)));
    bordered(map, s, at, at.first - 1, at.rows + 2, s.in, 1, HIGH + 2, rows);
    const int64_t start = (at.image * s.height + at.first) * s.width * s.groups * s.out + at.group * s.out;
    for (int n = 0; n < s.out; n += WIDE) {
      const Word* w = weight + int64_t(at.group) * 9 * words * s.out + n;
      V shift[2] = {set(0.0f), set(0.0f)};
      if (bias)
        for (int v = 0; v < 2; ++v) shift[v] = loadu(bias + at.group * s.out + n + v * LANES);
      for (int q = 0; q < count; q += HIGH) {
        V y[HIGH][2];
        multiply<K, WORDS>(reinterpret_cast<const Word*>(rows) + int64_t(q) * words, s.line(), w, words, s.out, y[0]);
#pragma GCC unroll 12
        for (int r = 0; r < HIGH; ++r)
          for (int v = 0; v < 2; ++v) {
            y[r][v] += shift[v];
            if (s.flags & conv::RELU) y[r][v] = max(set(0.0f), y[r][v]);
          }
        int i = q / s.line(), j = q % s.line();
        for (int r = 0; r < HIGH && i < at.rows; ++r) {
          const int64_t place = start + (int64_t(i) * s.width + j) * s.groups * s.out + n;
          for (int v = 0; v < 2 && j < s.width; ++v) {
            const int64_t own = place + v * LANES;
            K::narrow(to + own, base ? K::widen(base + own) + y[r][v] : y[r][v]);
          }
          if (++j == s.line()) j = 0, ++i;
        }
      }
    }
  });
}

// Pairs of places side by side, from each second place on.
template <class K>
void weave_places(const typename K::E* from, int pairs, int wide, float* to) {
  for (int p = 0; p < pairs; ++p, from += K::U * wide)
    for (int c = 0; c < wide; c += LANES) storeu(to + p * wide + c, K::weave(from + c, from + (K::U - 1) * wide + c));
}

// The gradient of the weight, (groups, tap, out, in).
template <class K>
void weight_gradient(const Shape& s, const typename K::E* map, const typename K::E* grad, float* to, Parallel parallel) {
  using E = typename K::E;
  constexpr int U = K::U;
  const int64_t size = int64_t(s.groups) * 9 * s.out * s.in;
  std::vector<float> sums(size_t(s.threads) * size);
  int threads = strips(s, SMALL, (s.in + s.out) * sizeof(float), parallel, [&](const Strip& at, int t) {
    const int count = at.rows * s.line(), pairs = (count + U - 1) / U, all = (at.rows + 2) * s.line() + 4;
    Arena arena{memory((2 * all * s.in + count * s.out) * (sizeof(E) + sizeof(float)) + 4096)};
    E *rows = arena.take<E>((all + 4) * s.in), *given = arena.take<E>((count + 2) * s.out);
    bordered(map, s, at, at.first - 1, at.rows + 2, s.in, 1, 8, rows);
    bordered(grad, s, at, at.first, at.rows, s.out, 0, 2, given);
    const float *shifted[2], *gradient;
    if constexpr (U == 1) {
      shifted[0] = shifted[1] = rows, gradient = given;
    } else {
      float* woven[] = {arena.take<float>(all / 2 * s.in + s.in), arena.take<float>(all / 2 * s.in + s.in)};
      float* both = arena.take<float>(pairs * s.out);
      for (int odd = 0; odd < 2; ++odd) weave_places<K>(rows + odd * s.in, all / 2, s.in, woven[odd]);
      weave_places<K>(given, pairs, s.out, both);
      shifted[0] = woven[0], shifted[1] = woven[1], gradient = both;
    }
    float* own = sums.data() + t * size + int64_t(at.group) * 9 * s.out * s.in;
    for (int tap = 0; tap < 9; ++tap) {
      const int from = s.taps(tap);
      const float* x = shifted[from % U] + int64_t(from / U) * s.in;
      for (int n = 0; n < s.in; n += WIDE)
        for (int r = 0; r < s.out; r += LOW)
          add_products<K>(gradient + r, s.out, x + n, s.in, pairs, own + (int64_t(tap) * s.out + r) * s.in + n);
    }
  });
  for (int64_t i = 0; i < size; ++i) {
    float sum = sums[i];
    for (int t = 1; t < threads; ++t) sum += sums[t * size + i];
    to[i] = sum;
  }
}

}  // namespace

extern "C" {

// `in` and `out` are multiples of 32. Filters are the weight as `conv_filters` gives it; in float32 winograd.cpp convolves.
int conv_weight(const conv::Shape* s, const float* map, const float* grad, float* to, Parallel parallel) {
  return guarded([&] { weight_gradient<Full>(Shape{*s}, map, grad, to, parallel); });
}

#ifdef __AVX512BF16__
int conv_filters_bf16(const conv::Shape* s, const float* weight, float* to, Parallel parallel) {
  return guarded([&] { filters<Half>(weight, *s, to, parallel); });
}

int conv_forward_bf16(const conv::Shape* s, const uint16_t* map, const float* filters, const float* bias,
                      const uint16_t* base, uint16_t* to, Parallel parallel) {
  return guarded([&] {
    const Shape shape{*s};
    s->in == 32 ? forward<Half, 32 / Half::U>(shape, map, filters, bias, base, to, parallel)
                : forward<Half, 0>(shape, map, filters, bias, base, to, parallel);
  });
}

int conv_weight_bf16(const conv::Shape* s, const uint16_t* map, const uint16_t* grad, float* to, Parallel parallel) {
  return guarded([&] { weight_gradient<Half>(Shape{*s}, map, grad, to, parallel); });
}
#endif
}
