// The block itself, over tiles; part of inner.cpp.

struct Plan {
  int64_t sets;
  int m, c, heads, d, hidden, padded, fills, T, sets_in_tile;  // fills: vectors that one set fills
  bool shared;                                                 // several sets in one vector
  float eps1, eps2;
  std::vector<float> words;   // T vectors: all bits set in lanes that are words, none in those that fill up
  std::vector<int32_t> index; // for each word j a vector: the lane of word j of the same set

  explicit Plan(const Shape& s)
      : sets(s.sets), m(s.words), c(s.width), heads(s.heads), d(s.width / s.heads), hidden(s.hidden), padded(1),
        eps1(s.eps1), eps2(s.eps2) {
    while (padded < m && padded < LANES) padded *= 2;
    if (padded < m) padded = (m + LANES - 1) / LANES * LANES;
    shared = padded < LANES;
    fills = shared ? 1 : padded / LANES;
    T = fills % 2 ? 2 * fills : fills;
    sets_in_tile = T * LANES / padded;
    words.resize(T * LANES);
    for (int i = 0; i < T * LANES; ++i) {
      uint32_t bits = i % padded < m ? 0xffffffffu : 0u;
      std::memcpy(&words[i], &bits, 4);
    }
    index.resize(padded * LANES);
    for (int j = 0; shared && j < padded; ++j)
      for (int i = 0; i < LANES; ++i) index[j * LANES + i] = i / padded * padded + j;
  }
  int tiles() const { return int((sets + sets_in_tile - 1) / sets_in_tile); }
};

constexpr int up4(int n) { return (n + 3) / 4 * 4; }

// The weights as `product` reads them; those with a T are transposed, for gradients.
struct Packed {
  float *qkv_w, *qkv_b, *fc1_w, *fc1_b;  // folded, row by row
  float *qkv, *proj, *fc1, *fc2, *qkv_t, *proj_t, *fc1_t, *fc2_t;
  const float *proj_b, *fc2_b;

  void lay(const Plan& s, Arena& a, bool back) {
    int c = s.c, h = s.hidden, q = 3 * c;
    qkv_w = a.take<float>(q * c), qkv_b = a.take<float>(q), fc1_w = a.take<float>(h * c), fc1_b = a.take<float>(h);
    qkv = a.take<float>(q * c), proj = a.take<float>(c * c), fc1 = a.take<float>(h * c), fc2 = a.take<float>(h * c);
    if (!back) return;
    qkv_t = a.take<float>(q * c), proj_t = a.take<float>(c * c);
    fc1_t = a.take<float>(h * c), fc2_t = a.take<float>(h * c);
  }

  // What the rows of qkv are multiplied by.
  static float factor(const Plan& s, int row) { return row < s.c ? LOG2E / std::sqrt(float(s.d)) : 1.0f; }

  void fill(const Plan& s, const float* const* p, bool back) {
    int c = s.c, h = s.hidden, q = 3 * c;
    auto fold = [c](const float* w, const float* b, const float* g, const float* beta, int o, float by, float* to_w,
                    float* to_b) {
      float sum = b ? b[o] : 0.0f;
      for (int i = 0; i < c; ++i) sum += w[o * c + i] * beta[i], to_w[o * c + i] = by * w[o * c + i] * g[i];
      to_b[o] = by * sum;
    };
    for (int o = 0; o < q; ++o) fold(p[QKV_W], p[QKV_B], p[G1], p[B1], o, factor(s, o), qkv_w, qkv_b);
    for (int o = 0; o < h; ++o) fold(p[FC1_W], p[FC1_B], p[G2], p[B2], o, 1.0f, fc1_w, fc1_b);
    proj_b = p[PROJ_B], fc2_b = p[FC2_B];
    auto both = [back](const float* w, int out, int in, float* to, float* to_t) {
      pack(to, out, in, [=](int o, int i) { return w[o * in + i]; });
      if (back) pack(to_t, in, out, [=](int i, int o) { return w[o * in + i]; });
    };
    both(qkv_w, q, c, qkv, qkv_t), both(p[PROJ_W], c, c, proj, proj_t);
    both(fc1_w, h, c, fc1, fc1_t), both(p[FC2_W], c, h, fc2, fc2_t);
  }
};

