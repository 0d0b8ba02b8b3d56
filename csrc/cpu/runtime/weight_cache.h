// Weights packed for an engine, once for each weight, engine and orientation.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "cpu/gemm/engine.h"
#include "cpu/runtime/arguments.h"

namespace adacomcat {

// Identities in a weight are recognised in multiples of this many rows or columns: a multiple of every
// engine's panel.
constexpr int64_t kIdentityStep = 32;

// A weight B (k, n) packed in panels; `rows` counts the packed rows, padding and scales included.
struct PackedWeight {
  int64_t k = 0, n = 0, rows = 0, bytes = 0;
  std::shared_ptr<const void> data;
  // The weight that this thread asked for after this one, last time. Null if it is unknown or gone.
  std::shared_ptr<const void> next;
  int64_t next_bytes = 0;
  // The first rows of B, and the last columns, that are an identity matrix beside zeros: multiples of
  // kIdentityStep, looked for in float32 weights only.
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
// changes or is freed. PyTorch does not count a change through `.data`: it is noticed by a sample of the
// elements. Weights of inference mode are packed anew in each call, since their changes are not counted.
PackedWeight pack_weight(const Engine& engine, const at::Tensor& weight, bool transposed);

}  // namespace adacomcat
