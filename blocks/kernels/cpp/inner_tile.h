// The plan of a call, its weights, and the memory of a tile; part of inner.cpp.

struct Plan {
  int64_t sets;
  int m, c, heads, d, hidden, padded, fills, T, sets_in_tile;  // fills: vectors that one set fills
  bool shared;                                                 // several sets in one vector
  float eps1, eps2;
  std::vector<int32_t> index;  // for each word j a vector: the lane of word j of the same set

  explicit Plan(const Shape& s)
      : sets(s.sets), m(s.words), c(s.width), heads(s.heads), d(s.width / s.heads), hidden(s.hidden), padded(1),
        eps1(s.eps1), eps2(s.eps2) {
    while (padded < m && padded < LANES) padded *= 2;
    if (padded < m) padded = (m + LANES - 1) / LANES * LANES;
    shared = padded < LANES;
    fills = shared ? 1 : padded / LANES;
    T = fills % 2 ? 2 * fills : fills;
    sets_in_tile = T * LANES / padded;
    index.resize(padded * LANES);
    for (int j = 0; shared && j < padded; ++j)
      for (int i = 0; i < LANES; ++i) index[j * LANES + i] = i / padded * padded + j;
  }
  int tiles() const { return int((sets + sets_in_tile - 1) / sets_in_tile); }
};

// What the rows of qkv are multiplied by.
float factor(const Plan& s, int row) { return row < s.c ? LOG2E / std::sqrt(float(s.d)) : 1.0f; }

// The weights as `product` reads them; those with a T are transposed, for gradients.
template <class K>
struct Packed {
  float *qkv_w, *qkv_b, *fc1_w, *fc1_b;  // folded, row by row
  float *qkv, *proj, *fc1, *fc2, *qkv_t, *proj_t, *fc1_t, *fc2_t;
  const float *proj_b, *fc2_b;

  void lay(const Plan& s, Arena& a, bool back) {
    int c = s.c, h = s.hidden, q = 3 * c;
    int in_c = words_of<K>(c), in_h = words_of<K>(h), in_q = words_of<K>(q);
    qkv_w = a.take<float>(q * c), qkv_b = a.take<float>(q), fc1_w = a.take<float>(h * c), fc1_b = a.take<float>(h);
    qkv = a.take<float>(q * in_c), proj = a.take<float>(c * in_c);
    fc1 = a.take<float>(h * in_c), fc2 = a.take<float>(c * in_h);
    if (!back) return;
    qkv_t = a.take<float>(c * in_q), proj_t = a.take<float>(c * in_c);
    fc1_t = a.take<float>(c * in_h), fc2_t = a.take<float>(h * in_c);
  }

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
      pack<K>(to, out, in, [=](int o, int i) { return w[o * in + i]; });
      if (back) pack<K>(to_t, in, out, [=](int i, int o) { return w[o * in + i]; });
    };
    both(qkv_w, q, c, qkv, qkv_t), both(p[PROJ_W], c, c, proj, proj_t);
    both(fc1_w, h, c, fc1, fc1_t), both(p[FC2_W], c, h, fc2, fc2_t);
  }
};

// Rows that are multiplied by a weight, or by another such matrix for a weight's gradient.
struct Side {
  V *rows, *flat;  // numbers; what `gradient` reads
};

// Asks, in six parts, for the words that the next tile reads and this one writes: many at once hold the processor up.
// Addresses behind the last set do no harm.
struct Ahead {
  static constexpr int PARTS = 6;
  const float *x, *dy, *to;
  int part;

  void start(const Plan& s, const float* words, const float* grad, const float* out, int64_t first) {
    int64_t tile = int64_t(s.sets_in_tile) * s.c * s.m, at = first * s.c * s.m;
    x = words + at + tile, dy = grad ? grad + at + tile : nullptr, to = out + at;
    part = int(tile + 16 * PARTS - 1) / (16 * PARTS) * 16;
  }
  void ask() {
    for (int i = 0; i < part; i += 16) {
      __builtin_prefetch(x + i), __builtin_prefetch(to + i, 1);
      if (dy) __builtin_prefetch(dy + i);
    }
    x += part, to += part;
    if (dy) dy += part;
  }
};

// The rows of one tile: sides lie `step` vectors apart, all others T.
template <class K>
struct Tile {
  Side n1, o, dz1, n2, dz2, dqkv, dpre, h;
  V* woven;  // the side that a product reads next, where it reads words and not the rows
  V *x, *x1, *qkv, *e, *inv, *r1, *r2, *slope, *s1, *s2, *y, *dn, *dout, *dp, *turned, *kept;
  int step, flat_step;
  Ahead ahead;

  static constexpr bool APART = K::U > 1;  // whether a side's rows and its flat ones are two

  static int side_rows(const Plan& s) { return 5 * up4(s.c) + up4(3 * s.c) + 2 * up4(s.hidden); }

