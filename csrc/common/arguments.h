// What every op asks of its arguments, on the CPU and in CUDA: dtype, shape, device, row layout. Each
// check throws one line that names the argument and what was expected of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <string_view>
#include <vector>

#include "activation.h"
#include "dtype.h"

namespace adacomcat {

using OptionalTensor = std::optional<at::Tensor>;

Dtype dtype_of(const at::Tensor& t);

// No name means no activation.
Activation parse_activation(const std::optional<std::string_view>& name);

// Checks that `t` has the dtype and the device of `x`, and this shape.
void check_like(const at::Tensor& x, const at::Tensor& t, const char* name, at::IntArrayRef shape);
inline void check_like(const at::Tensor& x, const OptionalTensor& t, const char* name,
                       at::IntArrayRef shape) {
  if (t) check_like(x, *t, name, shape);
}

// The shape (lead..., last...).
std::vector<int64_t> join_sizes(at::IntArrayRef lead, std::initializer_list<int64_t> last);

// The shape of x with another last dimension.
std::vector<int64_t> with_last(const at::Tensor& x, int64_t size);

// x (..., k) has this many rows.
int64_t row_count(const at::Tensor& x);

// An uninitialised tensor (..., size) beside x (..., k); an empty one (0) where it is not wanted.
at::Tensor empty_rows(const at::Tensor& x, int64_t size, bool wanted = true);

// x (..., k) as rows of k adjacent elements, `stride` elements apart. Copied only where the layout of x
// has no such stride.
struct DenseRows {
  at::Tensor tensor;
  int64_t stride;

  explicit DenseRows(const at::Tensor& x);
  const void* data() const { return tensor.const_data_ptr(); }
};

}  // namespace adacomcat
