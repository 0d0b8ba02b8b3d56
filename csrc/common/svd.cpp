#include "common/svd.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace adacomcat {

void check_matrices(const Tensor& a) {
  REQUIRE(a.dim() >= 2, "a must be a matrix or a batch of them, got shape ", a.sizes());
}

Tensor as_batch(const Tensor& a) {
  const int64_t count = count_of(a.sizes().slice(0, a.dim() - 2));
  return torch::stable::reshape(a, {count, a.size(-2), a.size(-1)});
}

SvdResult::SvdResult(const Tensor& a, int64_t k) {
  const int64_t rows = a.size(-2), columns = a.size(-1), most = std::min(rows, columns);
  REQUIRE(0 <= k && k <= most, "k must lie in 0 … ", most, ", got ", k);
  const Sizes lead = a.sizes().slice(0, a.dim() - 2);
  u = empty_beside(a, join_sizes(lead, {rows, k}));
  s = empty_beside(a, join_sizes(lead, {k}));
  v = empty_beside(a, join_sizes(lead, {columns, k}));
}

void check_svd(int64_t count, int64_t not_finite, int64_t not_converged) {
  REQUIRE_VALUE(not_finite == count, "matrix ", not_finite, " of ", count,
                " holds NaN or infinite values; it has no singular values");
  REQUIRE(not_converged == count, "the SVD of matrix ", not_converged, " of ", count,
          " did not converge");
}

}  // namespace adacomcat
