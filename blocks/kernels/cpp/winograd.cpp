// 3×3 convolutions of stride 1 in float32, forward and backward, by Winograd's minimal filtering F(2×2, 3×3).
//
// Tiles of 4×4 places, two apart, become 16 numbers for each channel, as does each 3×3 filter; at each of these points
// the channels are multiplied as matrices, and 16 sums become 2×2 results: 16 products where a convolution takes 36.
// The gradient of the weight goes the same way backward. Source: Lavin and Gray, arXiv 1509.09308, section 4.1.

#include "calls.h"

namespace {

#include "words.h"
#include "taps.h"

constexpr int HIGH = LANES == 16 ? 12 : 6, WIDE = 2 * LANES;  // of tiles held in registers
using conv::POINTS;
constexpr int ROOM = 256 * 1024;  // bytes that the tiles of a strip become
constexpr int AHEAD = 6;          // places ahead of those that are read: their channels lie too far apart to be foreseen

struct Shape : conv::Shape {
  int across() const { return (width + 1) / 2; }
  int down() const { return (height + 1) / 2; }
};

struct Strip {  // some rows of tiles, of one image behind the other
  int group;
  int64_t first;
  int rows;
};

// Calls work(strip, thread) for all strips. Those of a group follow each other where there is a sum for each group.
template <class F>
int strips(const Shape& s, int wide, bool by_group, Parallel parallel, const F& work) {
  const int64_t all = s.batch * s.down(), most = std::max<int64_t>(1, ROOM / (POINTS * wide * 4) / s.across());
  int64_t count = std::max((all + most - 1) / most, std::min<int64_t>(all, (2 * s.threads - 1) / s.groups + 1));
  const int64_t tasks = count * s.groups;
  const int threads = int(std::min<int64_t>(s.threads, tasks));
  run(threads, parallel, [&](int t) {
    for (int64_t k = tasks * t / threads; k < tasks * (t + 1) / threads; ++k) {
      int64_t part = by_group ? k % count : k / s.groups, group = by_group ? k / count : k % s.groups;
      int64_t first = all * part / count;
      work(Strip{int(group), first, int(all * (part + 1) / count - first)}, t);
    }
  });
  return threads;
}

// Where the points of tile `t` lie, `block` tiles together at each point.
inline float* place(float* to, int t, int block, int wide) {
  return to + (int64_t(t / block) * POINTS * block + t % block) * wide;
}

// Of four numbers side by side, the input's transform along one side.
inline void ends(const V* d, V* t) { t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3]; }

// The tiles of a strip, transformed: Bᵀ d B.
void spread(const float* map, const Shape& s, const Strip& at, int block, float* to) {
  const int64_t step = int64_t(s.groups) * s.in;
  static const float none[LANES] = {};
  for (int i = 0, t = 0; i < at.rows; ++i, t += s.across()) {
    const int64_t image = (at.first + i) / s.down();
    const int y = 2 * int((at.first + i) % s.down()) - 1;
    for (int c = 0; c < s.in; c += LANES) {
      const float* rows[4];
      int64_t steps[4];
      for (int r = 0; r < 4; ++r) {
        const bool there = y + r >= 0 && y + r < s.height;
        rows[r] = there ? map + (image * s.height + y + r) * s.width * step + int64_t(at.group) * s.in + c : none;
        steps[r] = there ? step : 0;
      }
      auto column = [&](int x, V* t) {  // transformed downward
        V d[4];
        for (int r = 0; r < 4; ++r) {
          d[r] = x < 0 || x >= s.width ? set(0.0f) : loadu(rows[r] + x * steps[r]);
          _mm_prefetch(reinterpret_cast<const char*>(rows[r] + (x + AHEAD) * steps[r]), _MM_HINT_T0);
        }
        ends(d, t);
      };
      V x[4][4];
      column(-1, x[0]), column(0, x[1]);
      for (int j = 0; j < s.across(); ++j) {
        column(2 * j + 1, x[2]), column(2 * j + 2, x[3]);
        float* p = place(to, t + j, block, s.in) + c;
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a) {
          const V d[4] = {x[0][a], x[1][a], x[2][a], x[3][a]};
          V made[4];
          ends(d, made);
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b, p += block * s.in) storeu(p, made[b]);
          x[0][a] = x[2][a], x[1][a] = x[3][a];
        }
      }
    }
  }
}

