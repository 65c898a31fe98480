// The block itself, over one tile; part of inner.cpp.

void norm(const V* x, V* to, int step, V* scale, int c, int T, float eps) {
  V by = set(1.0f / float(c));
  for (int v = 0; v < T; v += 2) {
    V a0 = set(0.0f), a1 = a0, q0 = a0, q1 = a0;
    const V* p = x + v;
    V* y = to + v;
    for (int i = 0; i < c; ++i) a0 += p[i * T], a1 += p[i * T + 1];
    a0 = a0 * by, a1 = a1 * by;
    for (int i = 0; i < c; ++i) {
      V d0 = p[i * T] - a0, d1 = p[i * T + 1] - a1;
      q0 = fma(d0, d0, q0), q1 = fma(d1, d1, q1);
      y[i * step] = d0, y[i * step + 1] = d1;
    }
    q0 = set(1.0f) / root(fma(q0, by, set(eps))), q1 = set(1.0f) / root(fma(q1, by, set(eps)));
    for (int i = 0; i < c; ++i) y[i * step] = y[i * step] * q0, y[i * step + 1] = y[i * step + 1] * q1;
    scale[v] = q0, scale[v + 1] = q1;
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

// GELU in place; with BACK its slope too. Rows are filled up to multiples of 4.
template <bool BACK>
void gelu(V* h, int step, V* slope, int rows, int T) {
  for (int r = 0; r < rows; r += 2)
    for (int v = 0; v < T; v += 2) {
      V *at = h + r * step + v, x[4] = {at[0], at[1], at[step], at[step + 1]}, p[4] = {x[0], x[1], x[2], x[3]}, e[4];
      phi<4>(p);
      at[0] = x[0] * p[0], at[1] = x[1] * p[1], at[step] = x[2] * p[2], at[step + 1] = x[3] * p[3];
      if (!BACK) continue;
      // Φ + x·φ, with φ(x) = 2^(-x²/2 · log2 e - log2 √(2π))
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) e[i] = fma(x[i] * x[i], set(-0.72134752f), set(-1.32574806f));
      exp2<4>(e);
      V* to = slope + r * T + v;
      to[0] = fma(x[0], e[0], p[0]), to[1] = fma(x[1], e[1], p[1]);
      to[T] = fma(x[2], e[2], p[2]), to[T + 1] = fma(x[3], e[3], p[3]);
    }
}

// From t.x to t.y; with BACK, all that the backward pass reads is left in the tile.
template <bool BACK, class K>
void forward_tile(const Plan& s, const Packed<K>& w, Tile<K>& t) {
  int c = s.c, T = s.T, S = K::U == 1 ? t.step : T;
  norm(t.x, t.n1.rows, t.step, t.r1, c, T, s.eps1);
  product<K>(w.qkv, w.qkv_b, 3 * c, c, t.template settled<true, BACK>(s, t.n1, c), S, T,
             [q = t.qkv, T](int r, int v, V a) { q[r * T + v] = a; });
  s.shared ? attention<true>(s, t) : attention<false>(s, t);
  product<K>(w.proj, w.proj_b, c, c, t.template settled<true, BACK>(s, t.o, c), S, T,
             [to = t.x1, by = t.s1, x = t.x, T](int r, int v, V a) { to[r * T + v] = fma(a, by[v], x[r * T + v]); });
  norm(t.x1, t.n2.rows, t.step, t.r2, c, T, s.eps2);
  product<K>(w.fc1, w.fc1_b, s.hidden, c, t.template settled<true, BACK>(s, t.n2, c), S, T,
             [h = t.h.rows, step = t.step](int r, int v, V a) { h[r * step + v] = a; });
  gelu<BACK>(t.h.rows, t.step, t.slope, s.hidden, T);
  const V* h = t.template settled<!BACK, BACK>(s, t.h, s.hidden);
  if (BACK) return;
  product<K>(w.fc2, w.fc2_b, c, s.hidden, h, S, T,
             [to = t.y, by = t.s2, x = t.x1, T](int r, int v, V a) { to[r * T + v] = fma(a, by[v], x[r * T + v]); });
}

// From t.y, the output's gradient, to the input's in its place.
template <class K>
void backward_tile(const Plan& s, const Packed<K>& w, Tile<K>& t) {
  int c = s.c, T = s.T, step = t.step, S = K::U == 1 ? step : T;
  auto side = [&](const Side& x, int rows) { return t.template settled<true, true>(s, x, rows); };
  auto scaled = [&](const Side& x, const V* by) {
    for (int i = 0; i < c; ++i)
      for (int v = 0; v < T; ++v) x.rows[i * step + v] = t.y[i * T + v] * by[v];
    return side(x, c);
  };
  product<K>(w.fc2_t, nullptr, s.hidden, c, scaled(t.dz2, t.s2), S, T,
             [to = t.dpre.rows, by = t.slope, step, T](int r, int v, V a) { to[r * step + v] = a * by[r * T + v]; });
  product<K>(w.fc1_t, nullptr, c, s.hidden, side(t.dpre, s.hidden), S, T,
             [to = t.dn, T](int r, int v, V a) { to[r * T + v] = a; });
  norm_back(t.dn, t.n2.rows, step, t.r2, t.y, t.y, c, T);
  product<K>(w.proj_t, nullptr, c, c, scaled(t.dz1, t.s1), S, T,
             [to = t.dout, T](int r, int v, V a) { to[r * T + v] = a; });
  s.shared ? attention_back<true>(s, t) : attention_back<false>(s, t);
  product<K>(w.qkv_t, nullptr, c, 3 * c, side(t.dqkv, 3 * c), S, T,
             [to = t.dn, T](int r, int v, V a) { to[r * T + v] = a; });
  norm_back(t.dn, t.n1.rows, step, t.r1, t.y, t.y, c, T);
}
