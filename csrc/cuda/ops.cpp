// The CUDA kernels as ops on tensors: checks of the arguments, the current stream, errors.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "common/arguments.h"
#include "common/svd.h"
#include "cuda/kernels.h"

namespace adacomcat::cuda {
namespace {

void check_device(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cuda(), name, " must be on a GPU and is on ", x.device());
}

Stream stream_of(const at::Tensor& x) {
  return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
}

void check_launch(const char* error) { TORCH_CHECK(!error, "CUDA: ", error); }

Matrix matrix_of(const DenseRows& rows) { return {rows.data(), rows.stride}; }

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

std::tuple<at::Tensor, at::Tensor> low_rank_linear_cuda(const at::Tensor& x, const at::Tensor& v,
                                                        const at::Tensor& u,
                                                        const OptionalTensor& bias,
                                                        std::optional<std::string_view> activation,
                                                        const OptionalTensor& residual,
                                                        bool keep_intermediates) {
  TORCH_CHECK(x.dim() > 0 && v.dim() == 2 && u.dim() == 2, "x (..., in), v, u matrices expected");
  check_device(x, "x");
  const int64_t in = x.size(-1), rank = v.size(1), out = u.size(0);
  check_like(x, v, "v", {in, rank});
  check_like(x, u, "u", {out, rank});
  check_like(x, bias, "bias", {out});
  check_like(x, residual, "residual", with_last(x, out));
  TORCH_CHECK(std::max({in, rank, out}) <= std::numeric_limits<int>::max() - 128,
              "too wide for the kernel: in ", in, ", rank ", rank, ", out ", out);
  const c10::DeviceGuard guard(x.device());
  const at::Tensor y = empty_rows(x, out), middle = empty_rows(x, rank, keep_intermediates);
  const int64_t rows = row_count(x);
  if (rows == 0 || (out == 0 && !keep_intermediates)) return {y, middle};
  const Dtype dtype = dtype_of(x);
  const int64_t needed = low_rank_linear_shared_memory(dtype, rank);
  const int64_t available = shared_memory_limit();
  TORCH_CHECK(needed <= available, "rank ", rank, " takes ", needed,
              " bytes of shared memory and a block of this GPU has ", available);
  const DenseRows xs(x), vs(v), us(u), residuals(residual ? *residual : x);
  const at::Tensor biases = bias ? bias->contiguous() : at::Tensor();
  const LowRankLinear problem{rows,
                              static_cast<int>(in),
                              static_cast<int>(rank),
                              static_cast<int>(out),
                              matrix_of(xs),
                              matrix_of(vs),
                              matrix_of(us),
                              residual ? matrix_of(residuals) : Matrix{},
                              bias ? biases.const_data_ptr() : nullptr,
                              y.mutable_data_ptr(),
                              keep_intermediates ? middle.mutable_data_ptr() : nullptr,
                              parse_activation(activation)};
  check_launch(low_rank_linear(dtype, problem, stream_of(x)));
  return {y, middle};
}

}  // namespace
}  // namespace adacomcat::cuda

TORCH_LIBRARY_IMPL(adacomcat, CUDA, m) {
  m.impl("batched_svd_cuda", &adacomcat::cuda::batched_svd_cuda);
  m.impl("low_rank_linear_cuda", &adacomcat::cuda::low_rank_linear_cuda);
  m.impl("truncation_errors_cuda", &adacomcat::cuda::truncation_errors_cuda);
}
