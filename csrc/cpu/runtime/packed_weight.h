// Weights as products read them: packed for an engine.
//
// An op takes each weight as a matrix, which it packs for the call, or packed already by pack_weight(), which
// it reads where it is. A packed weight is a tensor of bytes: a header that says what it holds, then its
// panels. Nothing is kept between calls, so no copy of a weight can be out of date.
#pragma once

#include "cpu/gemm/engine.h"
#include "cpu/runtime/arguments.h"

namespace adacomcat {

// The size of an identity block is a multiple of this, which is a multiple of every engine's panel
// width.
constexpr int64_t kIdentityStep = 32;

// A weight B (k, n) packed in panels; `rows` counts the packed rows, padding and scales included.
struct PackedWeight {
  int64_t k = 0, n = 0, rows = 0, bytes = 0;
  const void* data = nullptr;
  OptionalTensor memory;  // holds data if it was packed for this call
  // The weight that followed this one in the last pass; ops prefetch it. Nothing if it is unknown. It may be
  // gone: a prefetch of memory that is no more does nothing.
  PrefetchHint next_weight{};
  // identity_rows r: the first r rows of B are [I 0]. identity_columns c: the last c columns are I
  // above zeros. Both are multiples of kIdentityStep, and 0 in weights that are not float32.
  int64_t identity_rows = 0, identity_columns = 0;

  // The panel that starts at `column`.
  const void* panel(const Engine& engine, int64_t column) const {
    return static_cast<const char*>(data) + column * rows * engine.packed_size;
  }

  // lhs (m, k) · B.
  Gemm product(int64_t m, LhsOperand lhs, PrefetchHint hint = {}) const {
    return {m, n, k, lhs.data, lhs.stride, data, rows, 0, hint};
  }
  // lhs (m, k) · B[:, column : column + columns]; `column` is the first of a panel.
  Gemm product(const Engine& engine, int64_t m, LhsOperand lhs, int64_t column, int64_t columns,
               PrefetchHint hint = {}) const {
    return {m, columns, k, lhs.data, lhs.stride, panel(engine, column), rows, 0, hint};
  }

  PrefetchHint hint() const { return {data, bytes}; }
};

bool is_packed(const Tensor& weight);

// A matrix, or a packed one.
inline bool is_weight(const Tensor& weight) { return weight.dim() == 2 || is_packed(weight); }

// weight.size(dimension) of a matrix, or of the one that was packed.
int64_t weight_size(const Tensor& weight, int64_t dimension);

// Checks that a weight has the dtype and device of `x` and this shape, or was packed from one that had.
void check_weight(const Tensor& x, const Tensor& weight, const char* name, Sizes shape);

// The engine of an op on x whose first weight is this one: the one that the weight is packed for.
const Engine& engine_for(const Tensor& x, const Tensor& weight);

// `weight` is B, or Bᵀ if `transposed`. A packed one was packed in the same way, for the same engine.
PackedWeight read_weight(const Engine& engine, const Tensor& weight, bool transposed);

}  // namespace adacomcat