// The same of a gradient's tiles of 2×2: A g Aᵀ.
void spread_gradient(const float* grad, const Shape& s, const Strip& at, int block, float* to) {
  const int64_t step = int64_t(s.groups) * s.out;
  auto wide = [](V a, V b, V* t) { t[0] = a, t[1] = a + b, t[2] = a - b, t[3] = set(0.0f) - b; };
  for (int i = 0, t = 0; i < at.rows; ++i)
    for (int j = 0; j < s.across(); ++j, ++t) {
      const int64_t image = (at.first + i) / s.down();
      const int y = 2 * int((at.first + i) % s.down());
      const float* from = grad + ((image * s.height + y) * s.width + 2 * j) * step + int64_t(at.group) * s.out;
      const bool right = 2 * j + 1 < s.width, below = y + 1 < s.height;
      for (int c = 0; c < s.out; c += LANES, from += LANES) {
        V x[2][4];
        wide(loadu(from), below ? loadu(from + s.width * step) : set(0.0f), x[0]);
        wide(right ? loadu(from + step) : set(0.0f),
             right && below ? loadu(from + (s.width + 1) * step) : set(0.0f), x[1]);
        float* p = place(to, t, block, s.out) + c;
        for (int a = 0; a < 4; ++a) {
          V made[4];
          wide(x[0][a], x[1][a], made);
          for (int b = 0; b < 4; ++b, p += block * s.out) storeu(p, made[b]);
        }
      }
    }
}

// A weight (groups · out, in, 3, 3), transformed, as (groups, points, in, out): G g Gᵀ. With `turned` the one by which
// the gradient goes back: seen from the other side, as (groups, points, out, in).
void filters(const float* weight, const conv::Shape& s, float* to, Parallel parallel) {
  const int64_t size = int64_t(s.out) * s.in;
  auto half = [](V a, V b, V c, V* t) {
    V sum = (a + c) * set(0.5f), mid = b * set(0.5f);
    t[0] = a, t[1] = sum + mid, t[2] = sum - mid, t[3] = c;
  };
  const bool turned = s.flags & conv::TURNED;
  const int rows = turned ? s.out : s.in, wide = turned ? s.in : s.out;
  each_group(weight, s, parallel, [&](int g, const Taps& taps) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < wide; c += LANES) {
        V x[3][4];
        auto tap = [&](int i, int j) { return loadu(taps.of(r, 3 * i + j) + c); };
        for (int j = 0; j < 3; ++j) half(tap(0, j), tap(1, j), tap(2, j), x[j]);
        float* p = to + g * POINTS * size + r * wide + c;
        for (int a = 0; a < 4; ++a) {
          V made[4];
          half(x[0][a], x[1][a], x[2][a], made);
          for (int b = 0; b < 4; ++b, p += size) storeu(p, made[b]);
        }
      }
  });
}

