// A linear layer after a layer norm, of single rows: what a classifier does to its class token.
#include <torch/library.h>

#include "vectors.h"

namespace adacomcat {
namespace {

// x (rows, d), gamma and beta (d), weight (n, d), bias (n) → (rows, n).
at::Tensor normed_linear(const at::Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                         const at::Tensor& weight, const OptionalTensor& bias, double epsilon) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "matrices x and weight expected, got ", x.sizes(),
              " and ", weight.sizes());
  const int64_t rows = x.size(0), d = x.size(1), n = weight.size(0);
  check(x, weight, "weight", {n, d});
  if (gamma) check(x, *gamma, "gamma", {d});
  if (beta) check(x, *beta, "beta", {d});
  if (bias) check(x, *bias, "bias", {n});
  at::Tensor y = at::empty({rows, n}, x.options());
  if (!y.numel()) return y;

  const Engine& e = engine(dtype_of(x));
  const RowsOf xs(x);
  const Matrix matrix(weight, true);
  const Bias scale(gamma), shift(beta), b(bias);
  const int64_t stride = e.padded_n(n), row_bytes = Scratch::aligned(d * 4);
  Workspace workspace(Scratch::aligned(e.padded_k(d) * e.operand_size()) + 2 * row_bytes +
                      rows * (d + stride) * 4);
  char* operand = workspace.take(e.padded_k(d) * e.operand_size());
  float* factors = reinterpret_cast<float*>(workspace.take(row_bytes));
  float* terms = reinterpret_cast<float*>(workspace.take(row_bytes));
  float* normed = reinterpret_cast<float*>(workspace.take(rows * d * 4));
  float* sums = reinterpret_cast<float*>(workspace.take(0));

  vectors_of(e, rows, d, xs.rows, epsilon, operand, normed);
  if (gamma) floats_of(e, scale.rows, d, factors);
  floats_of(e, shift.rows, d, terms);
  for (int64_t i = 0; i < rows * d; ++i) {
    normed[i] = (gamma ? normed[i] * factors[i % d] : normed[i]) + terms[i % d];
  }
  for_each_column(d, n, [&](int64_t first, int64_t columns) {
    matrix.multiply(e, rows, normed, d, 0, d, first, columns, sums + first, stride);
  });
  finish_sums(e, rows, n, sums, stride, {y.mutable_data_ptr(), n, dtype_of(y), b.rows});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("normed_linear_cpu", &normed_linear); }

}  // namespace adacomcat