// The rows of one tile. What weights' gradients need comes first, and lies once for each tile of a chunk.
struct Tile {
  V *n1, *dqkv, *o, *dz1, *n2, *dpre, *h, *dz2;
  V *x, *x1, *qkv, *e, *top, *inv, *r1, *r2, *slope, *s1, *s2, *y, *dn, *dout, *dot, *p, *dp;

  static int kept_rows(const Plan& s) { return 5 * up4(s.c) + up4(3 * s.c) + 2 * up4(s.hidden); }
  void keep(const Plan& s, V* at) {
    int c = up4(s.c) * s.T, q = up4(3 * s.c) * s.T, f = up4(s.hidden) * s.T;
    n1 = at, o = n1 + c, dz1 = o + c, n2 = dz1 + c, dz2 = n2 + c, dqkv = dz2 + c, dpre = dqkv + q, h = dpre + f;
  }
  void lay(const Plan& s, Arena& a) {
    size_t T = s.T, c = s.c * T;
    x = a.take<V>(c), x1 = a.take<V>(c), y = a.take<V>(c), dn = a.take<V>(c), dout = a.take<V>(c);
    qkv = a.take<V>(3 * c), slope = a.take<V>(s.hidden * T), e = a.take<V>(s.heads * T * s.m);
    top = a.take<V>(s.heads * T), inv = a.take<V>(s.heads * T), p = a.take<V>(s.m), dp = a.take<V>(s.m);
    r1 = a.take<V>(T), r2 = a.take<V>(T), s1 = a.take<V>(T), s2 = a.take<V>(T), dot = a.take<V>(T);
  }
};

// ---- memory (sets, channels, words) to rows and back; lanes without a word are zero

template <int M>
void load(const Plan& s, const float* x, int64_t first, V* to) {
  int m = M ? M : s.m, sets = int(std::min<int64_t>(s.sets_in_tile, s.sets - first));
  bool full = m == s.padded && sets == s.sets_in_tile;
  for (int i = 0; i < s.c; ++i) {
    float* row = reinterpret_cast<float*>(to + i * s.T);
    if (!full) std::memset(row, 0, s.T * sizeof(V));
    for (int n = 0; n < sets; ++n) std::memcpy(row + n * s.padded, x + ((first + n) * s.c + i) * m, m * sizeof(float));
  }
}

template <int M>
void store(const Plan& s, const V* from, int64_t first, float* x) {
  int m = M ? M : s.m, sets = int(std::min<int64_t>(s.sets_in_tile, s.sets - first));
  for (int i = 0; i < s.c; ++i) {
    const float* row = reinterpret_cast<const float*>(from + i * s.T);
    for (int n = 0; n < sets; ++n) std::memcpy(x + ((first + n) * s.c + i) * m, row + n * s.padded, m * sizeof(float));
  }
}

// The sizes that nets have are known to the compiler.
void load(const Plan& s, const float* x, int64_t first, V* to) {
  s.m == 16 ? load<16>(s, x, first, to) : s.m == 4 ? load<4>(s, x, first, to) : load<0>(s, x, first, to);
}
void store(const Plan& s, const V* from, int64_t first, float* x) {
  s.m == 16 ? store<16>(s, from, first, x) : s.m == 4 ? store<4>(s, from, first, x) : store<0>(s, from, first, x);
}

void load_factors(const Plan& s, const float* factors, int64_t first, V* to) {
  float* lanes = reinterpret_cast<float*>(to);
  for (int i = 0; i < s.T * LANES; ++i) {
    int64_t set = first + i / s.padded;
    lanes[i] = factors ? set < s.sets ? factors[set] : 0.0f : 1.0f;
  }
}

// ---- one tile

