// The block itself, over one tile; part of inner.cpp.

void norm(const V* x, V* to, int step, V* scale, int c, int T, float eps) {
  V by = set(1.0f / float(c));
  for (int v = 0; v < T; v += 2) {
    V a[4], q[4];  // of two vectors, even and odd channels
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) a[k] = q[k] = set(0.0f);
    const V* p = x + v;
    V* y = to + v;
    for (int i = 0; i + 1 < c; i += 2)
      a[0] += p[i * T], a[1] += p[i * T + 1], a[2] += p[i * T + T], a[3] += p[i * T + T + 1];
    if (c % 2) a[0] += p[(c - 1) * T], a[1] += p[(c - 1) * T + 1];
    a[0] = (a[0] + a[2]) * by, a[1] = (a[1] + a[3]) * by;
    auto add = [&](int i, int k) {
      V d0 = p[i * T] - a[0], d1 = p[i * T + 1] - a[1];
      q[k] = fma(d0, d0, q[k]), q[k + 1] = fma(d1, d1, q[k + 1]);
      y[i * step] = d0, y[i * step + 1] = d1;
    };
    for (int i = 0; i + 1 < c; i += 2) add(i, 0), add(i + 1, 2);
    if (c % 2) add(c - 1, 0);
    q[0] = set(1.0f) / root(fma(q[0] + q[2], by, set(eps))), q[1] = set(1.0f) / root(fma(q[1] + q[3], by, set(eps)));
    for (int i = 0; i < c; ++i) y[i * step] = y[i * step] * q[0], y[i * step + 1] = y[i * step + 1] * q[1];
    scale[v] = q[0], scale[v + 1] = q[1];
  }
}

// dx = dy + the gradient through the norm whose output's gradient is dn.
void norm_back(const V* dn, const V* n, int step, const V* scale, const V* dy, V* dx, int c, int T) {
  V by = set(1.0f / float(c));
  for (int v = 0; v < T; v += 2) {
    V a0 = set(0.0f), a1 = a0, q0 = a0, q1 = a0;
    for (int i = 0; i < c; ++i) {
      V d0 = dn[i * T + v], d1 = dn[i * T + v + 1];
      a0 += d0, a1 += d1;
      q0 = fma(d0, n[i * step + v], q0), q1 = fma(d1, n[i * step + v + 1], q1);
    }
    a0 = a0 * by, a1 = a1 * by, q0 = q0 * by, q1 = q1 * by;
    for (int i = 0; i < c; ++i) {
      int at = i * T + v;
      dx[at] = fma(scale[v], dn[at] - fma(n[i * step + v], q0, a0), dy[at]);
      dx[at + 1] = fma(scale[v + 1], dn[at + 1] - fma(n[i * step + v + 1], q1, a1), dy[at + 1]);
    }
  }
}

// GELU is x·Φ(x), its slope Φ + x·φ: both curves for four vectors. For bfloat16 they are ½ + x·q(x²), to 1.1e-4 and
// 3.2e-4: minimax polynomials on ±4.2, just 0 and 1 outside.
template <bool BACK, class K>
inline void curves(const V* x, V* p, V* slope) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) p[i] = x[i];
  if constexpr (K::U == 1) {
    phi<4>(p);
    if (!BACK) return;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) slope[i] = fma(x[i] * x[i], set(-0.72134752f), set(-1.32574806f));
    exp2<4>(slope);  // φ(x) = 2^(-x²/2 · log2 e - log2 √(2π))
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) slope[i] = fma(x[i], slope[i], p[i]);
  } else {
    V at[4], t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      at[i] = max(set(-4.2f), min(set(4.2f), x[i]));
      t[i] = fma(at[i] * at[i], set(1.133786848e-01f), set(-1.0f));
    }
    auto along = [&](const auto& q, V* to) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) to[i] = set(q[0]);
#pragma GCC unroll 8
      for (size_t k = 1; k < sizeof(q) / sizeof(q[0]); ++k)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) to[i] = fma(to[i], t[i], set(q[k]));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) to[i] = fma(at[i], to[i], set(0.5f));
    };
    static constexpr float value[] = {-5.213712011e-03f, 1.205489711e-02f, -1.454951402e-02f, 2.283663039e-02f,
                                      -3.859566114e-02f, 5.618670990e-02f, -8.151814410e-02f, 1.678464129e-01f};
    static constexpr float steep[] = {2.601831055e-02f, -5.936787863e-02f, 5.552671837e-02f,
                                      -6.479696445e-02f, 1.007556164e-01f, -1.124324025e-01f,
                                      1.032374988e-01f, -1.025894651e-01f, 1.726961855e-01f};
    along(value, p);
    if (BACK) along(steep, slope);
  }
}

