// The tensor shells of the CUDA kernels: shapes, strides, the current stream, errors.
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

using OptionalTensor = std::optional<at::Tensor>;

Type type_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    default:
      TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16, got ",
                  x.scalar_type());
  }
}

Activation parse_activation(const std::optional<std::string_view>& name) {
  if (!name) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "silu") return Activation::silu;
  TORCH_CHECK(*name == "relu", "unknown activation '", *name, "'");
  return Activation::relu;
}

void check(const at::Tensor& x, const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " is ", t.scalar_type(), " and x is ",
              x.scalar_type(), ": cast one of them");
  TORCH_CHECK(t.device() == x.device(), name, " is on ", t.device(), " and x is on ", x.device());
  TORCH_CHECK(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

// A tensor (..., k) as a matrix whose rows are dense; copied only where its layout is none.
struct Matrix {
  at::Tensor held;
  Rows rows;

  explicit Matrix(const at::Tensor& t) : held(t) {
    bool regular = t.stride(-1) == 1 || t.size(-1) <= 1;
    for (int64_t d = 0; d + 2 < t.dim(); ++d) {
      regular = regular && t.stride(d) == t.stride(d + 1) * t.size(d + 1);
    }
    if (!regular) held = t.contiguous();
    rows = {held.const_data_ptr(), held.dim() > 1 ? held.stride(-2) : held.size(-1)};
  }
};

std::tuple<at::Tensor, at::Tensor> low_rank_linear_cuda(
    const at::Tensor& x, const at::Tensor& v, const at::Tensor& u, const OptionalTensor& bias,
    std::optional<std::string_view> activation, const OptionalTensor& residual, bool keep) {
  TORCH_CHECK(x.dim() > 0 && v.dim() == 2 && u.dim() == 2, "x (..., in), v, u matrices expected");
  check_device(x, "x");
  const int64_t in = x.size(-1), rank = v.size(1), out = u.size(0);
  const auto lead = x.sizes().slice(0, x.dim() - 1);
  const auto result = with_last(lead, {out});
  check(x, v, "v", {in, rank});
  check(x, u, "u", {out, rank});
  if (bias) check(x, *bias, "bias", {out});
  if (residual) check(x, *residual, "residual", result);
  TORCH_CHECK(std::max({in, rank, out}) <= std::numeric_limits<int>::max() - 128,
              "too wide for the kernel: in ", in, ", rank ", rank, ", out ", out);
  const c10::DeviceGuard guard(x.device());
  const at::Tensor y = at::empty(result, x.options());
  const at::Tensor middle = at::empty(keep ? with_last(lead, {rank}) : std::vector<int64_t>{0},
                                      x.options());
  const int64_t rows = c10::multiply_integers(lead);
  if (rows == 0 || (out == 0 && !keep)) return {y, middle};
  const Type type = type_of(x);
  const int64_t needed = low_rank_linear_shared_memory(type, rank);
  const int64_t available = shared_memory_limit();
  TORCH_CHECK(needed <= available, "rank ", rank, " takes ", needed,
              " bytes of shared memory and a block of this GPU has ", available);
  const Matrix xs(x), vs(v), us(u), rs(residual ? *residual : x);
  const at::Tensor biases = bias ? bias->contiguous() : at::Tensor();
  check_launch(low_rank_linear(
      type,
      {rows, static_cast<int>(in), static_cast<int>(rank), static_cast<int>(out), xs.rows, vs.rows,
       us.rows, residual ? rs.rows : Rows{}, bias ? biases.const_data_ptr() : nullptr,
       y.mutable_data_ptr(), keep ? middle.mutable_data_ptr() : nullptr,
       parse_activation(activation)},
      stream_of(x)));
  return {y, middle};
}

}  // namespace
}  // namespace adacomcat::cuda

TORCH_LIBRARY_IMPL(adacomcat, CUDA, m) {
  m.impl("batched_svd_cuda", &adacomcat::cuda::batched_svd_cuda);
  m.impl("low_rank_linear_cuda", &adacomcat::cuda::low_rank_linear_cuda);
  m.impl("truncation_errors_cuda", &adacomcat::cuda::truncation_errors_cuda);
}
