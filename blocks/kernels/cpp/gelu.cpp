// GELU, and its backward pass, which gives what GELU gave too: a Linear behind it wants both, and they share their work.

#include "calls.h"

namespace {

#include "words.h"

// From x GELU(x); and with the gradient of it, in that one's place the gradient of x.
template <class K, bool BACK>
void gelu(const typename K::E* x, typename K::E* grad, typename K::E* to) {
  V a = K::widen(x), p = phi(a);
  K::narrow(to, max(a, set(-5.2f)) * p);  // below, Φ is no longer exact, nor 0
  if (!BACK) return;
  // GELU's slope Φ + x·φ, with φ(x) = 2^(-x²/2 · log2 e - log2 √(2π))
  V slope = fma(a, exp2(fma(a * a, set(-0.72134752f), set(-1.32574806f))), p);
  K::narrow(grad, K::widen(grad) * slope);
}

template <class K, bool BACK>
void all(const void* from, void* gradient, void* result, int64_t size, int threads, Parallel parallel) {
  using E = typename K::E;
  const E* x = static_cast<const E*>(from);
  E *grad = static_cast<E*>(gradient), *to = static_cast<E*>(result);
  int64_t vectors = size / LANES, rest = size % LANES, at = vectors * LANES;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, size >> 15)));
  run(threads, parallel, [&](int i) {
    for (int64_t k = vectors * i / threads * LANES, end = vectors * (i + 1) / threads * LANES; k < end; k += LANES)
      gelu<K, BACK>(x + k, BACK ? grad + k : nullptr, to + k);
  });
  if (!rest) return;
  E room[3][LANES] = {};
  size_t bytes = rest * sizeof(E);
  std::memcpy(room[0], x + at, bytes);
  if (BACK) std::memcpy(room[1], grad + at, bytes);
  gelu<K, BACK>(room[0], room[1], room[2]);
  if (BACK) std::memcpy(grad + at, room[1], bytes);
  std::memcpy(to + at, room[2], bytes);
}

template <class K>
void either(const void* x, void* grad, void* to, int64_t size, int threads, Parallel parallel) {
  grad ? all<K, true>(x, grad, to, size, threads, parallel) : all<K, false>(x, grad, to, size, threads, parallel);
}

}  // namespace

extern "C" {

// `grad` is null, or overwritten.
int gelu(const void* x, void* grad, void* to, int64_t size, int threads, Parallel parallel) {
  return guarded([&] { either<Full>(x, grad, to, size, threads, parallel); });
}

#ifdef __AVX512BF16__
int gelu_bf16(const void* x, void* grad, void* to, int64_t size, int threads, Parallel parallel) {
  return guarded([&] { either<Half>(x, grad, to, size, threads, parallel); });
}
#endif
}
