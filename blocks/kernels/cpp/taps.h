// The 3×3 filters of a group in the order in which a convolution multiplies them.

struct Taps {
  const float* at;
  int64_t channel, tap;

  const float* of(int64_t c, int64_t t) const { return at + c * channel + t * tap; }
};

// Calls act(group, taps) for each group of a weight. The channels that are summed over come one after the other, those
// that come out side by side; with TURNED each the other's, and the taps are seen from the other side.
template <class F>
void each_group(const float* weight, const conv::Shape& s, Parallel parallel, const F& act) {
  const int64_t in = s.in, out = s.out, size = in * out;
  const bool turned = s.flags & conv::TURNED, last = s.flags & conv::LAST;
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>({s.threads, s.groups, s.groups * size / 8192})));
  run(threads, parallel, [&](int t) {
    float* room = reinterpret_cast<float*>(memory(9 * (size + LANES) * sizeof(float)));
    for (int g = s.groups * t / threads; g < s.groups * (t + 1) / threads; ++g) {
      const float* from = weight + g * 9 * size;
      if (!turned) {
        pack_columns(from, 9 * in, s.out, 9 * s.in, room, s.out);
        act(g, last ? Taps{room, out, size} : Taps{room, 9 * out, out});
        continue;
      }
      if (!last)
        for (int o = 0; o < s.out; ++o) pack_columns(from + o * 9 * in, 9, s.in, 9, room + o * 9 * in, s.in);
      act(g, Taps{(last ? from : room) + 8 * in, 9 * in, -in});
    }
  });
}
