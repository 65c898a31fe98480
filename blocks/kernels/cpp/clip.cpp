// Gradients are clipped: the norm over all tensors together, then their scaling.

#include "vector.h"

namespace {

constexpr int64_t PIECE = 1 << 14;  // numbers that are worked on at a time: their order does not depend on the threads

// Calls work(first number, count, piece) for all pieces of all tensors.
template <class F>
void pieces(float* const* at, const int64_t* sizes, int64_t count, int threads, Parallel parallel, const F& work) {
  std::vector<std::array<int64_t, 2>> all;  // tensor, place in it
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < sizes[k]; i += PIECE) all.push_back({k, i});
  int64_t n = all.size();
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, n / 8)));
  run(threads, parallel, [&](int t) {
    for (int64_t p = n * t / threads; p < n * (t + 1) / threads; ++p) {
      auto [k, i] = all[p];
      work(at[k] + i, std::min(PIECE, sizes[k] - i), p);
    }
  });
}

double squares(const float* x, int64_t size) {
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      V a = loadu(x + i + k * LANES);
      sum[k] = fma(a, a, sum[k]);
    }
  double rest = 0.0;
  for (; i < size; ++i) rest += double(x[i]) * x[i];
  return rest + total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void scale(float* x, int64_t size, float factor) {
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}

}  // namespace

extern "C" int clip(float* const* at, const int64_t* sizes, int64_t count, double limit, int threads,
                    Parallel parallel) {
  return guarded([&] {
    int64_t parts = 0;
    for (int64_t k = 0; k < count; ++k) parts += (sizes[k] + PIECE - 1) / PIECE;
    std::vector<double> sums(parts);
    pieces(at, sizes, count, threads, parallel, [&](float* x, int64_t n, int64_t p) { sums[p] = squares(x, n); });
    double sum = 0.0;
    for (double part : sums) sum += part;
    float factor = float(limit / (std::sqrt(sum) + 1e-6));
    if (factor >= 1.0f) return;  // not a number is no such factor, and goes to all gradients
    pieces(at, sizes, count, threads, parallel, [&](float* x, int64_t n, int64_t) { scale(x, n, factor); });
  });
}
