// The CUDA kernels of decompositions as ops on tensors: checks of the arguments, the current stream,
// errors. fused_ops.cpp has the other ops.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "common/svd.h"
#include "cuda/tensors.h"

namespace adacomcat::cuda {
namespace {

// Reading the status waits for the kernel.
void check_status(const at::Tensor& status) {
  const at::Tensor here = status.cpu();
  const int* begin = here.const_data_ptr<int>();
  const int* end = begin + here.numel();
  check_svd(here.numel(), std::find(begin, end, kSvdNotFinite) - begin,
            std::find(begin, end, kSvdNotConverged) - begin);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batched_svd_cuda(const at::Tensor& a, int64_t k) {
  check_matrices(a);
  check_device(a, "a");
  const int64_t rows = a.size(-2), columns = a.size(-1);
  TORCH_CHECK(std::max(rows, columns) <= kSvdMaxSide, "the kernel takes matrices up to ",
              kSvdMaxSide, " x ", kSvdMaxSide, ", got ", rows, " x ", columns);
  const c10::DeviceGuard guard(a.device());
  const SvdResult result(a, k);
  const at::Tensor batch = as_batch(a);
  if (batch.numel() == 0) return {result.u, result.s, result.v};
  const at::Tensor status = at::empty({batch.size(0)}, a.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "batched_svd", [&] {
    const int64_t available = shared_memory_limit();
    const int64_t needed = svd_shared_memory(rows, columns, sizeof(scalar_t));
    TORCH_CHECK(needed <= available, "a matrix takes ", needed,
                " bytes of shared memory and a block of this GPU has ", available);
    at::Tensor rotations;
    if (svd_needs_scratch(rows, columns, sizeof(scalar_t), available)) {
      rotations = at::empty({batch.size(0), svd_rotations(rows, columns)}, a.options());
    }
    const SvdBatch<scalar_t> problem{
        batch.size(0),
        static_cast<int>(rows),
        static_cast<int>(columns),
        static_cast<int>(k),
        batch.const_data_ptr<scalar_t>(),
        batch.stride(0),
        batch.stride(1),
        batch.stride(2),
        result.u.mutable_data_ptr<scalar_t>(),
        result.s.mutable_data_ptr<scalar_t>(),
        result.v.mutable_data_ptr<scalar_t>(),
        status.mutable_data_ptr<int>(),
        rotations.defined() ? rotations.mutable_data_ptr<scalar_t>() : nullptr};
    check_launch(batched_svd(problem, stream_of(a)));
  });
  check_status(status);
  return {result.u, result.s, result.v};
}

at::Tensor truncation_errors_cuda(const at::Tensor& s) {
  TORCH_CHECK(s.dim() >= 2, "s must be (..., heads, ranks), got shape ", s.sizes());
  check_device(s, "s");
  const c10::DeviceGuard guard(s.device());
  const int64_t heads = s.size(-2), ranks = s.size(-1);
  const auto lead = s.sizes().slice(0, s.dim() - 2);
  const at::Tensor dense = s.contiguous();
  const at::Tensor errors = at::empty(join_sizes(lead, {ranks + 1}), s.options());
  const int64_t count = c10::multiply_integers(lead);
  if (count == 0) return errors;
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "truncation_errors", [&] {
    check_launch(truncation_errors(dense.const_data_ptr<scalar_t>(),
                                   errors.mutable_data_ptr<scalar_t>(), count, heads, ranks,
                                   stream_of(s)));
  });
  return errors;
}

}  // namespace
}  // namespace adacomcat::cuda

TORCH_LIBRARY_IMPL(adacomcat, CUDA, m) {
  m.impl("batched_svd_cuda", &adacomcat::cuda::batched_svd_cuda);
  m.impl("truncation_errors_cuda", &adacomcat::cuda::truncation_errors_cuda);
}
