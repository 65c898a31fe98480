// For kernels that run others one after the other: these by the type of what is in the products' precision.

template <class Type>
struct Kernels;

#define KERNELS(TYPE, END)                                      \
  template <>                                                   \
  struct Kernels<TYPE> {                                        \
    static constexpr auto norm = norm_forward##END;             \
    static constexpr auto norm_again = ::norm_again##END;       \
    static constexpr auto norm_back = norm_backward##END;       \
    static constexpr auto scale = norm_scaled##END;             \
    static constexpr auto onto = norm_onto##END;                \
    static constexpr auto onto_back = norm_onto_back##END;      \
    static constexpr auto attend = attention_forward##END;      \
    static constexpr auto attend_back = attention_backward##END;\
    static constexpr auto multiply = gemm##END;                 \
    static constexpr auto layers = two_layers##END;             \
    static constexpr auto activate = gelu##END;                 \
    static constexpr auto filters = conv_filters##END;          \
    static constexpr auto convolve = conv_forward##END;         \
    static constexpr auto weigh = conv_weight##END;             \
    static constexpr auto batch_norm = ::batch_norm##END;       \
    static constexpr auto batch_norm_back = ::batch_norm_back##END;\
  };
KERNELS(float, )
#ifdef __AVX512BF16__
KERNELS(uint16_t, _bf16)
#endif
#undef KERNELS

inline void need(int failed) {
  if (failed) throw std::bad_alloc();
}

// Linear layers with weights in float32, `in` numbers to `out`, over m rows.
template <class Type>
struct Linears {
  using E = Type;
  using Call = Kernels<E>;
  static constexpr bool SINGLE = sizeof(E) == sizeof(float);

  Parallel parallel;
  int64_t threads;

  struct Lines {  // rows; `places` say which of them, one after the other
    const E* at;
    const int32_t* places;
    Lines(const E* at, const int32_t* places = nullptr) : at(at), places(places) {}
    products::Factor factor(int64_t width, bool turned = false) const { return {at, width, turned, SINGLE, places}; }
  };

  void product(Lines x, int64_t m, int64_t in, const float* weight, int64_t out, const float* bias, E* to,
               int act = products::NONE, const int32_t* places = nullptr) const {
    multiply(x.factor(in), {weight, in, 0, 1}, {to, SINGLE, act, nullptr, bias, nullptr, nullptr, places},
             {m, out, in, threads});
  }

  // `by` times the same added to `base`, to those of its rows that `places` name.
  template <class To>
  void product_onto(const To* base, Lines x, int64_t m, int64_t in, const float* weight, int64_t out, const float* bias,
                    To* to, const int32_t* places = nullptr, float by = 1.0f) const {
    multiply(x.factor(in), {weight, in, 0, 1},
             {to, sizeof(To) == sizeof(float), 0, base, bias, nullptr, nullptr, places, by}, {m, out, in, threads});
  }

  // The gradient of what went in, times `by`; behind ReLU's slope if there is what that gave.
  void below(Lines grad, int64_t m, int64_t out, const float* weight, int64_t in, E* to, const E* relu = nullptr,
             const int32_t* places = nullptr, float by = 1.0f) const {
    multiply(grad.factor(out), {weight, in, 1, 1}, {to, SINGLE, 0, nullptr, nullptr, nullptr, relu, places, by},
             {m, in, out, threads});
  }

  // Those of weight, times `by`, and bias; with `add` the weight's is added to what is there.
  void learn(Lines grad, int64_t m, int64_t out, Lines x, int64_t in, float* weight, float* bias, bool add = false,
             float by = 1.0f) const {
    multiply(grad.factor(out, true), x.factor(in, true),
             {weight, 1, 0, add ? weight : nullptr, nullptr, bias, nullptr, nullptr, by}, {out, in, m, threads});
  }

  // `to` += second · act(first · x + bias) + bias2.
  template <class To>
  void two(const E* x, int64_t m, int64_t in, const float* first, const float* bias, int act, int64_t hidden,
           const float* second, const float* bias2, int64_t out, To* to) const {
    const products::Factor a{x, in, 0, SINGLE}, b{first, in, 0, 1}, c{second, hidden, 0, 1};
    const products::Result r{to, sizeof(To) == sizeof(float), act, to, bias2};
    const products::Layers size{m, in, hidden, out, threads};
    need(Call::layers(&a, &b, bias, &c, &r, &size, parallel));
  }

 private:
  void multiply(const products::Factor& a, const products::Factor& b, const products::Result& c,
                const products::Size& size) const {
    need(Call::multiply(&a, &b, &c, &size, parallel));
  }
};
