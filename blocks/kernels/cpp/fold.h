// Batch norms put into the layer beside them.

// weight · scale, and bias + weight · shift.
template <class K>
void folded(const float* weight, const float* bias, const float* scale, const float* shift, int64_t rows, int64_t width,
            typename K::E* to, float* to_bias, int threads, Parallel parallel) {
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      V sum = set(0.0f);
      for (int64_t c = 0; c < width; c += LANES) {
        V w = loadu(weight + r * width + c);
        K::narrow(to + r * width + c, w * loadu(scale + c));
        sum = fma(w, loadu(shift + c), sum);
      }
      to_bias[r] = (bias ? bias[r] : 0.0f) + total(sum);
    }
  });
}

// What a norm of fixed statistics does to each channel: a factor and a summand.
struct Affine {
  std::vector<float> scale, shift;

  Affine(const float* weight, const float* bias, const float* mean, const float* variance, double eps, int64_t channels)
      : scale(channels), shift(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const double by = weight[c] / std::sqrt(variance[c] + eps);
      scale[c] = float(by), shift[c] = float(bias[c] - mean[c] * by);
    }
  }
};

// Weight and bias of a layer with such a norm in front of it, or behind.
template <class K>
void folded(const float* weight, const float* bias, const Affine& norm, bool behind, int64_t rows, int64_t width,
            typename K::E* to, float* to_bias, int threads, Parallel parallel) {
  if (!behind)
    return folded<K>(weight, bias, norm.scale.data(), norm.shift.data(), rows, width, to, to_bias, threads, parallel);
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r) {
      for (int64_t at = r * width; at < (r + 1) * width; at += LANES)
        K::narrow(to + at, loadu(weight + at) * set(norm.scale[r]));
      to_bias[r] = norm.shift[r] + (bias ? bias[r] * norm.scale[r] : 0.0f);
    }
  });
}

// Rows of channels, normalised.
template <class K>
void normalised(const typename K::E* x, const Affine& norm, int64_t rows, int64_t width, typename K::E* to, int threads,
                Parallel parallel) {
  split(rows, width, threads, parallel, [&](int64_t first, int64_t end, int) {
    for (int64_t r = first; r < end; ++r)
      for (int64_t c = 0, at = r * width; c < width; c += LANES, at += LANES)
        K::narrow(to + at, fma(K::widen(x + at), loadu(norm.scale.data() + c), loadu(norm.shift.data() + c)));
  });
}
