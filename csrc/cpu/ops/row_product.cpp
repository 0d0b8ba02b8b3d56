// a b (+ c), b packed: the gradient of an input, or a part of one.
#include <torch/csrc/stable/library.h>

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/packed_weight.h"

namespace adacomcat {
namespace {

// a (..., k), b (k, n), c (..., n) → (..., n).
Tensor row_product(const Tensor& a, const Tensor& b, const OptionalTensor& c) {
  const int64_t k = a.size(-1), n = b.size(1), rows = row_count(a);
  check_like(a, b, "b", {k, n});
  check_like(a, c, "c", with_last(a, n));
  const Tensor y = empty_rows(a, n);
  if (!rows || !n) return y;
  const Engine& e = activation_engine(dtype_of(a));
  const PackedWeight weight = read_weight(e, b, false);
  const TensorRows as(a), cs(c ? *c : a);
  const OutputRows result(y);
  const int64_t block = block_rows(e, rows);

  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn) {
    Scratch scratch({lhs_bytes(e, block, k)});
    const LhsOperand lhs = lhs_operand(e, m, k, rows_from(as.rows, row), {}, scratch.next());
    Epilogue epilogue = result.epilogue(row);
    if (c) epilogue.residual = rows_from(cs.rows, row);
    e.multiply(weight.product(m, lhs), epilogue);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(adacomcat, m) {
  m.def("row_product_cpu(Tensor a, Tensor b, Tensor? c=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("row_product_cpu", TORCH_BOX(&row_product)); }

}  // namespace adacomcat
