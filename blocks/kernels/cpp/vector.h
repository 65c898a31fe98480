// What the kernels share: vectors of AVX-512 or AVX2, threads, memory. Each source includes it by itself.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define INLINE inline __attribute__((always_inline))  // else that depends on all the rest of the file

namespace {

#if LANES == 16
using V = __m512;
inline V set(float a) { return _mm512_set1_ps(a); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }  // gives b where one is NaN: ReLU is max(0, x)
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V root(V a) { return _mm512_sqrt_ps(a); }
inline V loadu(const float* p) { return _mm512_loadu_ps(p); }
inline void storeu(float* p, V a) { _mm512_storeu_ps(p, a); }
inline __mmask16 lanes(int count) { return __mmask16((1u << count) - 1); }
inline V loadu(const float* p, int count) { return _mm512_maskz_loadu_ps(lanes(count), p); }  // others are 0
inline void storeu(float* p, V a, int count) { _mm512_mask_storeu_ps(p, lanes(count), a); }
inline V permute(const int32_t* index, V a) { return _mm512_permutexvar_ps(_mm512_loadu_si512(index), a); }
inline V mask(V a, V b) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline V scale2(V a, V bits) {  // a · 2^n, n in the low bits of `bits`
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(bits), 23)));
}
inline V pairs(V a, V b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); }
inline V quads(V a, V b) {
  __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
}
inline __m128 fold(V a) {
  __m256 h = _mm512_castps512_ps256(a) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
  return _mm256_castps256_ps128(h) + _mm256_extractf128_ps(h, 1);
}
#else
using V = __m256;
inline V set(float a) { return _mm256_set1_ps(a); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V root(V a) { return _mm256_sqrt_ps(a); }
inline V loadu(const float* p) { return _mm256_loadu_ps(p); }
inline void storeu(float* p, V a) { _mm256_storeu_ps(p, a); }
inline __m256i lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V loadu(const float* p, int count) { return _mm256_maskload_ps(p, lanes(count)); }  // others are 0
inline void storeu(float* p, V a, int count) { _mm256_maskstore_ps(p, lanes(count), a); }
inline V permute(const int32_t* index, V a) {
  return _mm256_permutevar8x32_ps(a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
}
inline V mask(V a, V b) { return _mm256_and_ps(a, b); }
inline V scale2(V a, V bits) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(bits), 23)));
}
inline V pairs(V a, V b) { return _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b); }
inline V quads(V a, V b) {
  __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
  return _mm256_castpd_ps(_mm256_unpacklo_pd(x, y)) + _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
}
inline __m128 fold(V a) { return _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1); }
#endif

inline float total(V a) {
  __m128 x = fold(a);
  x = x + _mm_movehl_ps(x, x);
  return x[0] + x[1];
}

constexpr float LOG2E = 1.44269504f;

// What the next two do is a long chain for each vector: steps of several vectors in turn keep the processor busy.
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < N; ++i)

// 2^x for x ≤ 0, to half a unit of float32; NaN stays NaN.
template <int N>
inline void exp2(V* x) {
  static constexpr float q[] = {1.340546139e-03f, 9.618545203e-03f, 5.550312806e-02f,
                                2.402264570e-01f, 6.931472146e-01f, 1.0f};
  const V magic = set(12582912.0f);  // adding it rounds to a whole number, which then lies in the low bits
  V z[N], p[N];
  EACH x[i] = max(set(-126.0f), x[i]);
  EACH z[i] = x[i] + magic;
  EACH x[i] -= z[i] - magic;
  EACH p[i] = set(1.534410565e-04f);
#pragma GCC unroll 6
  for (float k : q) EACH p[i] = fma(p[i], x[i], set(k));
  EACH x[i] = scale2(p[i], z[i]);
}

// The normal distribution's Φ(x), to 1.5e-7: ½ + x·q(x²), a minimax polynomial on ±5.2, the last value outside.
template <int N>
inline void phi(V* x) {
  static constexpr float q[] = {1.268511028e-03f, -1.221493546e-03f, 1.800122663e-03f, -4.789039134e-03f,
                                8.559967785e-03f, -1.250512092e-02f, 1.795478687e-02f, -2.472362960e-02f,
                                3.198995929e-02f, -3.992981956e-02f, 5.002452135e-02f, -6.774366748e-02f,
                                1.359499930e-01f};
  V t[N], p[N];
  EACH x[i] = max(set(-5.2f), min(set(5.2f), x[i]));
  EACH t[i] = fma(x[i] * x[i], set(7.396449704e-02f), set(-1.0f));
  EACH p[i] = set(-4.812771797e-04f);
#pragma GCC unroll 13
  for (float k : q) EACH p[i] = fma(p[i], t[i], set(k));
  EACH x[i] = fma(x[i], p[i], set(0.5f));
}
#undef EACH

inline V exp2(V x) { return exp2<1>(&x), x; }
inline V phi(V x) { return phi<1>(&x), x; }

// f over n vectors: in four chains, which run side by side.
template <class F>
INLINE V together(const V* x, int n, const F& f) {
  V a = x[0];
  int j = 1;
  if (n >= 4) {
    V b = x[1], c = x[2], d = x[3];
    for (j = 4; j + 4 <= n; j += 4) a = f(a, x[j]), b = f(b, x[j + 1]), c = f(c, x[j + 2]), d = f(d, x[j + 3]);
    a = f(f(a, b), f(c, d));
  }
  for (; j < n; ++j) a = f(a, x[j]);
  return a;
}

