// The element types that the compiled kernels take, on the CPU and in CUDA. No torch: the .cu files
// include it.
#pragma once

#include <cstdint>

namespace adacomcat {

enum class Dtype : int { f32, bf16, f16 };

// Bytes of an element.
inline int64_t dtype_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace adacomcat
