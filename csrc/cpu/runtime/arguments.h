// The tensors of an op as rows and operands of an engine.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "common/arguments.h"
#include "cpu/gemm/engine.h"

namespace adacomcat {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x (..., k) as rows; the tensor that holds them is kept alive.
struct TensorRows : DenseRows {
  Rows rows;

  explicit TensorRows(const Tensor& x) : DenseRows(x), rows{data(), stride, dtype_of(tensor)} {}
};

// A bias (n) or none.
struct Bias {
  OptionalTensor tensor;
  Rows rows{nullptr, 0, Dtype::f32};

  explicit Bias(const OptionalTensor& bias) {
    if (!bias) return;
    tensor = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    rows = {tensor->const_data_ptr(), 0, dtype_of(*tensor)};
  }
};

// Rows from (row, column) on. No rows stay no rows.
inline Rows rows_from(const Rows& x, int64_t row, int64_t column = 0) {
  if (!x.data) return x;
  return {static_cast<const char*>(x.data) + (row * x.stride + column) * dtype_size(x.dtype),
          x.stride, x.dtype};
}

// A dense tensor (rows, columns) that a product writes.
struct OutputRows {
  char* data;
  int64_t stride;
  Dtype dtype;

  explicit OutputRows(const Tensor& y)
      : data(static_cast<char*>(y.mutable_data_ptr())), stride(y.size(-1)), dtype(dtype_of(y)) {}

  void* at(int64_t row, int64_t column = 0) const {
    return data + (row * stride + column) * dtype_size(dtype);
  }
  // The epilogue that writes from (row, column) on.
  Epilogue epilogue(int64_t row, int64_t column = 0) const {
    return {at(row, column), stride, dtype};
  }
};

// A prefetch hint for `count` rows of k elements, up to what the second cache has place for.
inline PrefetchHint hint_for_rows(const Rows& x, int64_t row, int64_t count, int64_t k) {
  constexpr int64_t kMostBytes = 1 << 20;
  if (!x.data || count <= 0 || k <= 0) return {};
  const int64_t size = dtype_size(x.dtype);
  const int64_t most = std::max<int64_t>(kMostBytes / (k * size), 1);
  return {rows_from(x, row).data, std::min(count, most) * k * size, k * size, x.stride * size};
}

// Rows in an engine's operand format.
struct LhsOperand {
  const void* data;
  int64_t stride;
};

// Rows x (m, k), or their layer norm if there is an epsilon, as an lhs. They stay where they are if that
// has the right format; otherwise they are converted into `scratch`.
inline LhsOperand lhs_operand(const Engine& e, int64_t m, int64_t k, const Rows& x,
                              std::optional<double> epsilon, void* scratch) {
  const int64_t stride = e.padded_k(k);
  if (epsilon) {
    e.normalize(m, k, x, static_cast<float>(*epsilon), scratch, stride);
  } else if (x.dtype == e.operand && k % e.k_group == 0) {
    return {x.data, x.stride};
  } else {
    e.load(m, k, x, scratch, stride);
  }
  return {scratch, stride};
}

// Bytes of m rows of k elements in the operand format.
inline int64_t lhs_bytes(const Engine& e, int64_t m, int64_t k) {
  return m * e.padded_k(k) * e.operand_size();
}

// Stores rows (m, k) of the operand format in a contiguous tensor, from `row` on.
void store_rows(const Engine& e, int64_t m, int64_t k, const void* from, int64_t stride,
                const Tensor& to, int64_t row);

}  // namespace adacomcat