// Products of HIGH rows of `depth` numbers with `depth` rows of WIDE, `step` apart; DEPTH is `depth` where it is known.
template <int DEPTH>
__attribute__((noinline)) void multiply(const float* a, const float* b, int depth, int64_t step, float* to) {
  if (DEPTH) depth = DEPTH;
  V y[HIGH][2];
#pragma GCC unroll 12
  for (int r = 0; r < HIGH; ++r) y[r][0] = y[r][1] = set(0.0f);
  for (const float* end = a + depth; a < end; ++a, b += step) {
    V x0 = loadu(b), x1 = loadu(b + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < HIGH; ++r) {
      V w = set(a[r * depth]);
      y[r][0] = fma(w, x0, y[r][0]), y[r][1] = fma(w, x1, y[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < HIGH; ++r) storeu(to + r * WIDE, y[r][0]), storeu(to + r * WIDE + LANES, y[r][1]);
}

template <int DEPTH>
void forward(const Shape& s, const float* map, const float* weight, const float* bias, const float* base, float* to,
             Parallel parallel) {
  const int64_t step = int64_t(s.groups) * s.out, size = int64_t(s.in) * s.out;
  strips(s, s.in, false, parallel, [&](const Strip& at, int) {
    const int count = at.rows * s.across(), blocks = (count + HIGH - 1) / HIGH;
    Arena arena{memory((int64_t(blocks) * HIGH * s.in + HIGH * WIDE) * POINTS * sizeof(float) + 128)};
    float *tiles = arena.take<float>(int64_t(blocks) * HIGH * s.in * POINTS), *sums = arena.take<float>(HIGH * WIDE * POINTS);
    for (int t = count; t < blocks * HIGH; ++t)  // those that fill the last block
      for (int p = 0; p < POINTS; ++p)
        std::memset(place(tiles, t, HIGH, s.in) + p * HIGH * s.in, 0, s.in * sizeof(float));
    spread(map, s, at, HIGH, tiles);
    for (int n = 0; n < s.out; n += WIDE) {
      V shift[2] = {set(0.0f), set(0.0f)};
      if (bias)
        for (int v = 0; v < 2; ++v) shift[v] = loadu(bias + at.group * s.out + n + v * LANES);
      const float* w = weight + at.group * POINTS * size + n;
      for (int t = 0; t < count; t += HIGH) {
        const float* tile = place(tiles, t, HIGH, s.in);
        const int some = std::min(HIGH, count - t);
        struct { int64_t at; bool right, below; } made[HIGH];
        for (int r = 0; r < some; ++r) {
          const int64_t row = at.first + (t + r) / s.across(), image = row / s.down();
          const int i = 2 * int(row % s.down()), j = 2 * ((t + r) % s.across());
          const int64_t first = ((image * s.height + i) * s.width + j) * step + int64_t(at.group) * s.out + n;
          made[r] = {first, j + 1 < s.width, i + 1 < s.height};
          for (int64_t k : {int64_t(0), step, s.width * step, (s.width + 1) * step})  // what is far apart is not foreseen
            for (int v = 0; v < 2; ++v) {
              __builtin_prefetch(to + first + k + v * LANES);
              if (base) __builtin_prefetch(base + first + k + v * LANES);
            }
        }
        for (int p = 0; p < POINTS; ++p)
          multiply<DEPTH>(tile + p * HIGH * s.in, w + p * size, s.in, s.out, sums + p * HIGH * WIDE);
        for (int r = 0; r < some; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const int64_t place = made[r].at + v * LANES;
            V x[4][2];  // Aᵀ m A
#pragma GCC unroll 4
            for (int a = 0; a < 4; ++a) {
              const float* from = sums + (a * 4 * HIGH + r) * WIDE + v * LANES;
              V m[4];
              for (int b = 0; b < 4; ++b) m[b] = loadu(from + b * HIGH * WIDE);
              x[a][0] = m[0] + m[1] + m[2], x[a][1] = m[1] - m[2] - m[3];
            }
#pragma GCC unroll 2
            for (int b = 0; b < 2; ++b) {
              if (b && !made[r].right) break;
              V top = x[0][b] + x[1][b] + x[2][b] + shift[v], low = x[1][b] - x[2][b] - x[3][b] + shift[v];
              if (s.flags & conv::RELU) top = max(set(0.0f), top), low = max(set(0.0f), low);
              auto give = [&](V sum, int64_t at) { storeu(to + at, base ? loadu(base + at) + sum : sum); };
              give(top, place + b * step);
              if (made[r].below) give(low, place + (s.width + b) * step);
            }
          }
        }
      }
    }
  });
}

// The gradient of the weight, (groups, tap, out, in): Gᵀ u G of the sums u at each point.
void weight_gradient(const Shape& s, const float* map, const float* grad, float* to, Parallel parallel) {
  const int64_t size = int64_t(s.out) * s.in, all = s.groups * POINTS * size;
  std::vector<float> sums(size_t(s.threads) * all);
  const int threads = strips(s, s.in + s.out, true, parallel, [&](const Strip& at, int t) {
    const int count = at.rows * s.across();
    Arena arena{memory(int64_t(count) * (s.in + s.out) * POINTS * sizeof(float) + 128)};
    float *x = arena.take<float>(int64_t(count) * s.in * POINTS), *g = arena.take<float>(int64_t(count) * s.out * POINTS);
    spread(map, s, at, count, x);
    spread_gradient(grad, s, at, count, g);
    float* own = sums.data() + t * all + at.group * POINTS * size;
    for (int p = 0; p < POINTS; ++p)
      for (int n = 0; n < s.in; n += WIDE)
        for (int r = 0; r < s.out; r += LOW)
          add_products<Full>(g + int64_t(p) * count * s.out + r, s.out, x + int64_t(p) * count * s.in + n, s.in, count,
                       own + p * size + r * s.in + n);
  });
  auto back = [](V a, V b, V c, V d, V* t) {
    V sum = (b + c) * set(0.5f), difference = (b - c) * set(0.5f);
    t[0] = a + sum, t[1] = difference, t[2] = sum + d;
  };
  for (int g = 0; g < s.groups; ++g)
    for (int64_t i = 0; i < size; i += LANES) {
      V x[4][3];
      for (int b = 0; b < 4; ++b) {
        V u[4];
        for (int a = 0; a < 4; ++a) {
          const float* from = sums.data() + (int64_t(g) * POINTS + a * 4 + b) * size + i;
          u[a] = loadu(from);
          for (int t = 1; t < threads; ++t) u[a] += loadu(from + t * all);
        }
        back(u[0], u[1], u[2], u[3], x[b]);
      }
      for (int a = 0; a < 3; ++a) {
        V made[3];
        back(x[0][a], x[1][a], x[2][a], x[3][a], made);
        for (int b = 0; b < 3; ++b) storeu(to + (int64_t(g) * 9 + a * 3 + b) * size + i, made[b]);
      }
    }
}

}  // namespace

extern "C" {

// `in` and `out` are multiples of 32. The weight is as it comes, and as `conv_filters` gives it.
int conv_filters(const conv::Shape* s, const float* weight, float* to, Parallel parallel) {
  return guarded([&] { filters(weight, *s, to, parallel); });
}

int conv_forward(const conv::Shape* s, const float* map, const float* filters, const float* bias, const float* base,
                 float* to, Parallel parallel) {
  return guarded([&] {
    const Shape shape{*s};
    s->in == 32 ? forward<32>(shape, map, filters, bias, base, to, parallel)
                : forward<0>(shape, map, filters, bias, base, to, parallel);
  });
}

int winograd_weight(const conv::Shape* s, const float* map, const float* grad, float* to, Parallel parallel) {
  return guarded([&] { weight_gradient(Shape{*s}, map, grad, to, parallel); });
}
}
