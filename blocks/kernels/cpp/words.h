// Matrix products on words of 32 bits, a float32 or two bfloat16, and what brings rows into their order.

typedef float Word __attribute__((may_alias));  // some bits; a number only where the kind is Full

// The last vectors of a row: those of `count` elements, and zeros.
template <class E>
inline const E* filled(const E* p, int count, int most, E* room) {
  if (count >= most) return p;
  std::memset(room, 0, most * sizeof(E));
  std::memcpy(room, p, count * sizeof(E));
  return room;
}

struct Full {
  using E = float;
  static constexpr int U = 1;  // elements in a word
  static V dot(V a, V b, V c) { return fma(a, b, c); }
  static V widen(const E* p) { return loadu(p); }
  static void narrow(E* to, V a) { storeu(to, a); }
  static V weave(const E* a, const E*) { return loadu(a); }
  static float word(float a, float) { return a; }
  static V close(const V* x) { return *x; }  // numbers to a word
  static V words(const V* x) { return *x; }  // of numbers side by side
};

#ifdef __AVX512BF16__
struct Half {
  using E = uint16_t;
  static constexpr int U = 2;
  static V dot(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static __m256i bits(const E* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static V widen(const E* p) { return weave(_mm256_setzero_si256(), bits(p)); }
  static __m256i round(V a) { return (__m256i)_mm512_cvtneps_pbh(a); }
  static void narrow(E* to, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round(a)); }
  static V weave(__m256i a, __m256i b) {
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
  }
  static V weave(const E* a, const E* b) { return weave(bits(a), bits(b)); }
  static V join(V a, V b) { return (V)_mm512_cvtne2ps_pbh(b, a); }  // the elements of a, then those of b
  static V weave(V a, V b) {                                        // words of an element of a and one of b
    static constexpr auto index = [] {
      std::array<uint16_t, 32> to{};
      for (int i = 0; i < 32; ++i) to[i] = i / 2 + i % 2 * 16;
      return to;
    }();
    return (V)_mm512_permutexvar_epi16(_mm512_loadu_si512(index.data()), (__m512i)join(a, b));
  }
  static float word(float a, float b) { return _mm512_cvtss_f32(weave(set(a), set(b))); }
  static V close(const V* x) { return weave(x[0], x[1]); }
  static V words(const V* x) { return join(x[0], x[1]); }
  static void tie(V a, V b, V* to) {  // words of the first elements of a and b, and of the second
    __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    to[0] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, x, _mm512_slli_epi32(y, 16)));
    to[1] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y));
  }
};
#endif

// `a` where y is above 0, or NaN; and 0 elsewhere: the slope of ReLU, as torch has it.
inline V above(V y, V a) {
#if LANES == 16
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ), a);
#else
  return _mm256_and_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NLE_UQ), a);
#endif
}

