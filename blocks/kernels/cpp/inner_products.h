// Products of a tile's rows with small matrices, and the gradients of these; part of inner.cpp.

constexpr int up4(int n) { return (n + 3) / 4 * 4; }

template <class K>
constexpr int words_of(int n) {  // words that n elements fill
  return (n + K::U - 1) / K::U;
}

constexpr int rows_of(int left) { return left >= WIDE ? WIDE : left >= 4 ? 4 : 1; }

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

template <class K, int R, class F>
inline void product_rows(const float* w, const float* b, int in, const V* x, int64_t step, F give) {
  V a0[R], a1[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) a0[r] = a1[r] = set(0.0f);  // not b, which products would wait for
  for (int i = 0; i < in; ++i, w += R, x += step) {
    V x0 = x[0], x1 = x[1];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      V s = set(w[r]);
      a0[r] = K::dot(s, x0, a0[r]);
      a1[r] = K::dot(s, x1, a1[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    V c = set(b[r]);
    give(a0[r] + c, a1[r] + c);
  }
}

// Gives W·x + b, where b may be null: two vectors at a time, those of a row and then of the next one, to `give`, which
// is told first where they begin. The rows of x are words, `step` vectors apart.
template <class K, class F>
inline void product(const float* w, const float* b, int out, int in, const V* x, int step, int T, const F& give) {
  static constexpr float none[WIDE] = {};
  in = words_of<K>(in);
  for (int o = 0, rows; o < out; o += rows, w += rows * in) {
    rows = rows_of(out - o);
    const float* c = b ? b + o : none;
    for (int v = 0; v < T; v += 2) {
      F to = give;
      to.start(o, v);
      switch (rows) {
        case WIDE: product_rows<K, WIDE>(w, c, in, x + v, step, to); break;
        case 4: product_rows<K, 4>(w, c, in, x + v, step, to); break;
        default: product_rows<K, 1>(w, c, in, x + v, step, to);
      }
    }
  }
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
