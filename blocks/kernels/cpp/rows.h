// Work on matrices in blocks of rows, whose sums are in float32 and are added in float64.

constexpr int BLOCK = 32;  // rows
constexpr int WIDE = 4;    // vectors of a row that are worked on at a time

// Calls work(first, end, part) for parts of the rows, which are whole blocks; gives their number.
template <class F>
int split(int64_t rows, int64_t width, int threads, Parallel parallel, const F& work) {
  int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  int parts = int(std::max<int64_t>(1, std::min<int64_t>({int64_t(threads), rows * width >> 15, blocks})));
  run(parts, parallel, [&](int i) {
    work(blocks * i / parts * BLOCK, std::min(rows, blocks * (i + 1) / parts * BLOCK), i);
  });
  return parts;
}

// Calls act(column, vectors) for groups of columns, with the number of vectors known to the compiler.
template <class F>
inline void columns(int64_t width, const F& act) {
  int64_t c = 0;
  for (; c + WIDE * LANES <= width; c += WIDE * LANES) act(c, std::integral_constant<int, WIDE>());
  for (; c < width; c += LANES) act(c, std::integral_constant<int, 1>());
}

// The sums of COUNT numbers for each column over all rows. add(row, column, numbers) adds one row's to `numbers`.
template <int COUNT, class F>
void column_sums(int64_t rows, int64_t width, double* const* to, int threads, Parallel parallel, const F& add) {
  std::vector<double> room(size_t(threads) * COUNT * width);
  int parts = split(rows, width, threads, parallel, [&](int64_t begin, int64_t end, int i) {
    double* own = room.data() + size_t(i) * COUNT * width;
    for (int64_t first = begin; first < end; first += BLOCK)
      columns(width, [&](int64_t c, auto vectors) {
        constexpr int N = decltype(vectors)::value;
        V sum[N][COUNT];
        for (int n = 0; n < N; ++n)
          for (int k = 0; k < COUNT; ++k) sum[n][k] = set(0.0f);
        for (int64_t r = first, last = std::min<int64_t>(first + BLOCK, end); r < last; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) add(r, c + n * LANES, sum[n]);
        float line[LANES];
        for (int k = 0; k < COUNT; ++k)
          for (int n = 0; n < N; ++n) {
            storeu(line, sum[n][k]);
            for (int l = 0; l < LANES; ++l) own[k * width + c + n * LANES + l] += line[l];
          }
      });
  });
  for (int k = 0; k < COUNT; ++k)
    for (int64_t c = 0; c < width; ++c) {
      to[k][c] = 0.0;
      for (int i = 0; i < parts; ++i) to[k][c] += room[(size_t(i) * COUNT + k) * width + c];
    }
}
