// Attention inside each set: one vector of queries (or keys) against the words of its set; part of inner.cpp.

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

// f(j) for the words j of a set: M, where that is known to the compiler.
template <int M, class F>
INLINE void each(int m, const F& f) {
  if constexpr (M > 0) {
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j) f(j);
  } else {
    for (int j = 0; j < m; ++j) f(j);
  }
}

template <int K, class W>
INLINE void scores_block(const V* a, int step_a, const V* b, int step_b, int d, const W& word, int j, V* out) {
  V s[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) s[k] = set(0.0f);
  for (int i = 0; i < d; ++i) {
    V x = a[i * step_a + word.v];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) s[k] = fma(x, word(b + i * step_b, j + k), s[k]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) out[k] = s[k];
}

// out[j] = the scalar product of a, in lanes, with word j of b.
template <class W>
INLINE void scores(const V* a, int step_a, const V* b, int step_b, int d, const W& word, int m, V* out) {
  int j = 0;
#if LANES == 16
  for (; j + 16 <= m; j += 16) scores_block<16>(a, step_a, b, step_b, d, word, j, out + j);
#endif
  for (; j + 8 <= m; j += 8) scores_block<8>(a, step_a, b, step_b, d, word, j, out + j);
  for (; j + 4 <= m; j += 4) scores_block<4>(a, step_a, b, step_b, d, word, j, out + j);
  for (; j < m; ++j) scores_block<1>(a, step_a, b, step_b, d, word, j, out + j);
}

template <int D, int M, class W>
INLINE void mix_block(const V* p, const V* b, int step_b, const W& word, int m, V by, V* out, int step) {
  V s[D];
#pragma GCC unroll 8
  for (int i = 0; i < D; ++i) s[i] = set(0.0f);
  each<M>(m, [&](int j) {
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) s[i] = fma(p[j], word(b + i * step_b, j), s[i]);
  });
#pragma GCC unroll 8
  for (int i = 0; i < D; ++i) out[i * step + word.v] = s[i] * by;
}

// out = by · the sum over words j of p[j] · word j of b.
template <int M, class W>
INLINE void mix(const V* p, const V* b, int step_b, int d, const W& word, int m, V by, V* out, int step) {
  for (int i = 0; i < d;) {
    int left = d - i, n = left >= 8 ? 8 : left >= 6 ? 6 : left >= 3 ? left == 3 ? 3 : 4 : left;
    const V* x = b + i * step_b;
    V* y = out + i * step;
    switch (n) {
      case 8: mix_block<8, M>(p, x, step_b, word, m, by, y, step); break;
      case 6: mix_block<6, M>(p, x, step_b, word, m, by, y, step); break;
      case 4: mix_block<4, M>(p, x, step_b, word, m, by, y, step); break;
      case 3: mix_block<3, M>(p, x, step_b, word, m, by, y, step); break;
      case 2: mix_block<2, M>(p, x, step_b, word, m, by, y, step); break;
      default: mix_block<1, M>(p, x, step_b, word, m, by, y, step);
    }
    i += n;
  }
}

// x[j] = 2^(x[j] - top).
INLINE void exponentials(V* x, int n, V top) {
  int j = 0;
  for (; j + 4 <= n; j += 4) {
    V y[4] = {x[j] - top, x[j + 1] - top, x[j + 2] - top, x[j + 3] - top};
    exp2<4>(y);
    x[j] = y[0], x[j + 1] = y[1], x[j + 2] = y[2], x[j + 3] = y[3];
  }
  for (; j < n; ++j) x[j] = exp2(x[j] - top);
}

// In each group of P lanes rows become columns: P rows, those from `count` on are zero.
template <int P>
INLINE void turn_groups(const V* from, int count, V* to) {
  V x[P];
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) x[i] = i < count ? from[i] : set(0.0f);
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i)
    if (!(i & 1) && P > 1) exchange<1>(x[i], x[i + 1]);
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i)
    if (!(i & 2) && P > 2) exchange<2>(x[i], x[i + 2]);
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i)
    if (!(i & 4) && P > 4) exchange<4>(x[i], x[i + 4]);
#if LANES == 16
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i)
    if (!(i & 8) && P > 8) exchange<8>(x[i], x[i + 8]);
#endif
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) to[i] = x[i];
}

inline void turn_groups(const V* from, int count, V* to, int width) {
  switch (width) {
#if LANES == 16
    case 16: return turn_groups<16>(from, count, to);
#endif
    case 8: return turn_groups<8>(from, count, to);
    case 4: return turn_groups<4>(from, count, to);
    case 2: return turn_groups<2>(from, count, to);
    default: to[0] = from[0];
  }
}

