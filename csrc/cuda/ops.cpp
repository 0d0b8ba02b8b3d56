// The CUDA kernels of decompositions as ops on tensors: checks of the arguments, the current stream,
// errors. fused_ops.cpp has the other ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/svd.h"
#include "cuda/tensors.h"

namespace adacomcat::cuda {
namespace {

// Reading the status waits for the kernel.
void check_status(const Tensor& status) {
  Tensor here = empty(status.sizes(), ScalarType::Int);
  torch::stable::copy_(here, status);
  const int* begin = here.const_data_ptr<int>();
  const int* end = begin + here.numel();
  check_svd(here.numel(), std::find(begin, end, kSvdNotFinite) - begin,
            std::find(begin, end, kSvdNotConverged) - begin);
}

std::tuple<Tensor, Tensor, Tensor> batched_svd_cuda(const Tensor& a, int64_t k) {
  check_matrices(a);
  check_device(a, "a");
  const int64_t rows = a.size(-2), columns = a.size(-1);
  REQUIRE(std::max(rows, columns) <= kSvdMaxSide, "the kernel takes matrices up to ", kSvdMaxSide,
          " x ", kSvdMaxSide, ", got ", rows, " x ", columns);
  const DeviceGuard guard(a.get_device_index());
  const SvdResult result(a, k);
  const Tensor batch = as_batch(a);
  if (batch.numel() == 0) return {result.u, result.s, result.v};
  const Tensor status = empty_beside(a, {batch.size(0)}, ScalarType::Int);
  for_floating(a.scalar_type(), "batched_svd", [&](auto zero) {
    using T = decltype(zero);
    const int64_t available = shared_memory_limit();
    const int64_t needed = svd_shared_memory(rows, columns, sizeof(T));
    REQUIRE(needed <= available, "a matrix takes ", needed,
            " bytes of shared memory and a block of this GPU has ", available);
    OptionalTensor rotations;
    if (svd_needs_scratch(rows, columns, sizeof(T), available)) {
      rotations = empty_beside(a, {batch.size(0), svd_rotations(rows, columns)});
    }
    const SvdBatch<T> problem{batch.size(0),
                              static_cast<int>(rows),
                              static_cast<int>(columns),
                              static_cast<int>(k),
                              batch.const_data_ptr<T>(),
                              batch.stride(0),
                              batch.stride(1),
                              batch.stride(2),
                              result.u.mutable_data_ptr<T>(),
                              result.s.mutable_data_ptr<T>(),
                              result.v.mutable_data_ptr<T>(),
                              status.mutable_data_ptr<int>(),
                              rotations ? rotations->mutable_data_ptr<T>() : nullptr};
    check_launch(batched_svd(problem, stream_of(a)));
  });
  check_status(status);
  return {result.u, result.s, result.v};
}

Tensor truncation_errors_cuda(const Tensor& s) {
  REQUIRE(s.dim() >= 2, "s must be (..., heads, ranks), got shape ", s.sizes());
  check_device(s, "s");
  const DeviceGuard guard(s.get_device_index());
  const int64_t heads = s.size(-2), ranks = s.size(-1);
  const auto lead = s.sizes().slice(0, s.dim() - 2);
  const Tensor dense = torch::stable::contiguous(s);
  const Tensor errors = empty_beside(s, join_sizes(lead, {ranks + 1}));
  const int64_t count = count_of(lead);
  if (count == 0) return errors;
  for_floating(s.scalar_type(), "truncation_errors", [&](auto zero) {
    using T = decltype(zero);
    check_launch(truncation_errors(dense.const_data_ptr<T>(), errors.mutable_data_ptr<T>(), count,
                                   heads, ranks, stream_of(s)));
  });
  return errors;
}

}  // namespace
}  // namespace adacomcat::cuda

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CUDA, m) {
  m.impl("batched_svd_cuda", TORCH_BOX(&adacomcat::cuda::batched_svd_cuda));
  m.impl("truncation_errors_cuda", TORCH_BOX(&adacomcat::cuda::truncation_errors_cuda));
}