struct Team {  // of OpenMP, in the copy that torch has, since another's threads would compete: as in native.py
  void (*start)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
  int (*number)();                                            // omp_get_thread_num
};
using Parallel = const Team*;  // null: threads of our own

// Calls work(0) … work(count - 1), each once, in threads. A thread takes the part of its own number: the same rows in one
// kernel after the other, which then lie in its cache and not in another's. Memory that runs out in one runs out in all.
template <class F>
void run(int count, Parallel parallel, const F& work) {
  if (count == 1) return work(0);
  struct Job {
    const F& work;
    const int count;
    const Parallel parallel;
    std::unique_ptr<std::atomic<bool>[]> taken{new std::atomic<bool>[count]()};
    std::atomic<bool> failed{false};
    void go(int number) {
      for (int i = 0; i < count; ++i) {  // there may be fewer threads than asked for
        const int part = (number + i) % count;
        if (taken[part].exchange(true)) continue;
        try {
          work(part);
        } catch (const std::bad_alloc&) {  // nothing may be thrown out of a thread
          failed = true;
        }
      }
    }
  } job{work, count, parallel};
  if (parallel) {
    auto go = [](void* p) { static_cast<Job*>(p)->go(static_cast<Job*>(p)->parallel->number()); };
    parallel->start(go, &job, count, 0);
  } else {
    std::vector<std::thread> threads;
    try {
      for (int i = 1; i < count; ++i) threads.emplace_back([&job, i] { job.go(i); });
    } catch (const std::exception&) {  // there may be no more: those that there are do the rest
    }
    job.go(0);
    for (auto& thread : threads) thread.join();
  }
  if (job.failed) throw std::bad_alloc();
}

// Tasks that threads take: each its own first, which lie side by side, and then what others have left.
class Tasks {
  struct alignas(64) Turn {
    std::atomic<int64_t> next;
  };
  const std::vector<int64_t> bounds;  // of each thread's
  const std::unique_ptr<Turn[]> turns;

 public:
  explicit Tasks(std::vector<int64_t> of) : bounds(std::move(of)), turns(new Turn[bounds.size() - 1]) {
    for (size_t t = 0; t + 1 < bounds.size(); ++t) turns[t].next = bounds[t];
  }

  template <class F>
  void each(int thread, const F& work) const {
    const int threads = int(bounds.size()) - 1;
    for (int i = 0; i < threads; ++i) {
      const int owner = (thread + i) % threads;
      for (int64_t task; (task = turns[owner].next++) < bounds[owner + 1];) work(task);
    }
  }
};

// Hands out parts of one piece of memory; without memory it only counts.
struct Arena {
  char* at;
  size_t used = 0;
  template <class X>
  X* take(size_t count) {
    X* p = reinterpret_cast<X*>(at + used);
    used += (count * sizeof(X) + 63) / 64 * 64;
    return p;
  }
};

// Memory of the calling thread that later calls use again: fresh pages cost more than the work on them.
char* memory(size_t bytes) {
  struct Block {
    void* p = nullptr;
    size_t size = 0;
    ~Block() { std::free(p); }
  };
  static thread_local Block block;
  if (block.size < bytes) {
    std::free(block.p);
    block.size = 0;
    if (posix_memalign(&block.p, 64, bytes)) {
      block.p = nullptr;
      throw std::bad_alloc();
    }
    block.size = bytes;
  }
  return static_cast<char*>(block.p);
}

template <class F>
int guarded(const F& act) {
  try {
    act();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

#if LANES == 16
// The parts of four vectors, summed: part r of the result is the sum of those of vector r.
inline V parts(const V* q) {
  auto two = [](V a, V b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); };
  return two(two(q[0], q[1]), two(q[2], q[3]));
}
// Lanes whose number has bit B are exchanged with those of the other vector that have it not.
template <int B>
inline void exchange(V& a, V& b) {
  constexpr __mmask16 have = B == 1 ? 0xaaaa : B == 2 ? 0xcccc : B == 4 ? 0xf0f0 : 0xff00, rest = 0xffff - have;
  constexpr int order = B == 1 || B == 4 ? 0xb1 : 0x4e;
  V x = a;
  if constexpr (B < 4) {
    a = _mm512_mask_permute_ps(a, have, b, order), b = _mm512_mask_permute_ps(b, rest, x, order);
  } else {
    a = _mm512_mask_shuffle_f32x4(a, have, b, b, order), b = _mm512_mask_shuffle_f32x4(b, rest, x, x, order);
  }
}
#else
inline V parts(const V* q) {
  return _mm256_permute2f128_ps(q[0], q[1], 0x20) + _mm256_permute2f128_ps(q[0], q[1], 0x31);
}
template <int B>
inline void exchange(V& a, V& b) {
  constexpr int have = B == 1 ? 0xaa : B == 2 ? 0xcc : 0xf0, order = B == 1 ? 0xb1 : 0x4e;
  auto other = [](V v) {
    if constexpr (B < 4) return _mm256_permute_ps(v, order);
    return _mm256_permute2f128_ps(v, v, 1);
  };
  V x = a;
  a = _mm256_blend_ps(a, other(b), have), b = _mm256_blend_ps(other(x), b, have);
}
#endif

}  // namespace
