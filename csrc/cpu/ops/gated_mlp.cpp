// y = (act(x̄ Wgᵀ + bg) · (x̄ W1ᵀ + b1)) V2 W2ᵀ + b2 + residual, x̄ = x̂ V1; without V1 or V2 that side is dense.
#include <torch/csrc/stable/library.h>

#include "cpu/ops/mlp.h"

namespace adacomcat {
namespace {

PackedWeight read_factor(const Engine& e, const OptionalTensor& v) {
  return v ? read_weight(e, *v, false) : PackedWeight{};
}

// The width of rows behind a first factor (width, rank), which is there or not.
int64_t width_behind(const Tensor& x, const OptionalTensor& v, const char* name, int64_t width) {
  if (!v) return width;
  REQUIRE(is_weight(*v), name, " must be a matrix");
  const int64_t rank = weight_size(*v, 1);
  check_weight(x, *v, name, {width, rank});
  return rank;
}

Tensor gated_mlp(const Tensor& x, const OptionalTensor& v1, const Tensor& wg,
                 const OptionalTensor& bg, const Tensor& w1, const OptionalTensor& b1,
                 const OptionalTensor& v2, const Tensor& w2, const OptionalTensor& b2,
                 std::optional<std::string> activation, std::optional<double> epsilon,
                 const OptionalTensor& residual) {
  REQUIRE(x.dim() > 0 && is_weight(wg) && is_weight(w1) && is_weight(w2),
          "x (..., in) and matrices wg, w1, w2 expected");
  const int64_t hidden = weight_size(w1, 0), out = weight_size(w2, 0);
  const int64_t inner = width_behind(x, v1, "v1", x.size(-1));
  check_weight(x, wg, "wg", {hidden, inner});
  check_weight(x, w1, "w1", {hidden, inner});
  check_weight(x, w2, "w2", {out, width_behind(x, v2, "v2", hidden)});
  check_like(x, bg, "bg", {hidden});
  check_like(x, b1, "b1", {hidden});
  check_like(x, b2, "b2", {out});
  check_like(x, residual, "residual", with_last(x, out));

  const Tensor y = empty_rows(x, out);
  if (!row_count(x) || !out) return y;
  const Engine& e = engine_for(x, wg);
  const PackedWeight second = read_weight(e, w2, true), factor = read_factor(e, v2);
  const MlpWeights weights{read_factor(e, v1), read_weight(e, w1, true), v2 ? factor : second,
                           v2 ? second : PackedWeight{}, read_weight(e, wg, true)};
  run_mlp(e, x, weights, {b1, b2, activation, epsilon, residual, &bg}, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("gated_mlp_cpu", TORCH_BOX(&gated_mlp)); }

}  // namespace adacomcat
