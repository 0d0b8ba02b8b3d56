// y = act(x̂ W1ᵀ + b1) W2ᵀ + b2 + residual.
#include <torch/csrc/stable/library.h>

#include "cpu/ops/mlp.h"

namespace adacomcat {
namespace {

// The last argument is `keep_intermediates`, which all ops have: this one has none to keep.
Tensor dense_mlp(const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                 const OptionalTensor& b2, std::optional<std::string> activation,
                 std::optional<double> epsilon, const OptionalTensor& residual, bool) {
  REQUIRE(x.dim() > 0 && is_weight(w1) && is_weight(w2),
          "x (..., in) and matrices w1, w2 expected");
  const int64_t hidden = weight_size(w1, 0), out = weight_size(w2, 0);
  check_weight(x, w1, "w1", {hidden, x.size(-1)});
  check_weight(x, w2, "w2", {out, hidden});
  check_like(x, b1, "b1", {hidden});
  check_like(x, b2, "b2", {out});
  check_like(x, residual, "residual", with_last(x, out));

  const Tensor y = empty_rows(x, out);
  if (!row_count(x) || !out) return y;

  const Engine& e = engine_for(x, w1);
  const MlpOptions options{b1, b2, activation, epsilon, residual};
  if (uses_gemv(x) && !is_packed(w1)) {
    run_mlp_gemv(e, x,
                 {{}, GemvWeight(w1, true), GemvWeight(w2, true), {}, x.size(-1), hidden, out},
                 options, y);
  } else {
    run_mlp(e, x, {{}, read_weight(e, w1, true), read_weight(e, w2, true), {}}, options, y);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("dense_mlp_cpu", TORCH_BOX(&dense_mlp)); }

}  // namespace adacomcat
