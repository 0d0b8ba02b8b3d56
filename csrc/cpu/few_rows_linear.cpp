// y = x Wᵀ + b of so few rows that each weight is read once, as it lies; threads share out the columns.
#include <torch/library.h>

#include "vectors.h"

namespace adacomcat {
namespace {

at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(x.dim() > 0 && weight.dim() == 2, "x (..., in) and a matrix expected, got ", x.sizes(),
              " and ", weight.sizes());
  const int64_t rows = row_count(x), in = x.size(-1), out = weight.size(0);
  TORCH_CHECK(rows <= kMostVectors, "at most ", kMostVectors, " rows expected, got ", rows);
  check(x, weight, "weight", {out, in});
  if (bias) check(x, *bias, "bias", {out});
  at::Tensor y = at::empty(with_last(x, out), x.options());
  if (!rows || !out) return y;

  const Engine& e = engine(dtype_of(x));
  const RowsOf xs(x);
  const Matrix w(weight, true);
  const Bias b(bias);
  const int64_t stride = e.padded_n(out);
  Workspace workspace(Scratch::aligned(rows * in * 4) + rows * stride * 4);
  float* vectors = reinterpret_cast<float*>(workspace.take(rows * in * 4));
  float* sums = reinterpret_cast<float*>(workspace.take(rows * stride * 4));
  vectors_of(e, rows, in, xs.rows, {}, nullptr, vectors);
  for_each_column(in, out, [&](int64_t n, int64_t columns) {
    w.multiply(e, rows, vectors, in, 0, in, n, columns, sums + n, stride);
  });
  finish_sums(e, rows, out, sums, stride, {y.mutable_data_ptr(), out, dtype_of(y), b.rows});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("few_rows_linear_cpu", &few_rows_linear); }

}  // namespace adacomcat
