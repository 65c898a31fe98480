// Products of a tile's rows with small matrices, and the gradients of these; part of inner.cpp.

constexpr int up4(int n) { return (n + 3) / 4 * 4; }

template <class K>
constexpr int words_of(int n) {  // words that n elements fill
  return (n + K::U - 1) / K::U;
}

constexpr int rows_of(int left) {
  if (left >= WIDE && left != (LANES == 16 ? 16 : 8)) return WIDE;
  return left >= 8 && LANES == 16 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// The matrix `at(out, in)` in the order in which `product` reads it.
template <class K, class F>
void pack(float* to, int out, int in, const F& at) {
  for (int o = 0; o < out;) {
    int rows = rows_of(out - o);
    for (int i = 0; i < in; i += K::U)
      for (int r = 0; r < rows; ++r) *to++ = K::word(at(o + r, i), i + 1 < in ? at(o + r, i + 1) : 0.0f);
    o += rows;
  }
}

template <class K, int R, int TILE, class F>
inline void product_rows(const float* w, const float* b, int o, int in, const V* x, int step, int tile, const F& give) {
  const int T = TILE ? TILE : tile;
  for (int v = 0; v < T; v += 2) {
    V a0[R], a1[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) a0[r] = a1[r] = set(0.0f);  // not b, which products would wait for
    const float* p = w;
    const V* q = x + v;
    for (int i = 0; i < in; ++i, p += R, q += step) {
      V x0 = q[0], x1 = q[1];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        V s = set(p[r]);
        a0[r] = K::dot(s, x0, a0[r]);
        a1[r] = K::dot(s, x1, a1[r]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      V c = set(b ? b[o + r] : 0.0f);
      give(o + r, v, a0[r] + c), give(o + r, v + 1, a1[r] + c);
    }
  }
}

template <class K, int TILE, class F>
inline void product_tile(const float* w, const float* b, int out, int in, const V* x, int step, int T, const F& give) {
  for (int o = 0; o < out;) {
    int rows = rows_of(out - o);
    switch (rows) {
      case WIDE: product_rows<K, WIDE, TILE>(w, b, o, in, x, step, T, give); break;
#if LANES == 16
      case 8: product_rows<K, 8, TILE>(w, b, o, in, x, step, T, give); break;
#endif
      case 4: product_rows<K, 4, TILE>(w, b, o, in, x, step, T, give); break;
      case 2: product_rows<K, 2, TILE>(w, b, o, in, x, step, T, give); break;
      default: product_rows<K, 1, TILE>(w, b, o, in, x, step, T, give);
    }
    o += rows, w += rows * in;
  }
}

// give(row, vector, W·x + b) for each row and vector of the result. The rows of x are words, `step` vectors apart.
template <class K, class F>
inline void product(const float* w, const float* b, int out, int in, const V* x, int step, int T, const F& give) {
  in = words_of<K>(in);
  if (T == 2) return product_tile<K, 2>(w, b, out, in, x, step, T, give);  // most often; known to the compiler
  product_tile<K, 0>(w, b, out, in, x, step, T, give);
}

// The sums over the lanes of LANES vectors.
inline V sums(const V* s) {
  V q[GRADS];
#pragma GCC unroll 4
  for (int r = 0; r < GRADS; ++r) q[r] = quads(pairs(s[4 * r], s[4 * r + 1]), pairs(s[4 * r + 2], s[4 * r + 3]));
  return parts(q);
}

// Where the gradient of a weight lies: in blocks of GRADS rows and 4 columns.
inline int place(int row, int column, int columns) {
  return (row / GRADS * (columns / 4) + column / 4) * LANES + row % GRADS * 4 + column % 4;
}

// out[a][b] += the sum over lanes of a·b, for two groups of rows that are n vectors long and `step` vectors apart.
template <class K>
void gradient(const V* a, int rows_a, const V* b, int rows_b, int n, int step, float* out) {
  for (int i = 0; i < rows_a; i += GRADS)
    for (int j = 0; j < rows_b; j += 4, out += LANES) {
      V s[LANES];
#pragma GCC unroll 16
      for (int k = 0; k < LANES; ++k) s[k] = set(0.0f);
      const V *p = a + i * step, *q = b + j * step;
      for (int t = 0; t < n; ++t, ++p, ++q) {
        V y[4] = {q[0], q[step], q[2 * step], q[3 * step]};
#pragma GCC unroll 4
        for (int r = 0; r < GRADS; ++r) {
          V x = p[r * step];
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) s[4 * r + k] = K::dot(x, y[k], s[4 * r + k]);
        }
      }
      storeu(out, loadu(out) + sums(s));
    }
}

// out[a] += the sum over lanes of a.
template <class K>
void row_sums(const V* a, int rows, int n, int step, float* out) {
  const V one = set(K::word(1.0f, 1.0f));
  for (int i = 0; i < rows; i += 4, a += 4 * step) {
    V s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    for (int t = 0; t < n; ++t)
      for (int r = 0; r < 4; ++r) s[r] = K::dot(a[r * step + t], one, s[r]);
    _mm_storeu_ps(out + i, _mm_loadu_ps(out + i) + fold(quads(pairs(s[0], s[1]), pairs(s[2], s[3]))));
  }
}
