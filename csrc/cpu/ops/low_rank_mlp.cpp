// y = act(x̂ V1 U1ᵀ + b1) V2 U2ᵀ + b2 + residual.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/ops/mlp.h"

namespace adacomcat {
namespace {

// Returns y and, if intermediates are kept, x̂ V1 and act(...) V2.
std::tuple<Tensor, Tensor, Tensor> low_rank_mlp(
    const Tensor& x, const Tensor& v1, const Tensor& u1, const OptionalTensor& b1, const Tensor& v2,
    const Tensor& u2, const OptionalTensor& b2, std::optional<std::string> activation,
    std::optional<double> epsilon, const OptionalTensor& residual, bool keep_intermediates) {
  REQUIRE(x.dim() > 0 && is_weight(v1) && is_weight(u1) && is_weight(v2) && is_weight(u2),
          "x (..., in) and matrices v1, u1, v2, u2 expected");
  const int64_t rank1 = weight_size(v1, 1), hidden = weight_size(u1, 0);
  const int64_t rank2 = weight_size(v2, 1), out = weight_size(u2, 0);
  check_weight(x, v1, "v1", {x.size(-1), rank1});
  check_weight(x, u1, "u1", {hidden, rank1});
  check_weight(x, v2, "v2", {hidden, rank2});
  check_weight(x, u2, "u2", {out, rank2});
  check_like(x, b1, "b1", {hidden});
  check_like(x, b2, "b2", {out});
  check_like(x, residual, "residual", with_last(x, out));

  const Tensor y = empty_rows(x, out), middle1 = empty_rows(x, rank1, keep_intermediates),
               middle2 = empty_rows(x, rank2, keep_intermediates);
  if (!row_count(x) || !out) return {y, middle1, middle2};

  const Engine& e = engine_for(x, v1);
  const MlpOptions options{b1, b2, activation, epsilon, residual};
  if (uses_gemv(x) && !is_packed(v1) && !keep_intermediates) {
    run_mlp_gemv(e, x,
                 {GemvWeight(v1, false), GemvWeight(u1, true), GemvWeight(v2, false),
                  GemvWeight(u2, true), rank1, hidden, rank2},
                 options, y);
    return {y, middle1, middle2};
  }
  const MlpWeights weights{read_weight(e, v1, false), read_weight(e, u1, true),
                           read_weight(e, v2, false), read_weight(e, u2, true)};
  run_mlp(e, x, weights, options, y, middle1, middle2);
  return {y, middle1, middle2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("low_rank_mlp_cpu", TORCH_BOX(&low_rank_mlp));
}

}  // namespace adacomcat
