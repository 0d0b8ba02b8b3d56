#include "cpu/runtime/arguments.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace adacomcat {

void store_rows(const Engine& e, int64_t m, int64_t k, const void* from, int64_t stride,
                const Tensor& to, int64_t row) {
  const OutputRows out(to);
  for (int64_t i = 0; i < m; ++i) {
    const char* in = static_cast<const char*>(from) + i * stride * e.operand_size();
    if (out.dtype == e.operand) {
      std::memcpy(out.at(row + i), in, k * e.operand_size());
      continue;
    }
    // Formats are equal, or the operands are float32 and the tensor has 16 bits.
    const float* values = reinterpret_cast<const float*>(in);
    if (out.dtype == Dtype::bf16) {
      std::copy(values, values + k, static_cast<torch::headeronly::BFloat16*>(out.at(row + i)));
    } else {
      std::copy(values, values + k, static_cast<torch::headeronly::Half*>(out.at(row + i)));
    }
  }
}

}  // namespace adacomcat
