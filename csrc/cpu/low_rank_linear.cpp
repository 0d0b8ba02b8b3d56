// y = act((x V) Uᵀ + b) + residual in fp32: row tiles whose (tile, r) middle stays in cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

namespace {

enum class Activation { none, gelu, gelu_tanh, silu, relu };

struct Problem {
  int64_t rows, in, rank, out;
  const float *x, *v, *ut, *bias, *residual;  // bias and residual may be null
  int64_t stride_v;                          // from one row of v to the next
  Activation activation;
  float *y, *middle;
};

constexpr int64_t kTileRows = 64, kTileColumns = 64;

float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::silu:
      return x / (1.0f + std::exp(-x));
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;  // keeps NaN
    case Activation::none:
      break;
  }
  return x;
}

// One row of the result in place: y = act(y + bias) + residual.
void finish_row(float* y, const float* bias, const float* residual, int64_t n, Activation act) {
  if (bias) {
    for (int64_t j = 0; j < n; ++j) y[j] += bias[j];
  }
  if (act != Activation::none) {
    for (int64_t j = 0; j < n; ++j) y[j] = activate(y[j], act);
  }
  if (residual) {
    for (int64_t j = 0; j < n; ++j) y[j] += residual[j];
  }
}

// c (m, n) = a (m, k) · b (k, n), all row-major, the rows of b ldb apart.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, const float* b, int64_t ldb,
              float* c) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    std::fill_n(c, m * n, 0.0f);
    return;
  }
  for (int64_t j = 0; j < n; j += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, n - j);
    at::native::cpublas::brgemm(m, columns, k, k, ldb, n, /*add_C=*/false, a, b + j, c + j,
                                /*is_vnni=*/false);
  }
}

void low_rank_linear_core(const Problem& p) {
  const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows;
      const int64_t rows = std::min(kTileRows, p.rows - first);
      float* middle = p.middle + first * p.rank;
      float* y = p.y + first * p.out;
      multiply(rows, p.rank, p.in, p.x + first * p.in, p.v, p.stride_v, middle);
      multiply(rows, p.out, p.rank, middle, p.ut, p.out, y);
      for (int64_t i = 0; i < rows; ++i) {
        const float* residual = p.residual ? p.residual + (first + i) * p.out : nullptr;
        finish_row(y + i * p.out, p.bias, residual, p.out, p.activation);
      }
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/false);
  });
}

Activation parse_activation(const std::optional<std::string_view>& name) {
  if (!name) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "silu") return Activation::silu;
  TORCH_CHECK(*name == "relu", "unknown activation '", *name, "'");
  return Activation::relu;
}

void check(const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
  TORCH_CHECK(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

// x (..., in), v (in, r), u (out, r) -> (..., out) and the middle (..., r).
std::tuple<at::Tensor, at::Tensor> low_rank_linear_cpu(
    const at::Tensor& x, const at::Tensor& v, const at::Tensor& u,
    const std::optional<at::Tensor>& bias, std::optional<std::string_view> activation,
    const std::optional<at::Tensor>& residual) {
  TORCH_CHECK(x.dim() > 0 && v.dim() == 2 && u.dim() == 2, "x (..., in), v, u matrices expected");
  const int64_t in = x.size(-1), rank = v.size(1), out = u.size(0);
  auto shape = x.sizes().vec();
  shape.back() = rank;
  at::Tensor middle = at::empty(shape, x.options());
  shape.back() = out;
  at::Tensor y = at::empty(shape, x.options());
  check(x, "x", x.sizes());
  check(v, "v", {in, rank});
  check(u, "u", {out, rank});
  if (bias) check(*bias, "bias", {out});
  if (residual) check(*residual, "residual", shape);

  // A prefix v[:, :r] of a wider factor is read in place.
  const bool dense_rows = v.stride(1) == 1 && v.stride(0) >= rank;
  const auto vc = dense_rows ? v : v.contiguous();
  const auto xc = x.contiguous(), ut = u.t().contiguous();
  const auto bc = bias ? bias->contiguous() : at::Tensor();
  const auto rc = residual ? residual->contiguous() : at::Tensor();
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  low_rank_linear_core({rows, in, rank, out, xc.const_data_ptr<float>(),
                        vc.const_data_ptr<float>(), ut.const_data_ptr<float>(),
                        bias ? bc.const_data_ptr<float>() : nullptr,
                        residual ? rc.const_data_ptr<float>() : nullptr, vc.stride(0),
                        parse_activation(activation), y.data_ptr<float>(),
                        middle.data_ptr<float>()});
  return {y, middle};
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("low_rank_linear_cpu", &low_rank_linear_cpu); }