// LANES vectors: rows become columns.
inline void turn(V* x) {
#if LANES == 16
  auto pd = [](V a) { return _mm512_castps_pd(a); };
  auto ps = [](__m512d a) { return _mm512_castpd_ps(a); };
  V y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    V a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
    V c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = ps(_mm512_unpacklo_pd(pd(a), pd(c))), y[i + 1] = ps(_mm512_unpackhi_pd(pd(a), pd(c)));
    y[i + 2] = ps(_mm512_unpacklo_pd(pd(b), pd(d))), y[i + 3] = ps(_mm512_unpackhi_pd(pd(b), pd(d)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    V a = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
    V c = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd), d = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(a, b, 0x88), x[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    x[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88), x[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
#else
  auto pd = [](V a) { return _mm256_castps_pd(a); };
  auto ps = [](__m256d a) { return _mm256_castpd_ps(a); };
  V y[8];
  for (int i = 0; i < 8; i += 4) {
    V a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
    V c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = ps(_mm256_unpacklo_pd(pd(a), pd(c))), y[i + 1] = ps(_mm256_unpackhi_pd(pd(a), pd(c)));
    y[i + 2] = ps(_mm256_unpacklo_pd(pd(b), pd(d))), y[i + 3] = ps(_mm256_unpackhi_pd(pd(b), pd(d)));
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
  }
#endif
}

// `rows` rows of `words` words, `step` words apart, as columns: to[word][row], `wide` floats apart, filled with zeros.
inline void pack_columns(const Word* from, int64_t step, int rows, int words, float* to, int wide) {
  float room[LANES];
  for (int w = 0; w < words; w += LANES)
    for (int r = 0; r < wide; r += LANES) {
      V x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        x[i] = r + i >= rows            ? set(0.0f)
               : w + LANES <= words ? loadu(from + (r + i) * step + w)
                                    : loadu(filled<float>(from + (r + i) * step + w, words - w, LANES, room));
      turn(x);
      for (int i = 0; i < LANES && w + i < words; ++i) storeu(to + int64_t(w + i) * wide + r, x[i]);
      // The processor does not foresee this many rows.
      for (int i = 0; i < LANES; ++i) __builtin_prefetch(from + (r + i) * step + w + LANES);
    }
}

// `rows` rows of d elements, `step` elements apart, U of them in each row of words, filled with zeros.
template <class K>
void pack_rows(const typename K::E* from, int64_t step, int rows, int d, float* to, int wide) {
  using E = typename K::E;
  E room[2][LANES];
  static const E none[LANES] = {};
  for (int r = 0; r < rows; r += K::U, to += wide)
    for (int i = 0; i < wide; i += LANES) {
      auto row = [&](int k) {
        return r + k < rows ? filled(from + (r + k) * step + i, d - i, LANES, room[k]) : none;
      };
      storeu(to + i, K::weave(row(0), row(K::U - 1)));
    }
}

// `rows` rows of numbers, `wide` apart, times `by`, as rows of d elements, `step` apart.
template <class K>
void give_rows(const float* from, int wide, int rows, int d, const float* by, int by_step, typename K::E* to,
               int64_t step) {
  typename K::E room[LANES];
  for (int r = 0; r < rows; ++r, from += wide, to += step)
    for (int i = 0; i < d; i += LANES) {
      V x = loadu(from + i) * set(by[r * by_step]);
      if (i + LANES <= d) {
        K::narrow(to + i, x);
      } else {
        K::narrow(room, x);
        std::memcpy(to + i, room, (d - i) * sizeof(room[0]));
      }
    }
}

constexpr int ROWS = 6, MOST = LANES == 16 ? 4 : 2;  // rows and vectors of a product that are held in registers
constexpr int up(int n, int to) { return (n + to - 1) / to * to; }

template <class K, int N>
inline void product_block(const Word* const* a, int64_t step, const float* b, int wide_b, float* c, int wide_c,
                          int depth, bool add) {
  const Word *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  V s[ROWS][N];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) s[r][n] = add ? loadu(c + int64_t(r) * wide_c + n * LANES) : set(0.0f);
  int64_t at = 0;
  for (int k = 0; k < depth; ++k, at += step, b += wide_b) {
    V x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) x[n] = loadu(b + n * LANES);
    const V w[ROWS] = {set(a0[at]), set(a1[at]), set(a2[at]), set(a3[at]), set(a4[at]), set(a5[at])};
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) s[r][n] = K::dot(w[r], x[n], s[r][n]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) storeu(c + int64_t(r) * wide_c + n * LANES, s[r][n]);
}

// c (+)= a·b. Element (r, k) of a lies `r · across + k · along` words on; b has `depth` rows of `wide_b` words, of which
// `wide` count. c has room for a multiple of ROWS rows: the last one is computed again for those that are not there.
template <class K>
void product(const Word* a, int64_t across, int64_t along, const float* b, int wide_b, float* c, int wide_c, int rows,
             int wide, int depth, bool add) {
  int vectors = wide / LANES, groups = (vectors + MOST - 1) / MOST;
  for (int g = 0, from = 0; g < groups; ++g) {
    int count = (vectors - from + groups - g - 1) / (groups - g);
    for (int r = 0; r < rows; r += ROWS) {
      const Word* at[ROWS];
      for (int i = 0; i < ROWS; ++i) at[i] = a + std::min(r + i, rows - 1) * across;
      const float* y = b + from * LANES;
      float* z = c + int64_t(r) * wide_c + from * LANES;
      switch (count) {
        case 1: product_block<K, 1>(at, along, y, wide_b, z, wide_c, depth, add); break;
#if LANES == 16
        case 3: product_block<K, 3>(at, along, y, wide_b, z, wide_c, depth, add); break;
        case 4: product_block<K, 4>(at, along, y, wide_b, z, wide_c, depth, add); break;
#endif
        default: product_block<K, 2>(at, along, y, wide_b, z, wide_c, depth, add);
      }
    }
    from += count;
  }
}

constexpr int LOW = LANES == 16 ? 8 : 4;  // rows of such a sum of outer products, of two vectors each

// to[out][in] += the products of LOW channels of a gradient and two vectors of a map's over `count` words.
template <class K>
inline void add_products(const float* grad, int out, const float* map, int in, int count, float* to) {
  V y[LOW][2];
#pragma GCC unroll 8
  for (int r = 0; r < LOW; ++r) y[r][0] = y[r][1] = set(0.0f);
  for (int q = 0; q < count; ++q, grad += out, map += in) {
    V x0 = loadu(map), x1 = loadu(map + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < LOW; ++r) {
      V g = set(grad[r]);
      y[r][0] = K::dot(g, x0, y[r][0]), y[r][1] = K::dot(g, x1, y[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < LOW; ++r, to += in)
    for (int v = 0; v < 2; ++v) storeu(to + v * LANES, loadu(to + v * LANES) + y[r][v]);
}