void norm(const V* x, V* to, V* scale, int c, int T, float eps) {
  V by = set(1.0f / float(c));
  for (int v = 0; v < T; v += 2) {
    V a0 = set(0.0f), a1 = a0, q0 = a0, q1 = a0;
    for (int i = v; i < c * T; i += T) a0 += x[i], a1 += x[i + 1];
    a0 = a0 * by, a1 = a1 * by;
    for (int i = v; i < c * T; i += T) {
      V d0 = x[i] - a0, d1 = x[i + 1] - a1;
      q0 = fma(d0, d0, q0), q1 = fma(d1, d1, q1);
      to[i] = d0, to[i + 1] = d1;
    }
    q0 = set(1.0f) / root(fma(q0, by, set(eps))), q1 = set(1.0f) / root(fma(q1, by, set(eps)));
    for (int i = v; i < c * T; i += T) to[i] = to[i] * q0, to[i + 1] = to[i + 1] * q1;
    scale[v] = q0, scale[v + 1] = q1;
  }
}

// dx = dy + the gradient through the norm whose output's gradient is dn.
void norm_back(const V* dn, const V* n, const V* scale, const V* dy, V* dx, int c, int T) {
  V by = set(1.0f / float(c));
  for (int v = 0; v < T; v += 2) {
    V a0 = set(0.0f), a1 = a0, q0 = a0, q1 = a0;
    for (int i = v; i < c * T; i += T) {
      a0 += dn[i], a1 += dn[i + 1];
      q0 = fma(dn[i], n[i], q0), q1 = fma(dn[i + 1], n[i + 1], q1);
    }
    a0 = a0 * by, a1 = a1 * by, q0 = q0 * by, q1 = q1 * by;
    for (int i = v; i < c * T; i += T) {
      dx[i] = fma(scale[v], dn[i] - fma(n[i], q0, a0), dy[i]);
      dx[i + 1] = fma(scale[v + 1], dn[i + 1] - fma(n[i + 1], q1, a1), dy[i + 1]);
    }
  }
}

template <bool SHARED>
void attention(const Plan& s, Tile& t) {
  for (int h = 0; h < s.heads; ++h) {
    const V *q = t.qkv + h * s.d * s.T, *k = q + s.c * s.T, *val = k + s.c * s.T;
    for (int v = 0; v < s.T; ++v) {
      Words<SHARED> word{s.index.data(), v, v - v % s.fills};
      V* e = t.e + (h * s.T + v) * s.m;
      scores(q, k, s.d, s.T, word, s.m, e);
      V top = e[0], sum = set(0.0f);
      for (int j = 1; j < s.m; ++j) top = max(top, e[j]);
      for (int j = 0; j < s.m; ++j) e[j] = exp2(e[j] - top), sum += e[j];
      V inv = set(1.0f) / sum;
      mix(e, val, s.d, s.T, word, s.m, inv, t.o + h * s.d * s.T);
      t.top[h * s.T + v] = top, t.inv[h * s.T + v] = inv;
    }
  }
}

