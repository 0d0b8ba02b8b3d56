// What every op asks of its arguments, on the CPU and in CUDA: dtype, shape, device, row layout. Each
// check throws one line that names the argument and what was expected of it.
#pragma once

#include <initializer_list>
#include <optional>
#include <string_view>
#include <vector>

#include "activation.h"
#include "dtype.h"
#include "tensor.h"

namespace adacomcat {

Dtype dtype_of(const Tensor& t);

// No name means no activation.
Activation parse_activation(const std::optional<std::string_view>& name);

// Checks that `t` has the dtype and the device of `x`, and this shape.
void check_like(const Tensor& x, const Tensor& t, const char* name, Sizes shape);
inline void check_like(const Tensor& x, const OptionalTensor& t, const char* name, Sizes shape) {
  if (t) check_like(x, *t, name, shape);
}

// The shape (lead..., last...).
std::vector<int64_t> join_sizes(Sizes lead, std::initializer_list<int64_t> last);

// The shape of x with another last dimension.
std::vector<int64_t> with_last(const Tensor& x, int64_t size);

// x (..., k) has this many rows.
int64_t row_count(const Tensor& x);

// An uninitialised tensor (..., size) beside x (..., k); an empty one (0) where it is not wanted.
Tensor empty_rows(const Tensor& x, int64_t size, bool wanted = true);

// x (..., k) as rows of k adjacent elements, `stride` elements apart. Copied only where the layout of x
// has no such stride.
struct DenseRows {
  Tensor tensor;
  int64_t stride;

  explicit DenseRows(const Tensor& x);
  const void* data() const { return tensor.const_data_ptr(); }
};

}  // namespace adacomcat
