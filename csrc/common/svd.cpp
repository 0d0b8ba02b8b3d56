#include "common/svd.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace adacomcat {

void check_matrices(const at::Tensor& a) {
  TORCH_CHECK(a.dim() >= 2, "a must be a matrix or a batch of them, got shape ", a.sizes());
}

at::Tensor as_batch(const at::Tensor& a) {
  const int64_t count = c10::multiply_integers(a.sizes().slice(0, a.dim() - 2));
  return a.reshape({count, a.size(-2), a.size(-1)});
}

SvdResult::SvdResult(const at::Tensor& a, int64_t k) {
  const int64_t rows = a.size(-2), columns = a.size(-1), most = std::min(rows, columns);
  TORCH_CHECK(0 <= k && k <= most, "k must lie in 0 … ", most, ", got ", k);
  const at::IntArrayRef lead = a.sizes().slice(0, a.dim() - 2);
  u = at::empty(join_sizes(lead, {rows, k}), a.options());
  s = at::empty(join_sizes(lead, {k}), a.options());
  v = at::empty(join_sizes(lead, {columns, k}), a.options());
}

void check_svd(int64_t count, int64_t not_finite, int64_t not_converged) {
  TORCH_CHECK_VALUE(not_finite == count, "matrix ", not_finite, " of ", count,
                    " holds NaN or infinite values; it has no singular values");
  TORCH_CHECK(not_converged == count, "the SVD of matrix ", not_converged, " of ", count,
              " did not converge");
}

}  // namespace adacomcat
