// A pre-norm transformer block over many tiny token sets, forward and backward, for x86 with AVX-512 or AVX2.
//
// Tokens lie in the lanes of a vector and channels in rows, so that norms, softmax and products need no shuffle; 16
// words of TNT are just one AVX-512 vector. A tile of T vectors goes through the whole block inside the first-level
// cache. Only the input is kept for the backward pass, which computes everything else again.
//
//     lanes     words are filled up to `padded`: a power of two below the lanes, or a multiple of them. A vector then
//               holds `lanes / padded` sets, or a set fills `padded / lanes` vectors.
//     weights   the norms' affine parts are folded into the Linear behind them, and log2(e) / √head_dim into the
//               queries; gradients are unfolded at the end (Packed, Grads).
//     gradients of weights are dot products over lanes, taken over CHUNK tiles at a time.
//     kinds     products and gradients of weights multiply float32 (Full) or bfloat16 (Half, as under autocast); all
//               else, sums too, is float32.

#include "vector.h"

namespace {

constexpr int WIDE = LANES == 16 ? 12 : 6;  // rows of a product that are held in registers at a time, for two vectors
constexpr int GRADS = LANES / 4;           // rows of a weight's gradient taken at a time; columns: 4
constexpr int CHUNK_BYTES = 400 * 1024;    // what the weights' gradients read again should stay in the second cache
constexpr float LN2 = 0.69314718f;

struct Shape {  // as in inner.py
  int64_t sets;
  int32_t words, width, heads, hidden;
  float eps1, eps2;
  int32_t threads;
};

enum { G1, B1, QKV_W, QKV_B, PROJ_W, PROJ_B, G2, B2, FC1_W, FC1_B, FC2_W, FC2_B, PARAMS };

#include "words.h"

#include "inner_products.h"

#include "inner_tile.h"

#include "inner_attention.h"

#include "inner_block.h"

#include "inner_run.h"

}  // namespace

extern "C" {

// 0, or 1 where memory ran out. `params` as in the enum; s1, s2: a factor on each branch for each set, or null.
int inner_forward(const Shape* shape, const float* const* params, const float* x, const float* s1, const float* s2,
                  float* y, Parallel parallel) {
  return guarded([&] { forward<Full>(*shape, params, x, s1, s2, y, parallel); });
}

int inner_backward(const Shape* shape, const float* const* params, const float* x, const float* s1, const float* s2,
                   const float* dy, float* dx, float* const* grads, Parallel parallel) {
  return guarded([&] { backward<Full>(*shape, params, x, s1, s2, dy, dx, grads, parallel); });
}

#ifdef __AVX512BF16__
int inner_forward_bf16(const Shape* shape, const float* const* params, const float* x, const float* s1,
                       const float* s2, float* y, Parallel parallel) {
  return guarded([&] { forward<Half>(*shape, params, x, s1, s2, y, parallel); });
}

int inner_backward_bf16(const Shape* shape, const float* const* params, const float* x, const float* s1,
                        const float* s2, const float* dy, float* dx, float* const* grads, Parallel parallel) {
  return guarded([&] { backward<Half>(*shape, params, x, s1, s2, dy, dx, grads, parallel); });
}
#endif
}