// From t.dout to t.dqkv. First with queries in lanes, then, computing weights again, with keys: no transposition.
template <bool SHARED>
void attention_back(const Plan& s, Tile& t) {
  for (int h = 0; h < s.heads; ++h) {
    int at = h * s.d * s.T, c = s.c * s.T;
    const V *q = t.qkv + at, *k = q + c, *val = k + c, *out = t.o + at, *dout = t.dout + at;
    for (int v = 0; v < s.T; ++v) {
      Words<SHARED> word{s.index.data(), v, v - v % s.fills};
      const V* e = t.e + (h * s.T + v) * s.m;
      V dot = set(0.0f), inv = t.inv[h * s.T + v] * set(LN2);
      for (int i = v; i < s.d * s.T; i += s.T) dot = fma(dout[i], out[i], dot);
      t.dot[v] = dot;
      scores(dout, val, s.d, s.T, word, s.m, t.dp);
      for (int j = 0; j < s.m; ++j) t.dp[j] = e[j] * (t.dp[j] - dot);
      mix(t.dp, k, s.d, s.T, word, s.m, inv, t.dqkv + at);
    }
    for (int v = 0; v < s.T; ++v) {
      Words<SHARED> word{s.index.data(), v, v - v % s.fills};
      scores(k, q, s.d, s.T, word, s.m, t.p);
      for (int j = 0; j < s.m; ++j)
        t.p[j] = exp2(t.p[j] - word(t.top + h * s.T, j)) * word(t.inv + h * s.T, j);
      mix(t.p, dout, s.d, s.T, word, s.m, set(1.0f), t.dqkv + 2 * c + at);
      scores(val, dout, s.d, s.T, word, s.m, t.dp);
      for (int j = 0; j < s.m; ++j) t.dp[j] = t.p[j] * (t.dp[j] - word(t.dot, j));
      mix(t.dp, q, s.d, s.T, word, s.m, set(LN2), t.dqkv + c + at);
    }
  }
  if (s.padded == s.m) return;
  // keys that only fill up
  for (int i = s.c * s.T; i < 3 * s.c * s.T; ++i) t.dqkv[i] = mask(t.dqkv[i], loadu(&s.words[i % s.T * LANES]));
}

// From t.x to t.y; with BACK, all that the backward pass reads is left in the tile.
template <bool BACK>
void forward_tile(const Plan& s, const Packed& w, Tile& t) {
  int c = s.c, T = s.T;
  norm(t.x, t.n1, t.r1, c, T, s.eps1);
  product(w.qkv, w.qkv_b, 3 * c, c, t.n1, T, [q = t.qkv](int i, int, V a) { q[i] = a; });
  s.shared ? attention<true>(s, t) : attention<false>(s, t);
  product(w.proj, w.proj_b, c, c, t.o, T,
          [to = t.x1, by = t.s1, x = t.x](int i, int v, V a) { to[i] = fma(a, by[v], x[i]); });
  norm(t.x1, t.n2, t.r2, c, T, s.eps2);
  product(w.fc1, w.fc1_b, s.hidden, c, t.n2, T, [h = t.h](int i, int, V a) { h[i] = a; });
  for (int i = 0; i < s.hidden * T; ++i) {
    V x = t.h[i], p = phi(x);
    t.h[i] = x * p;
    // GELU's slope Φ + x·φ, with φ(x) = 2^(-x²/2 · log2 e - log2 √(2π))
    if (BACK) t.slope[i] = fma(x, exp2(fma(x * x, set(-0.72134752f), set(-1.32574806f))), p);
  }
  if (BACK) return;
  product(w.fc2, w.fc2_b, c, s.hidden, t.h, T,
          [to = t.y, by = t.s2, x = t.x1](int i, int v, V a) { to[i] = fma(a, by[v], x[i]); });
}

// From t.y, the output's gradient, to the input's in its place.
void backward_tile(const Plan& s, const Packed& w, Tile& t) {
  int c = s.c, T = s.T;
  for (int i = 0; i < c * T; ++i) t.dz2[i] = t.y[i] * t.s2[i % T];
  product(w.fc2_t, nullptr, s.hidden, c, t.dz2, T, [to = t.dpre, by = t.slope](int i, int, V a) { to[i] = a * by[i]; });
  product(w.fc1_t, nullptr, c, s.hidden, t.dpre, T, [to = t.dn](int i, int, V a) { to[i] = a; });
  norm_back(t.dn, t.n2, t.r2, t.y, t.y, c, T);
  for (int i = 0; i < c * T; ++i) t.dz1[i] = t.y[i] * t.s1[i % T];
  product(w.proj_t, nullptr, c, c, t.dz1, T, [to = t.dout](int i, int, V a) { to[i] = a; });
  s.shared ? attention_back<true>(s, t) : attention_back<false>(s, t);
  product(w.qkv_t, nullptr, c, 3 * c, t.dqkv, T, [to = t.dn](int i, int, V a) { to[i] = a; });
  norm_back(t.dn, t.n1, t.r1, t.y, t.y, c, T);
}
