// A pre-norm transformer block over many tiny token sets, forward and backward, for x86 with AVX-512 or AVX2.
//
// Tokens lie in the lanes of a vector and channels in rows, so that norms, softmax and products need no shuffle; 16
// words of TNT are just one AVX-512 vector. A tile of T vectors goes through the whole block inside the first-level
// cache. Only the input is kept for the backward pass, which computes everything else again.
//
//     lanes     words are filled up to `padded`: a power of two below the lanes, or a multiple of them. A vector then
//               holds `lanes / padded` sets, or a set fills `padded / lanes` vectors.
//     weights   the norms' affine parts are folded into the Linear behind them, and log2(e) / √head_dim into the
//               queries; gradients are unfolded at the end (Packed, Grads).
//     gradients of weights are dot products over lanes, taken over CHUNK tiles at a time.

#include "vector.h"

namespace {

constexpr int WIDE = LANES == 16 ? 12 : 6;  // rows of a product that are held in registers at a time, for two vectors
constexpr int GRADS = LANES / 4;           // rows of a weight's gradient taken at a time; columns: 4
constexpr int CHUNK_BYTES = 400 * 1024;    // what the weights' gradients read again should stay in the second cache
constexpr float LN2 = 0.69314718f;

// The sums over the lanes of four vectors.
inline __m128 sums(V a, V b, V c, V d) { return fold(quads(pairs(a, b), pairs(c, d))); }

struct Shape {  // as in native.py
  int64_t sets;
  int32_t words, width, heads, hidden;
  float eps1, eps2;
  int32_t threads;
};

enum { G1, B1, QKV_W, QKV_B, PROJ_W, PROJ_B, G2, B2, FC1_W, FC1_B, FC2_W, FC2_B, PARAMS };

// ---- products: rows of a tile times a small matrix, whose elements are broadcast

constexpr int rows_of(int left) {
  if (left >= WIDE && left != (LANES == 16 ? 16 : 8)) return WIDE;
  return left >= 8 && LANES == 16 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// The matrix `at(out, in)` in the order in which `product` reads it.
template <class F>
void pack(float* to, int out, int in, const F& at) {
  for (int o = 0; o < out;) {
    int rows = rows_of(out - o);
    for (int i = 0; i < in; ++i)
      for (int r = 0; r < rows; ++r) *to++ = at(o + r, i);
    o += rows;
  }
}

template <int R, int TILE, class F>
inline void product_rows(const float* w, const float* b, int o, int in, const V* x, int tile, const F& give) {
  const int T = TILE ? TILE : tile;
  for (int v = 0; v < T; v += 2) {
    V a0[R], a1[R];
    const float* c = b + o;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) a0[r] = a1[r] = set(b ? c[r] : 0.0f);
    const float* p = w;
    const V* q = x + v;
    for (int i = 0; i < in; ++i, p += R, q += T) {
      V x0 = q[0], x1 = q[1];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        V s = set(p[r]);
        a0[r] = fma(s, x0, a0[r]);
        a1[r] = fma(s, x1, a1[r]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0, at = o * T + v; r < R; ++r, at += T) give(at, v, a0[r]), give(at + 1, v + 1, a1[r]);
  }
}

template <int TILE, class F>
inline void product_tile(const float* w, const float* b, int out, int in, const V* x, int T, const F& give) {
  for (int o = 0; o < out;) {
    int rows = rows_of(out - o);
    switch (rows) {
      case WIDE: product_rows<WIDE, TILE>(w, b, o, in, x, T, give); break;
#if LANES == 16
      case 8: product_rows<8, TILE>(w, b, o, in, x, T, give); break;
#endif
      case 4: product_rows<4, TILE>(w, b, o, in, x, T, give); break;
      case 2: product_rows<2, TILE>(w, b, o, in, x, T, give); break;
      default: product_rows<1, TILE>(w, b, o, in, x, T, give);
    }
    o += rows, w += rows * in;
  }
}

// give(place, vector, W·x + b) for each row and vector of the result.
template <class F>
inline void product(const float* w, const float* b, int out, int in, const V* x, int T, const F& give) {
  if (T == 2) return product_tile<2>(w, b, out, in, x, T, give);  // most often; known to the compiler
  product_tile<0>(w, b, out, in, x, T, give);
}

// out[a][b] += the sum over lanes of a·b, for rows of two groups that lie in `tiles` tiles `stride` vectors apart.
void gradient(const V* a, int rows_a, const V* b, int rows_b, int tiles, int stride, int T, float* out) {
  for (int i = 0; i < rows_a; i += GRADS)
    for (int j = 0; j < rows_b; j += 4) {
      V s[GRADS][4];
#pragma GCC unroll 4
      for (int r = 0; r < GRADS; ++r) s[r][0] = s[r][1] = s[r][2] = s[r][3] = set(0.0f);
      for (int t = 0; t < tiles; ++t)
        for (int v = 0; v < T; ++v) {
          const V *p = a + t * stride + i * T + v, *q = b + t * stride + j * T + v;
          V b0 = q[0], b1 = q[T], b2 = q[2 * T], b3 = q[3 * T];
#pragma GCC unroll 4
          for (int r = 0; r < GRADS; ++r) {
            V x = p[r * T];
            s[r][0] = fma(x, b0, s[r][0]), s[r][1] = fma(x, b1, s[r][1]);
            s[r][2] = fma(x, b2, s[r][2]), s[r][3] = fma(x, b3, s[r][3]);
          }
        }
#pragma GCC unroll 4
      for (int r = 0; r < GRADS; ++r) {
        float* p = out + (i + r) * rows_b + j;
        _mm_storeu_ps(p, _mm_loadu_ps(p) + sums(s[r][0], s[r][1], s[r][2], s[r][3]));
      }
    }
}

// out[a] += the sum over lanes of a.
void row_sums(const V* a, int rows, int tiles, int stride, int T, float* out) {
  for (int i = 0; i < rows; i += 4) {
    V s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    for (int t = 0; t < tiles; ++t)
      for (int v = 0; v < T; ++v)
        for (int r = 0; r < 4; ++r) s[r] += a[t * stride + (i + r) * T + v];
    _mm_storeu_ps(out + i, _mm_loadu_ps(out + i) + sums(s[0], s[1], s[2], s[3]));
  }
}

// ---- attention: one vector of queries (or keys) against the words of its set

// Element j of each set of a row, in all lanes of that set.
template <bool SHARED>
struct Words {
  const int32_t* index;  // where several sets share a vector
  int v, first;          // the vector, and the first one of its set
  inline V operator()(const V* row, int j) const {
    if constexpr (SHARED) return permute(index + j * LANES, row[v]);
    return set(reinterpret_cast<const float*>(row + first)[j]);
  }
};

template <int K, class W>
inline void scores_block(const V* a, const V* b, int d, int T, const W& word, int j, V* out) {
  V s[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) s[k] = set(0.0f);
  for (int i = 0; i < d; ++i) {
    V x = a[i * T + word.v];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) s[k] = fma(x, word(b + i * T, j + k), s[k]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) out[k] = s[k];
}

// out[j] = the scalar product of a, in lanes, with word j of b.
template <class W>
inline void scores(const V* a, const V* b, int d, int T, const W& word, int m, V* out) {
  int j = 0;
#if LANES == 16
  for (; j + 16 <= m; j += 16) scores_block<16>(a, b, d, T, word, j, out + j);
#endif
  for (; j + 8 <= m; j += 8) scores_block<8>(a, b, d, T, word, j, out + j);
  for (; j + 4 <= m; j += 4) scores_block<4>(a, b, d, T, word, j, out + j);
  for (; j < m; ++j) scores_block<1>(a, b, d, T, word, j, out + j);
}

template <int D, class W>
inline void mix_block(const V* p, const V* b, int T, const W& word, int m, V by, V* out) {
  V s[D];
#pragma GCC unroll 8
  for (int i = 0; i < D; ++i) s[i] = set(0.0f);
  for (int j = 0; j < m; ++j) {
    V x = p[j];
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) s[i] = fma(x, word(b + i * T, j), s[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < D; ++i) out[i * T + word.v] = s[i] * by;
}

// out = by · the sum over words j of p[j] · word j of b.
template <class W>
inline void mix(const V* p, const V* b, int d, int T, const W& word, int m, V by, V* out) {
  for (int i = 0; i < d;) {
    int left = d - i, n = left >= 8 ? 8 : left >= 6 ? 6 : left >= 3 ? left == 3 ? 3 : 4 : left;
    const V* x = b + i * T;
    V* y = out + i * T;
    switch (n) {
      case 8: mix_block<8>(p, x, T, word, m, by, y); break;
      case 6: mix_block<6>(p, x, T, word, m, by, y); break;
      case 4: mix_block<4>(p, x, T, word, m, by, y); break;
      case 3: mix_block<3>(p, x, T, word, m, by, y); break;
      case 2: mix_block<2>(p, x, T, word, m, by, y); break;
      default: mix_block<1>(p, x, T, word, m, by, y);
    }
    i += n;
  }
}

#include "inner_block.h"
#include "inner_run.h"

}  // namespace

extern "C" {

// 0, or 1 where memory ran out. `params` as in the enum; s1, s2: a factor on each branch for each set, or null.
int inner_forward(const Shape* shape, const float* const* params, const float* x, const float* s1, const float* s2,
                  float* y, Parallel parallel) {
  return guarded([&] { forward(*shape, params, x, s1, s2, y, parallel); });
}

int inner_backward(const Shape* shape, const float* const* params, const float* x, const float* s1, const float* s2,
                   const float* dy, float* dx, float* const* grads, Parallel parallel) {
  return guarded([&] { backward(*shape, params, x, s1, s2, dy, dx, grads, parallel); });
}
}
