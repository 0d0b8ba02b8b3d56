// Products of a few rows with weights as they are, not packed: each weight is read once, so packing it
// would take longer than the product.
#pragma once

#include <algorithm>
#include <optional>

#include "cpu/runtime/arguments.h"
#include "cpu/threads.h"

namespace adacomcat {

// With more rows than these, ops multiply packed weights.
constexpr int64_t kMostGemvRows = 4;

inline bool uses_gemv(const Tensor& x) { return row_count(x) <= kMostGemvRows; }

// Converts a row to floats. No row gives zeros.
inline void row_to_floats(const Engine& e, const Rows& row, int64_t k, float* out) {
  const float one = 1;
  e.weighted_sums(row.data ? 1 : 0, k, row, 1, &one, 1, out, k);
}

// Converts rows (count, k), or their layer norm if there is an epsilon, to floats. `scratch` holds one row
// in the operand format.
inline void rows_to_floats(const Engine& e, int64_t count, int64_t k, const Rows& x,
                           std::optional<double> epsilon, void* scratch, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    Rows row = rows_from(x, i);
    if (epsilon) {
      e.normalize(1, k, row, static_cast<float>(*epsilon), scratch, e.padded_k(k));
      row = {scratch, e.padded_k(k), e.operand};
    }
    row_to_floats(e, row, k, out + i * k);
  }
}

// B (k, n), given as B or as Bᵀ, in any layout. Elements that are adjacent in memory belong to one column
// of B or to one row of it.
class GemvWeight {
 public:
  GemvWeight(const Tensor& weight, bool transposed)
      : k_is_adjacent_(transposed != is_column_major(weight)),
        stored_(is_column_major(weight) ? torch::stable::transpose(weight, 0, 1) : weight) {}

  // out (count, columns) = vectors (count, depth) · B[k : k + depth, n : n + columns].
  void multiply(const Engine& e, int64_t count, const float* vectors, int64_t stride, int64_t k,
                int64_t depth, int64_t n, int64_t columns, float* out, int64_t out_stride) const {
    if (k_is_adjacent_) {
      e.inner_products(columns, depth, rows_from(stored_.rows, n, k), count, vectors, stride, out,
                       out_stride);
    } else {
      e.weighted_sums(depth, columns, rows_from(stored_.rows, k, n), count, vectors, stride, out,
                      out_stride);
    }
  }

 private:
  static bool is_column_major(const Tensor& weight) {
    return weight.stride(0) == 1 && weight.stride(1) != 1;
  }

  bool k_is_adjacent_;
  TensorRows stored_;
};

// The fewest columns of such a product that are worth a thread.
inline int64_t worthwhile_columns(int64_t depth) {
  constexpr int64_t kElements = 1 << 15;
  return ceil_div(ceil_div(kElements, std::max<int64_t>(depth, 1)), 64) * 64;
}

// body(first column, columns) for shares of the columns, each from a multiple of 64 on.
template <typename Body>
inline void for_each_column_share(int64_t depth, int64_t columns, Body body) {
  const int64_t step = worthwhile_columns(depth);
  parallel_for(0, ceil_div(columns, step), 1, [&](int64_t begin, int64_t end) {
    body(begin * step, std::min(end * step, columns) - begin * step);
  });
}

// The epilogue of sums (count, stride) that are complete: a product with k = 0.
inline void apply_epilogue(const Engine& e, int64_t count, int64_t n, const float* sums,
                           int64_t stride, Epilogue epilogue) {
  epilogue.sum = sums, epilogue.sum_stride = stride;
  e.multiply({count, n, 0, sums, 0, sums, 0, 0}, epilogue);
}

}  // namespace adacomcat
