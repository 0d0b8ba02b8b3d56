// y = concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo + residual, with q, k, v projected from x̂.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/ops/attention.h"

namespace adacomcat {
namespace {

// Returns y and, if intermediates are kept, q, k, v and the context.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_attention(
    const Tensor& x, const Tensor& wq, const OptionalTensor& bq, const Tensor& wk, const Tensor& wv,
    const Tensor& wo, const OptionalTensor& bo, int64_t num_heads, double scale,
    const OptionalTensor& attn_mask, std::optional<double> epsilon, const OptionalTensor& residual,
    bool keep_intermediates) {
  const AttentionWeights weights{wq, wk, wv, wo, bq, bo};
  check_attention(x, weights, num_heads);
  const int64_t out = weight_size(wo, 0);
  check_like(x, residual, "residual", with_last(x, out));
  const auto kept = [&](const Tensor& w) {
    return empty_rows(x, weight_size(w, 0), keep_intermediates);
  };
  const Tensor y = empty_rows(x, out);
  const Intermediates intermediates{kept(wq), kept(wq), kept(wv), kept(wv)};
  if (row_count(x) && out) {
    run_attention(x, weights, {num_heads, static_cast<float>(scale), epsilon, attn_mask, residual},
                  y, &intermediates);
  }
  return std::tuple_cat(std::make_tuple(y), intermediates);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("low_rank_attention_cpu", TORCH_BOX(&low_rank_attention));
}

}  // namespace adacomcat
