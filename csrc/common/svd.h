// The checks that the batched SVD makes on the CPU and in CUDA.
#pragma once

#include "common/arguments.h"

namespace adacomcat {

// Checks that a is a matrix (m, n) or a batch of them (..., m, n).
void check_matrices(const Tensor& a);

// a (..., m, n) as (count, m, n).
Tensor as_batch(const Tensor& a);

// The results of a truncated SVD of a (..., m, n), uninitialised: u (..., m, k), s (..., k) and
// v (..., n, k). Checks that 0 <= k <= min(m, n).
struct SvdResult {
  Tensor u, s, v;

  SvdResult(const Tensor& a, int64_t k);
};

// Throws where one of `count` matrices has no SVD. The indices are those of the first matrix that holds
// NaN or infinity and of the first whose iteration did not converge, `count` where there is none.
void check_svd(int64_t count, int64_t not_finite, int64_t not_converged);

}  // namespace adacomcat
