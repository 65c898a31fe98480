// Both passes over all tiles, in threads; part of inner.cpp.

// Threads that are worth starting: each should have 2^18 multiply-accumulates or more.
int threads_for(const Plan& s, const Shape& shape, int parts) {
  double work = double(s.sets) * s.m * s.c * (4 * s.c + 2 * s.hidden + 2 * s.m);
  return std::max(1, std::min({shape.threads, parts, int(work / (1 << 18)) + 1}));
}

template <class K>
void forward(const Shape& shape, const float* const* params, const float* x, const float* s1, const float* s2, float* y,
             Parallel parallel) {
  Plan s(shape);
  Packed<K> w{};
  int tiles = s.tiles(), threads = threads_for(s, shape, tiles);
  std::vector<Tile<K>> tile(threads);
  auto lay = [&](Arena a) {
    w.lay(s, a, false);
    for (Tile<K>& t : tile) {
      t.lay(s, a);
      if (!t.APART) t.keep(s, a.take<V>(t.side_rows(s) * s.T), s.T, 0);
    }
    return a.used;
  };
  lay(Arena{memory(lay(Arena{nullptr}))});
  w.fill(s, params, false);
  run(threads, parallel, [&](int i) {
    Tile<K>& t = tile[i];
    for (int64_t k = int64_t(tiles) * i / threads; k < int64_t(tiles) * (i + 1) / threads; ++k) {
      int64_t first = k * s.sets_in_tile;
      load(s, x, first, t.x);
      t.ahead.start(s, x, nullptr, y, first);
      load_factors(s, s1, first, t.s1), load_factors(s, s2, first, t.s2);
      forward_tile<false, K>(s, w, t);
      store(s, t.y, first, y);
    }
  });
}

// Gradients of the folded weights, one set for each thread; rows are filled up to multiples of 4.
struct Grads {
  float *qkv, *proj, *fc1, *fc2_t, *qkv_b, *proj_b, *fc1_b, *fc2_b;
  size_t size;  // all of them lie in one piece that starts at qkv

  void lay(const Plan& s, Arena& a) {
    size_t from = a.used, c = up4(s.c), q = up4(3 * s.c), f = up4(s.hidden);
    qkv = a.take<float>(q * c), proj = a.take<float>(c * c), fc1 = a.take<float>(f * c), fc2_t = a.take<float>(f * c);
    qkv_b = a.take<float>(q), proj_b = a.take<float>(c), fc1_b = a.take<float>(f), fc2_b = a.take<float>(c);
    size = (a.used - from) / sizeof(float);
  }

  template <class K>
  void add(const Plan& s, const Tile<K>& t, int tiles) {
    int c = up4(s.c), q = up4(3 * s.c), f = up4(s.hidden), n = tiles * s.T / K::U, step = t.flat_step;
    gradient<K>(t.dqkv.flat, q, t.n1.flat, c, n, step, qkv), row_sums<K>(t.dqkv.flat, q, n, step, qkv_b);
    gradient<K>(t.dz1.flat, c, t.o.flat, c, n, step, proj), row_sums<K>(t.dz1.flat, c, n, step, proj_b);
    gradient<K>(t.dpre.flat, f, t.n2.flat, c, n, step, fc1), row_sums<K>(t.dpre.flat, f, n, step, fc1_b);
    gradient<K>(t.h.flat, f, t.dz2.flat, c, n, step, fc2_t), row_sums<K>(t.dz2.flat, c, n, step, fc2_b);
  }

