// The attention that low_rank_attention and rotary_attention share, and what attention ops ask of weights.
#pragma once

#include <array>
#include <optional>

#include "cpu/runtime/packed_weight.h"

namespace adacomcat {

struct AttentionWeights {
  const Tensor &wq, &wk, &wv, &wo;
  const OptionalTensor &bq, &bo;
};

// What rotary_attention has besides. vq (d, rank_q) and vk (d, rank_k) are the first factors of low-rank
// queries and keys: then wq and wk are (H · head_dim, rank). sin and cos broadcast to (B, H, P, head_dim);
// the last P tokens are rotated.
struct Rotary {
  const OptionalTensor &vq, &vk, &bk, &sin, &cos;
  bool half;  // which elements turn together: j and j + head_dim / 2, or 2 j and 2 j + 1
};

struct AttentionOptions {
  int64_t num_heads;
  float scale;
  std::optional<double> epsilon;
  const OptionalTensor &mask, &residual;
  const Rotary* rotary = nullptr;
};

// q, k, v and the context, (rows, columns) each; those that have elements are stored.
using Intermediates = std::array<Tensor, 4>;

// Writes y (B, N, out), which has elements.
void run_attention(const Tensor& x, const AttentionWeights& weights,
                   const AttentionOptions& options, const Tensor& y,
                   const Intermediates* intermediates);

// x (B, N, d), wv (H · rank_vo, d), wo (out, H · rank_vo).
inline void check_values(const Tensor& x, const AttentionWeights& w, int64_t num_heads) {
  REQUIRE(x.dim() == 3, "x must be (B, N, d), got ", x.sizes());
  REQUIRE(is_weight(w.wq) && is_weight(w.wv) && is_weight(w.wo), "wq, wv, wo must be matrices");
  const int64_t columns_qk = weight_size(w.wq, 0), columns_vo = weight_size(w.wv, 0);
  const int64_t out = weight_size(w.wo, 0);
  REQUIRE(num_heads > 0 && columns_qk % num_heads == 0 && columns_vo % num_heads == 0,
          "the rows of wq and wv must split into ", num_heads, " heads");
  check_weight(x, w.wv, "wv", {columns_vo, x.size(2)});
  check_weight(x, w.wo, "wo", {out, columns_vo});
  check_like(x, w.bq, "bq", {columns_qk});
  check_like(x, w.bo, "bo", {out});
}

// The same, and wq and wk (H · rank_qk, d).
inline void check_attention(const Tensor& x, const AttentionWeights& w, int64_t num_heads) {
  check_values(x, w, num_heads);
  const int64_t d = x.size(2), columns_qk = weight_size(w.wq, 0);
  check_weight(x, w.wq, "wq", {columns_qk, d});
  check_weight(x, w.wk, "wk", {columns_qk, d});
}

}  // namespace adacomcat
