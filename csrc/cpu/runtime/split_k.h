// Products with a weight that is too large for the second cache: a block of rows meets it one part of k
// after the other.
#pragma once

#include <algorithm>

#include "cpu/runtime/arguments.h"

namespace adacomcat {

// The part of the second cache that a weight may have while all rows of a block meet it.
constexpr int64_t kWeightBytes = 1 << 20;

// Floats for each row that multiply_split_k() needs for its sums.
inline int64_t split_k_columns(const Engine& engine, int64_t k, int64_t n) {
  return engine.packed_bytes(k, n) > kWeightBytes ? engine.padded_n(n) : 0;
}

// The product p with its epilogue. `sum` has split_k_columns() for each row.
inline void multiply_split_k(const Engine& engine, const Gemm& p, Epilogue epilogue, float* sum) {
  const int64_t parts = std::max<int64_t>(ceil_div(engine.packed_bytes(p.k, p.n), kWeightBytes), 1);
  const int64_t depth = std::max<int64_t>(ceil_div(ceil_div(p.k, parts), kKStep) * kKStep, 1);
  const int64_t stride = engine.padded_n(p.n);
  for (int64_t first = 0;; first += depth) {
    Gemm part = p;
    part.k = std::min(depth, p.k - first);
    part.lhs = static_cast<const char*>(p.lhs) + first * engine.operand_size();
    part.rhs_first = p.rhs_first + first;
    if (first) part.prefetch = {};
    if (first + depth < p.k) {
      engine.accumulate(part, sum, stride, first > 0);
      continue;
    }
    if (first) epilogue.sum = sum, epilogue.sum_stride = stride;
    return engine.multiply(part, epilogue);
  }
}

}  // namespace adacomcat
