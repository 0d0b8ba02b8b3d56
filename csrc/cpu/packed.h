// Weights packed for an engine: once for each weight, engine and orientation.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "engine.h"

namespace adacomcat {

Dtype dtype_of(const at::Tensor& t);

constexpr int64_t kIdentity = 32;  // a panel's columns, of every engine a multiple

// A right operand B (k, n) in panels, with zeros up to `rows`.
struct Packed {
  int64_t k = 0, n = 0, rows = 0, bytes = 0;
  std::shared_ptr<const void> data;
  // What this thread asked for next, the last time that it asked for this one: in a model the first
  // weight of the layer that follows. Empty where that is not known, or gone.
  std::shared_ptr<const void> next;
  int64_t next_bytes = 0;
  // So many first rows of B, or last columns, are the identity's first: whole multiples of kIdentity,
  // looked for in float32 only.
  int64_t identity_rows = 0, identity_columns = 0;

  // Panels that start at a column, which must be the first of one.
  const void* from(const Engine& engine, int64_t column) const {
    return static_cast<const char*>(data.get()) + column * rows * engine.packed_size;
  }
  Ahead all() const { return {data.get(), bytes}; }
  Ahead follower() const { return {next.get(), next_bytes}; }
};

// `weight` is B, or Bᵀ where `transposed`. Kept, for all threads, until the weight changes or goes;
// a change through `.data`, which PyTorch does not count, is noticed by a sample of the elements.
Packed packed(const Engine& engine, const at::Tensor& weight, bool transposed);

// The same for anything that a pointer and strides describe; not kept.
Packed pack_now(const Engine& engine, int64_t k, int64_t n, const void* b, int64_t row,
                int64_t column, Dtype dtype);

}  // namespace adacomcat