// GELU of t.h: in its place, or for bfloat16 as products read it; with BACK as gradients do, and its slope too.
template <bool BACK, class K>
void gelu(const Plan& s, Tile<K>& t) {
  const V none = set(0.0f);
  const int T = s.T, hidden = s.hidden, step = t.step, flat_step = t.flat_step;
  V *const h = t.h.rows, *const kept = t.h.flat, *const woven = t.woven, *const steep = t.slope;
  for (int r = 0; r < hidden; r += 2)
    for (int v = 0; v < T; v += 2) {
      bool two = r + 1 < hidden;
      V *p = h + r * step + v, *q = p + step, *flat = kept + r * flat_step + v / 2;
      V x[4] = {p[0], p[1], two ? q[0] : none, two ? q[1] : none}, y[4], slope[4];
      curves<BACK, K>(x, y, slope);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) y[i] = y[i] * x[i];
      if constexpr (!Tile<K>::APART) {
        p[0] = y[0], p[1] = y[1], q[0] = y[2], q[1] = y[3];
      } else if constexpr (BACK) {
        flat[0] = K::join(y[0], y[1]), flat[flat_step] = K::join(y[2], y[3]);
      } else {
        woven[r / 2 * T + v] = K::weave(y[0], y[2]), woven[r / 2 * T + v + 1] = K::weave(y[1], y[3]);
      }
      if (!BACK) continue;
      V* to = steep + r * T + v;
      to[0] = slope[0], to[1] = slope[1], to[T] = slope[2], to[T + 1] = slope[3];
    }
}

// Where the rows of a product go, `step` vectors apart.
struct Put {
  V* to;
  int64_t step;
  void start(int r, int v) { to += r * step + v; }
  void operator()(V a, V b) { to[0] = a, to[1] = b, to += step; }
};

// The same, times rows T vectors apart.
struct Scaled {
  V* to;
  int64_t step;
  const V* by;
  int64_t T;
  void start(int r, int v) { to += r * step + v, by += r * T + v; }
  void operator()(V a, V b) { to[0] = a * by[0], to[1] = b * by[1], to += step, by += T; }
};

// A branch's end: what it adds to, and its factors.
struct Joined {
  V* to;
  const V *x, *by;
  int64_t T;
  void start(int r, int v) { to += r * T + v, x += r * T + v, by += v; }
  void operator()(V a, V b) { to[0] = fma(a, by[0], x[0]), to[1] = fma(b, by[1], x[1]), to += T, x += T; }
};

// From t.x to t.y; with BACK, all that the backward pass reads is left in the tile.
template <bool BACK, class K>
void forward_tile(const Plan& s, const Packed<K>& w, Tile<K>& t) {
  int c = s.c, T = s.T, S = K::U == 1 ? t.step : T;
  norm(t.x, t.n1.rows, t.step, t.r1, c, T, s.eps1);
  t.ahead.ask();
  product<K>(w.qkv, w.qkv_b, 3 * c, c, t.template settled<BACK>(s, t.n1, c), S, T, Put{t.qkv, T});
  t.ahead.ask();
  attention(s, t);
  t.ahead.ask();
  product<K>(w.proj, w.proj_b, c, c, t.template settled<BACK>(s, t.o, c), S, T, Joined{t.x1, t.x, t.s1, T});
  norm(t.x1, t.n2.rows, t.step, t.r2, c, T, s.eps2);
  t.ahead.ask();
  product<K>(w.fc1, w.fc1_b, s.hidden, c, t.template settled<BACK>(s, t.n2, c), S, T, Put{t.h.rows, t.step});
  t.ahead.ask();
  gelu<BACK>(s, t);
  t.ahead.ask();
  if (BACK) return;
  product<K>(w.fc2, w.fc2_b, c, s.hidden, t.APART ? t.woven : t.h.rows, S, T, Joined{t.y, t.x1, t.s2, T});
}

// From t.y, the output's gradient, to the input's in its place.
template <class K>
void backward_tile(const Plan& s, const Packed<K>& w, Tile<K>& t) {
  int c = s.c, T = s.T, step = t.step, S = K::U == 1 ? step : T;
  auto side = [&](const Side& x, int rows) { return t.template settled<true>(s, x, rows); };
  auto scaled = [&, c, T, step](const Side& x, const V* by) {
    const V* from = t.y;
    V* to = x.rows;
    for (int i = 0; i < c; ++i, from += T, to += step)
      for (int v = 0; v < T; v += 2) to[v] = from[v] * by[v], to[v + 1] = from[v + 1] * by[v + 1];
    return side(x, c);
  };
  product<K>(w.fc2_t, nullptr, s.hidden, c, scaled(t.dz2, t.s2), S, T, Scaled{t.dpre.rows, step, t.slope, T});
  product<K>(w.fc1_t, nullptr, c, s.hidden, side(t.dpre, s.hidden), S, T, Put{t.dn, T});
  norm_back(t.dn, t.n2.rows, step, t.r2, t.y, t.y, c, T);
  product<K>(w.proj_t, nullptr, c, c, scaled(t.dz1, t.s1), S, T, Put{t.dout, T});
  attention_back(s, t);
  product<K>(w.qkv_t, nullptr, c, 3 * c, side(t.dqkv, 3 * c), S, T, Put{t.dn, T});
  norm_back(t.dn, t.n1.rows, step, t.r1, t.y, t.y, c, T);
}
