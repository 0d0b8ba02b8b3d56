// The tensor shells of the CUDA kernels: shapes, strides, the current stream, errors.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace adacomcat::cuda {
namespace {

void check_device(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cuda(), name, " must be on a GPU and is on ", x.device());
}

Stream stream_of(const at::Tensor& x) {
  return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
}

void check_launch(const char* error) { TORCH_CHECK(!error, "CUDA: ", error); }

std::vector<int64_t> with_last(at::IntArrayRef lead, std::initializer_list<int64_t> last) {
  auto sizes = lead.vec();
  sizes.insert(sizes.end(), last);
  return sizes;
}

// The first matrix with NaN or infinity, and the first that does not converge, are named. Reading
// their status waits for the kernel.
void check_status(const at::Tensor& status) {
  const at::Tensor here = status.cpu();
  const int* begin = here.const_data_ptr<int>();
  const int* end = begin + here.numel();
  const int* bad = std::find(begin, end, kSvdNotFinite);
  TORCH_CHECK_VALUE(bad == end, "matrix ", bad - begin, " of ", here.numel(),
                    " holds NaN or infinite values; it has no singular values");
  bad = std::find(begin, end, kSvdNotConverged);
  TORCH_CHECK(bad == end, "the SVD of matrix ", bad - begin, " of ", here.numel(),
              " did not converge");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batched_svd_cuda(const at::Tensor& a, int64_t k) {
  TORCH_CHECK(a.dim() >= 2, "a must be a matrix or a batch of them, got shape ", a.sizes());
  check_device(a, "a");
  const int64_t rows = a.size(-2), columns = a.size(-1);
  TORCH_CHECK(std::max(rows, columns) <= kSvdMaxSide, "the kernel takes matrices up to ",
              kSvdMaxSide, " x ", kSvdMaxSide, ", got ", rows, " x ", columns);
  TORCH_CHECK(0 <= k && k <= std::min(rows, columns), "k must lie in 0 … ",
              std::min(rows, columns), ", got ", k);
  const c10::DeviceGuard guard(a.device());
  const auto lead = a.sizes().slice(0, a.dim() - 2);
  const at::Tensor u = at::empty(with_last(lead, {rows, k}), a.options());
  const at::Tensor s = at::empty(with_last(lead, {k}), a.options());
  const at::Tensor v = at::empty(with_last(lead, {columns, k}), a.options());
  const at::Tensor batch = a.reshape({c10::multiply_integers(lead), rows, columns});
  if (batch.numel() == 0) return {u, s, v};
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
        batch.size(0), static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(k),
        batch.const_data_ptr<scalar_t>(), batch.stride(0), batch.stride(1), batch.stride(2),
        u.mutable_data_ptr<scalar_t>(), s.mutable_data_ptr<scalar_t>(),
        v.mutable_data_ptr<scalar_t>(), status.mutable_data_ptr<int>(),
        rotations.defined() ? rotations.mutable_data_ptr<scalar_t>() : nullptr};
    check_launch(batched_svd(problem, stream_of(a)));
  });
  check_status(status);
  return {u, s, v};
}

at::Tensor truncation_errors_cuda(const at::Tensor& s) {
  TORCH_CHECK(s.dim() >= 2, "s must be (..., heads, ranks), got shape ", s.sizes());
  check_device(s, "s");
  const c10::DeviceGuard guard(s.device());
  const int64_t heads = s.size(-2), ranks = s.size(-1);
  const auto lead = s.sizes().slice(0, s.dim() - 2);
  const at::Tensor dense = s.contiguous();
  const at::Tensor errors = at::empty(with_last(lead, {ranks + 1}), s.options());
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
