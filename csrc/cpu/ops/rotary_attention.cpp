// low_rank_attention with q and k rotated by the positions of their tokens. Scores do not fold then: q and k
// are dense projections or low-rank ones, (x̂ Vq) Wqᵀ + bq and (x̂ Vk) Wkᵀ + bk.
#include <torch/csrc/stable/library.h>

#include "cpu/ops/attention.h"

namespace adacomcat {
namespace {

// A projection (rows, d), or its second factor (rows, rank) and the first one (d, rank).
void check_factors(const Tensor& x, const OptionalTensor& v, const char* name_v, const Tensor& w,
                   const char* name_w, int64_t rows) {
  const int64_t d = x.size(2);
  if (!v) return check_weight(x, w, name_w, {rows, d});
  REQUIRE(is_weight(*v), name_v, " must be a matrix");
  const int64_t rank = weight_size(*v, 1);
  check_weight(x, *v, name_v, {d, rank});
  check_weight(x, w, name_w, {rows, rank});
}

void check_rotation(const Tensor& x, const Rotary& rotary, int64_t head_dim) {
  REQUIRE(rotary.sin.has_value() == rotary.cos.has_value(), "sin and cos must come together");
  if (!rotary.sin) return;
  const Tensor &sin = *rotary.sin, &cos = *rotary.cos;
  REQUIRE(sin.is_cpu() && cos.is_cpu() && dtype_of(sin) == dtype_of(cos),
          "sin and cos must have the same dtype, on the CPU");
  REQUIRE(sin.dim() >= 2 && sin.dim() <= 4 && sin.sizes() == cos.sizes() &&
              sin.size(-1) == head_dim && sin.size(-2) <= x.size(1) && head_dim % 2 == 0,
          "sin and cos must broadcast to (B, H, P, head_dim), P up to N, head_dim even");
}

Tensor rotary_attention(const Tensor& x, const OptionalTensor& vq, const Tensor& wq,
                        const OptionalTensor& bq, const OptionalTensor& vk, const Tensor& wk,
                        const OptionalTensor& bk, const Tensor& wv, const Tensor& wo,
                        const OptionalTensor& bo, int64_t num_heads, double scale,
                        const OptionalTensor& sin, const OptionalTensor& cos, bool half,
                        const OptionalTensor& attn_mask, std::optional<double> epsilon,
                        const OptionalTensor& residual) {
  const AttentionWeights weights{wq, wk, wv, wo, bq, bo};
  const Rotary rotary{vq, vk, bk, sin, cos, half};
  check_values(x, weights, num_heads);
  const int64_t columns = weight_size(wq, 0), out = weight_size(wo, 0);
  check_factors(x, vq, "vq", wq, "wq", columns);
  check_factors(x, vk, "vk", wk, "wk", columns);
  check_like(x, bk, "bk", {columns});
  check_rotation(x, rotary, columns / num_heads);
  check_like(x, residual, "residual", with_last(x, out));
  const Tensor y = empty_rows(x, out);
  if (row_count(x) && out) {
    run_attention(x, weights,
                  {num_heads, static_cast<float>(scale), epsilon, attn_mask, residual, &rotary}, y,
                  nullptr);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("rotary_attention_cpu", TORCH_BOX(&rotary_attention));
}

}  // namespace adacomcat
