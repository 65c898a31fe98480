// Samples whose branch stochastic depth has kept: of the others nothing needs to be computed.

struct Samples {
  const float* keep;  // what the branch of each sample is multiplied by, 0 or one number; or null
  int64_t each, rows;
  float by = 1.0f;
  std::vector<int32_t> places;  // where the rows of those that are kept lie; empty for all

  Samples(const float* keep, int64_t batch, int64_t each) : keep(keep), each(each), rows(0) {
    for (int64_t i = 0; i < batch; ++i)
      if (!dropped(i)) rows += each, by = keep ? keep[i] : 1.0f;
    if (rows == batch * each) return;
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t r = i * each; r < (i + 1) * each && !dropped(i); ++r) places.push_back(int32_t(r));
  }

  bool dropped(int64_t sample) const { return keep && keep[sample] == 0.0f; }
  const int32_t* from(int64_t row) const { return places.empty() ? nullptr : places.data() + row; }

  // What stands in `row` and behind it of those that are kept, `width` numbers in each.
  template <class E>
  E* of(E* x, int64_t row, int64_t width) const {
    return places.empty() ? x + row * width : x;
  }

  // Calls act(first, end) for the rows of each sample that is dropped.
  template <class F>
  void others(int64_t batch, const F& act) const {
    for (int64_t i = 0; i < batch; ++i)
      if (dropped(i)) act(i * each, (i + 1) * each);
  }
};
