// y = x Wᵀ + b for a few rows: a gemv with W as it is. Threads share out the columns of y.
#include <torch/csrc/stable/library.h>

#include "cpu/runtime/gemv.h"
#include "cpu/runtime/scratch.h"

namespace adacomcat {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  REQUIRE(x.dim() > 0 && weight.dim() == 2, "x (..., in) and a matrix expected, got ", x.sizes(),
          " and ", weight.sizes());
  const int64_t rows = row_count(x), in = x.size(-1), out = weight.size(0);
  REQUIRE(uses_gemv(x), "at most ", kMostGemvRows, " rows expected, got ", rows);
  check_like(x, weight, "weight", {out, in});
  check_like(x, bias, "bias", {out});
  const Tensor y = empty_rows(x, out);
  if (!rows || !out) return y;

  const Engine& e = engine(dtype_of(x));
  const TensorRows xs(x);
  const GemvWeight w(weight, true);
  const Bias b(bias);
  const int64_t stride = e.padded_n(out), size = sizeof(float);
  Workspace workspace({rows * in * size, rows * stride * size});
  float* vectors = workspace.next<float>();
  float* sums = workspace.next<float>();
  rows_to_floats(e, rows, in, xs.rows, {}, nullptr, vectors);
  for_each_column_share(in, out, [&](int64_t n, int64_t columns) {
    w.multiply(e, rows, vectors, in, 0, in, n, columns, sums + n, stride);
  });
  Epilogue epilogue = OutputRows(y).epilogue(0);
  epilogue.bias = b.rows;
  apply_epilogue(e, rows, out, sums, stride, epilogue);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("linear_cpu", TORCH_BOX(&linear)); }

}  // namespace adacomcat
