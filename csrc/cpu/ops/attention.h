// What the attention ops ask of their weights.
#pragma once

#include "cpu/runtime/packed_weight.h"

namespace adacomcat {

struct AttentionWeights {
  const at::Tensor &wq, &wk, &wv, &wo;
  const OptionalTensor &bq, &bo;
};

// x (B, N, d), wq and wk (H · rank_qk, d), wv (H · rank_vo, d), wo (out, H · rank_vo).
inline void check_attention(const at::Tensor& x, const AttentionWeights& w, int64_t num_heads) {
  TORCH_CHECK(x.dim() == 3, "x must be (B, N, d), got ", x.sizes());
  TORCH_CHECK(is_weight(w.wq) && is_weight(w.wv) && is_weight(w.wo),
              "wq, wv, wo must be matrices");
  const int64_t d = x.size(2), columns_qk = weight_size(w.wq, 0), columns_vo = weight_size(w.wv, 0);
  const int64_t out = weight_size(w.wo, 0);
  TORCH_CHECK(num_heads > 0 && columns_qk % num_heads == 0 && columns_vo % num_heads == 0,
              "the rows of wq and wv must split into ", num_heads, " heads");
  check_weight(x, w.wq, "wq", {columns_qk, d});
  check_weight(x, w.wk, "wk", {columns_qk, d});
  check_weight(x, w.wv, "wv", {columns_vo, d});
  check_weight(x, w.wo, "wo", {out, columns_vo});
  check_like(x, w.bq, "bq", {columns_qk});
  check_like(x, w.bo, "bo", {out});
}

}  // namespace adacomcat
