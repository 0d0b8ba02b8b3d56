// What the ops on tensors ask of their arguments on a GPU, and how kernels take tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>

#include "common/arguments.h"
#include "cuda/kernels.h"

namespace adacomcat::cuda {

using torch::stable::accelerator::DeviceGuard;

inline void check_device(const Tensor& x, const char* name) {
  REQUIRE(x.is_cuda(), name, " must be on a GPU and is on ", x.device());
}

inline Stream stream_of(const Tensor& x) {
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

inline void check_launch(const char* error) { REQUIRE(!error, "CUDA: ", error); }

inline Matrix matrix_of(const DenseRows& rows) { return {rows.data(), rows.stride}; }

// Sizes are int in the kernels, which add up to a tile to them.
inline void check_sizes(std::initializer_list<int64_t> sizes) {
  REQUIRE(std::max(sizes) <= std::numeric_limits<int>::max() - 1024,
          "too wide for the kernel: ", Sizes(sizes));
}

inline void check_shared_memory(int64_t needed, int64_t rank) {
  const int64_t available = shared_memory_limit();
  REQUIRE(needed <= available, "rank ", rank, " takes ", needed,
          " bytes of shared memory and a block of this GPU has ", available);
}

// A tensor that may be absent, with adjacent elements; and how kernels take it.
struct MaybeVector {
  OptionalTensor tensor;

  explicit MaybeVector(const OptionalTensor& t) {
    if (t) tensor = torch::stable::contiguous(*t);
  }
  const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }
};

struct MaybeRows {
  std::optional<DenseRows> rows;

  explicit MaybeRows(const OptionalTensor& t) {
    if (t) rows.emplace(*t);
  }
  Matrix matrix() const { return rows ? matrix_of(*rows) : Matrix{}; }
};

inline float epsilon_of(const std::optional<double>& epsilon) {
  return epsilon ? static_cast<float>(*epsilon) : kNoNorm;
}

inline void* data_of(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

}  // namespace adacomcat::cuda
