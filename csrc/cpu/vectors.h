// Single rows as floats, and weights that they meet as they lie: of so few rows each weight is read
// once, and one in packed form takes longer to come.
#pragma once

#include "shell.h"

namespace adacomcat {

// More rows than these are a product's.
constexpr int64_t kMostVectors = 4;

// A row as floats; zeros where there is none.
inline void floats_of(const Engine& e, const Rows& row, int64_t k, float* out) {
  const float one = 1;
  e.weighted_sums(row.data ? 1 : 0, k, row, 1, &one, 1, out, k);
}

// Rows as floats, or their layer norm; `scratch` has a row in the operand format.
inline void vectors_of(const Engine& e, int64_t count, int64_t k, const Rows& x,
                       std::optional<double> epsilon, void* scratch, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    Rows row = rows_from(x, i);
    if (epsilon) {
      e.normalize(1, k, row, static_cast<float>(*epsilon), scratch, e.padded_k(k));
      row = {scratch, e.padded_k(k), e.operand};
    }
    floats_of(e, row, k, out + i * k);
  }
}

// B (k, n) as it lies, or given as Bᵀ. Its elements of one k are neighbours, or those of one n.
class Matrix {
 public:
  Matrix(const at::Tensor& weight, bool transposed)
      : neighbours_are_k_(transposed != lies_transposed(weight)),
        stored_(lies_transposed(weight) ? weight.t() : weight) {}

  // out (count, columns) = vectors (count, depth) · B[k : k + depth, n : n + columns].
  void multiply(const Engine& e, int64_t count, const float* vectors, int64_t stride, int64_t k,
                int64_t depth, int64_t n, int64_t columns, float* out, int64_t out_stride) const {
    if (neighbours_are_k_) {
      e.inner_products(columns, depth, rows_from(stored_.rows, n, k), count, vectors, stride, out,
                       out_stride);
    } else {
      e.weighted_sums(depth, columns, rows_from(stored_.rows, k, n), count, vectors, stride, out,
                      out_stride);
    }
  }

 private:
  static bool lies_transposed(const at::Tensor& weight) {
    return weight.stride(0) == 1 && weight.stride(1) != 1;
  }

  bool neighbours_are_k_;
  RowsOf stored_;
};

// Columns of such a product that are worth a thread.
inline int64_t worthwhile_columns(int64_t depth) {
  constexpr int64_t kElements = 1 << 15;
  return ceil_div(ceil_div(kElements, std::max<int64_t>(depth, 1)), 64) * 64;
}

// body(first column, columns), for threads to share, each from a multiple of 64 on.
template <typename Body>
inline void for_each_column(int64_t depth, int64_t columns, Body body) {
  const int64_t step = worthwhile_columns(depth);
  at::parallel_for(0, ceil_div(columns, step), 1, [&](int64_t begin, int64_t end) {
    body(begin * step, std::min(end * step, columns) - begin * step);
  });
}

// What a product's finish makes of sums (count, stride) that are all there.
inline void finish_sums(const Engine& e, int64_t count, int64_t n, const float* sums, int64_t stride,
                        Finish finish) {
  finish.sum = sums, finish.sum_stride = stride;
  e.multiply({count, n, 0, sums, 0, sums, 0, 0}, finish);
}

}  // namespace adacomcat