  // Where the sides lie, all in one piece of memory, `apart` vectors from row to row.
  void place(const Plan& s, V* at, int apart, V* Side::*which) {
    int c = up4(s.c) * apart, q = up4(3 * s.c) * apart, f = up4(s.hidden) * apart;
    for (Side* side : {&n1, &o, &dz1, &n2, &dz2}) side->*which = at, at += c;
    dqkv.*which = at, dpre.*which = at + q, h.*which = at + q + f;
  }
  // The flat rows of the tile that is number i of its chunk. Where they are the rows themselves, so are these.
  void keep(const Plan& s, V* flat, int apart, int i) {
    flat += i * s.T / K::U, flat_step = apart;
    place(s, flat, apart, &Side::flat);
    if (!APART) place(s, flat, step = apart, &Side::rows);
  }
  void lay(const Plan& s, Arena& a) {
    size_t T = s.T, c = s.c * T;
    if (APART) {
      place(s, a.take<V>(side_rows(s) * T), step = s.T, &Side::rows);
      woven = a.take<V>(words_of<K>(std::max(s.hidden, 3 * s.c)) * T);
    }
    x = a.take<V>(c), x1 = a.take<V>(c), y = a.take<V>(c), dn = a.take<V>(c), dout = a.take<V>(c);
    qkv = a.take<V>(3 * c), slope = a.take<V>(up4(s.hidden) * T), e = a.take<V>(s.heads * T * s.padded);
    dp = a.take<V>(T * s.padded), turned = a.take<V>(s.padded), inv = a.take<V>(s.heads * T);
    r1 = a.take<V>(T), r2 = a.take<V>(T), s1 = a.take<V>(T), s2 = a.take<V>(T);
  }

  // A side as `product` reads it, and kept for the gradients.
  template <bool KEEP>
  const V* settled(const Plan& s, const Side side, int rows) {
    if constexpr (!APART) {
      return side.rows;
    } else {
      const V none = set(0.0f);
      const int T = s.T, apart = step, flat_apart = flat_step;
      V* to = woven;
      for (int r = 0; r < rows; r += 2, to += T)
        for (int v = 0; v < T; v += 2) {
          const V* p = side.rows + r * apart + v;
          bool two = r + 1 < rows;
          V a0 = p[0], a1 = p[1], b0 = two ? p[apart] : none, b1 = two ? p[apart + 1] : none;
          to[v] = K::weave(a0, b0), to[v + 1] = K::weave(a1, b1);
          V* flat = side.flat + r * flat_apart + v / 2;
          if (KEEP) flat[0] = K::join(a0, a1);
          if (KEEP && two) flat[flat_apart] = K::join(b0, b1);
        }
      return woven;
    }
  }
};

// ---- memory (sets, channels, words) to rows and back; lanes without a word are zero

// Numbers of the plan are read once here and below: for all the compiler knows, a vector that is written changes them.
template <int M>
void load(const Plan& s, const float* x, int64_t first, V* to) {
  const int m = M ? M : s.m, c = s.c, row = s.T * LANES, padded = s.padded;
  const int sets = int(std::min<int64_t>(s.sets_in_tile, s.sets - first));
  float* at = reinterpret_cast<float*>(to);
  if (m < padded || sets < s.sets_in_tile) std::memset(at, 0, size_t(c) * row * sizeof(float));
  x += first * c * m;
  for (int n = 0; n < sets; ++n, at += padded)
    for (int i = 0; i < c; ++i, x += m) std::memcpy(at + i * row, x, m * sizeof(float));
}

template <int M>
void store(const Plan& s, const V* from, int64_t first, float* x) {
  const int m = M ? M : s.m, c = s.c, row = s.T * LANES, padded = s.padded;
  const int sets = int(std::min<int64_t>(s.sets_in_tile, s.sets - first));
  const float* at = reinterpret_cast<const float*>(from);
  x += first * c * m;
  for (int n = 0; n < sets; ++n, at += padded)
    for (int i = 0; i < c; ++i, x += m) std::memcpy(x, at + i * row, m * sizeof(float));
}

// The sizes that nets have are known to the compiler.
void load(const Plan& s, const float* x, int64_t first, V* to) {
  s.m == 16 ? load<16>(s, x, first, to) : s.m == 4 ? load<4>(s, x, first, to) : load<0>(s, x, first, to);
}
void store(const Plan& s, const V* from, int64_t first, float* x) {
  s.m == 16 ? store<16>(s, from, first, x) : s.m == 4 ? store<4>(s, from, first, x) : store<0>(s, from, first, x);
}

// What the branches of a tile's sets are multiplied by.
void load_factors(const Plan& s, const float* factors, int64_t first, V* to) {
  const int padded = s.padded, sets = s.sets_in_tile;
  const int64_t left = s.sets - first;
  float* lanes = reinterpret_cast<float*>(to);
  for (int n = 0; n < sets; ++n, lanes += padded) {
    float by = !factors ? 1.0f : n < left ? factors[first + n] : 0.0f;
    for (int i = 0; i < padded; ++i) lanes[i] = by;
  }
}