  // W' = by·W·diag(g), b' = by·(b + W·β), for `rows` rows: the gradients of W, b, g and β.
  template <class F>
  static void unfold(int rows, int c, const F& by, const float* w, const float* g, const float* beta, const float* dw1,
                     const float* db1, float* dw, float* db, float* dg, float* dbeta) {
    std::vector<double> sums(2 * c, 0.0);
    for (int o = 0; o < rows; ++o) {
      float f = by(o), d = f * db1[o];
      for (int i = 0; i < c; ++i) {
        float e = f * dw1[place(o, i, up4(c))];
        dw[o * c + i] = e * g[i] + d * beta[i];
        sums[i] += double(w[o * c + i]) * e;
        sums[c + i] += double(w[o * c + i]) * d;
      }
      if (db) db[o] = d;
    }
    for (int i = 0; i < c; ++i) dg[i] = float(sums[i]), dbeta[i] = float(sums[c + i]);
  }

  void give(const Plan& s, const float* const* p, float* const* to) const {
    int c = s.c, c4 = up4(c);
    unfold(3 * c, c, [&](int o) { return factor(s, o); }, p[QKV_W], p[G1], p[B1], qkv, qkv_b, to[QKV_W],
           to[QKV_B], to[G1], to[B1]);
    unfold(s.hidden, c, [](int) { return 1.0f; }, p[FC1_W], p[G2], p[B2], fc1, fc1_b, to[FC1_W], to[FC1_B], to[G2],
           to[B2]);
    for (int o = 0; o < c; ++o) {
      for (int i = 0; i < c; ++i) to[PROJ_W][o * c + i] = proj[place(o, i, c4)];
      for (int i = 0; i < s.hidden; ++i) to[FC2_W][o * s.hidden + i] = fc2_t[place(i, o, c4)];
      to[PROJ_B][o] = proj_b[o], to[FC2_B][o] = fc2_b[o];
    }
  }
};

template <class K>
void backward(const Shape& shape, const float* const* params, const float* x, const float* s1, const float* s2,
              const float* dy, float* dx, float* const* grads, Parallel parallel) {
  Plan s(shape);
  Packed<K> w{};
  int bytes = Tile<K>::side_rows(s) * s.T / K::U * int(sizeof(V)), tiles = s.tiles();
  int chunk = std::max(1, std::min(CHUNK_BYTES / bytes, 32)), step = chunk * s.T / K::U + 1;
  int chunks = (tiles + chunk - 1) / chunk, threads = threads_for(s, shape, chunks);
  size_t flat = size_t(Tile<K>::side_rows(s)) * step;
  std::vector<Tile<K>> tile(threads);
  std::vector<Grads> sums(threads);
  auto lay = [&](Arena a) {
    w.lay(s, a, true);
    for (int i = 0; i < threads; ++i) sums[i].lay(s, a), tile[i].lay(s, a), tile[i].kept = a.take<V>(flat);
    return a.used;
  };
  lay(Arena{memory(lay(Arena{nullptr}))});
  w.fill(s, params, true);
  run(threads, parallel, [&](int i) {
    Tile<K>& t = tile[i];
    std::memset(sums[i].qkv, 0, sums[i].size * sizeof(float));
    if (s.c % 4 || s.hidden % 4) std::memset(static_cast<void*>(t.kept), 0, flat * sizeof(V));
    for (int64_t k = int64_t(chunks) * i / threads; k < int64_t(chunks) * (i + 1) / threads; ++k) {
      int count = int(std::min<int64_t>(chunk, tiles - k * chunk));
      for (int j = 0; j < count; ++j) {
        int64_t first = (k * chunk + j) * s.sets_in_tile;
        t.keep(s, t.kept, step, j);
        load(s, x, first, t.x), load(s, dy, first, t.y);
        t.ahead.start(s, x, dy, dx, first);
        load_factors(s, s1, first, t.s1), load_factors(s, s2, first, t.s2);
        forward_tile<true, K>(s, w, t);
        backward_tile<K>(s, w, t);
        store(s, t.y, first, dx);
      }
      t.keep(s, t.kept, step, 0);
      sums[i].add(s, t, count);
    }
  });
  for (int i = 1; i < threads; ++i)
    for (size_t j = 0; j < sums[0].size; ++j) sums[0].qkv[j] += sums[i].qkv[j];
  sums[0].give(s, params, grads);
}
