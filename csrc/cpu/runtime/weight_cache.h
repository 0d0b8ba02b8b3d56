// Weights packed for an engine, once for each weight, engine and orientation.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "cpu/gemm/engine.h"
#include "cpu/runtime/arguments.h"

namespace adacomcat {

// The size of an identity block is a multiple of this, which is a multiple of every engine's panel
// width.
constexpr int64_t kIdentityStep = 32;

// A weight B (k, n) packed in panels; `rows` counts the packed rows, padding and scales included.
struct PackedWeight {
  int64_t k = 0, n = 0, rows = 0, bytes = 0;
  std::shared_ptr<const void> data;
  // The weight that was requested after this one in the previous pass; ops prefetch it. Null if it
  // is unknown or freed.
  std::shared_ptr<const void> next;
  int64_t next_bytes = 0;
  // identity_rows r: the first r rows of B are [I 0]. identity_columns c: the last c columns are I
  // above zeros. Both are multiples of kIdentityStep, and 0 in weights that are not float32.
  int64_t identity_rows = 0, identity_columns = 0;

  // The panel that starts at `column`.
  const void* panel(const Engine& engine, int64_t column) const {
    return static_cast<const char*>(data.get()) + column * rows * engine.packed_size;
  }

  // lhs (m, k) · B.
  Gemm product(int64_t m, LhsOperand lhs, PrefetchHint hint = {}) const {
    return {m, n, k, lhs.data, lhs.stride, data.get(), rows, 0, hint};
  }
  // lhs (m, k) · B[:, column : column + columns]; `column` is the first of a panel.
  Gemm product(const Engine& engine, int64_t m, LhsOperand lhs, int64_t column, int64_t columns,
               PrefetchHint hint = {}) const {
    return {m, columns, k, lhs.data, lhs.stride, panel(engine, column), rows, 0, hint};
  }

  PrefetchHint hint() const { return {data.get(), bytes}; }
  PrefetchHint next_weight() const { return {next.get(), next_bytes}; }
};

// `weight` is B, or Bᵀ if `transposed`. The packed weight is kept, for all threads, until the weight
// changes or is freed. Writes through `.data` do not raise the version counter; a hash of 16
// elements detects those that change the whole weight. Tensors created in inference mode have no
// version counter, so they are packed again in every call.
PackedWeight pack_weight(const Engine& engine, const at::Tensor& weight, bool transposed);

}  // namespace adacomcat