// M, D: words and the heads' width, where they are known to the compiler, which then has a set's weights in registers.
// From t.qkv to t.o; the weights before they are divided by their sum stay in t.e, what divides them in t.inv.
template <bool SHARED, int M, int D, class K>
void attention(const Plan& s, Tile<K>& t) {
  const int m = M ? M : s.m, d = D ? D : s.d, T = M == LANES ? 2 : s.T;
  for (int h = 0; h < s.heads; ++h) {
    const V *q = t.qkv + h * d * T, *k = q + s.c * T, *val = k + s.c * T;
    for (int v = 0; v < T; ++v) {
      Words<SHARED> word{s.index.data(), v, M == LANES ? v : v - v % s.fills};
      V room[M ? M : 1], *kept = t.e + (h * T + v) * s.padded, *e = M ? room : kept;
      scores(q, T, k, T, d, word, m, e);
      exponentials(e, m, together(e, m, [](V a, V b) { return max(a, b); }));
      V inv = set(1.0f) / together(e, m, [](V a, V b) { return a + b; });
      mix<M>(e, val, T, d, word, m, inv, t.o.rows + h * d * t.step, t.step);
      if (M) each<M>(m, [&](int j) { kept[j] = e[j]; });
      t.inv[h * T + v] = inv;
    }
  }
}

// From t.dout to t.dqkv: first with queries in lanes, then, the weights and their gradients turned, with keys.
template <bool SHARED, int M, int D, class K>
void attention_back(const Plan& s, Tile<K>& t) {
  const int m = M ? M : s.m, d = D ? D : s.d, T = M == LANES ? 2 : s.T;
  int group = std::min(s.padded, LANES), S = t.step;
  for (int h = 0; h < s.heads; ++h) {
    int at = h * d * T, c = s.c * T;
    const V *q = t.qkv + at, *k = q + c, *val = k + c, *out = t.o.rows + h * d * S, *dout = t.dout + at;
    V *p = t.e + h * T * s.padded, *dq = t.dqkv.rows + h * d * S, *dk = dq + s.c * S, *dv = dk + s.c * S;
    for (int v = 0; v < T; ++v) {
      Words<SHARED> word{s.index.data(), v, M == LANES ? v : v - v % s.fills};
      V room[M ? M : 1], *e = p + v * s.padded, *kept = t.dp + v * s.padded, *dp = M ? room : kept;
      V dot = set(0.0f), inv = t.inv[h * T + v];
      for (int i = 0; i < d; ++i) dot = fma(dout[i * T + v], out[i * S + v], dot);
      scores(dout, T, val, T, d, word, m, dp);
      each<M>(m, [&](int j) {
        e[j] = e[j] * inv;
        dp[j] = e[j] * (dp[j] - dot);
      });
      mix<M>(dp, k, T, d, word, m, set(LN2), dq, S);
      if (M) each<M>(m, [&](int j) { kept[j] = dp[j]; });
    }
    for (int v = 0; v < T; ++v) {
      Words<SHARED> word{s.index.data(), v, M == LANES ? v : v - v % s.fills};
      auto turn = [&](const V* from, V* to) {
        if constexpr (M == LANES) return turn_groups<M>(from + v * M, M, to);
        for (int n = 0; n < s.fills; ++n) {
          int at = (word.first + n) * s.padded + (v - word.first) * LANES, count = s.m - (v - word.first) * LANES;
          turn_groups(from + at, count, to + n * LANES, group);
        }
      };
      V room[M ? M : 1], *turned = M ? room : t.turned;
      turn(p, turned);
      mix<M>(turned, dout, T, d, word, m, set(1.0f), dv, S);
      turn(t.dp, turned);
      mix<M>(turned, q, T, d, word, m, set(LN2), dk, S);
    }
  }
}

// The sizes that nets have are known to the compiler: sets that fill a vector, heads of 6.
template <class K>
void attention(const Plan& s, Tile<K>& t) {
  if (s.shared) return attention<true, 0, 0>(s, t);
  if (s.m == LANES && s.d == 6) return attention<false, LANES, 6>(s, t);
  attention<false, 0, 0>(s, t);
}

template <class K>
void attention_back(const Plan& s, Tile<K>& t) {
  if (s.shared) return attention_back<true, 0, 0>(s, t);
  if (s.m == LANES && s.d == 6) return attention_back<false, LANES, 6>(s, t);
  attention_back<false, 0, 0>(s, t);
}
