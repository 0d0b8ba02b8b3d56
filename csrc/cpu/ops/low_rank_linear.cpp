// y = act((x V) Uᵀ + b) + residual. The product x V of a block of rows stays in cache.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/split_k.h"
#include "cpu/runtime/packed_weight.h"

namespace adacomcat {
namespace {

// Returns y and, if intermediates are kept, x V.
std::tuple<Tensor, Tensor> low_rank_linear(const Tensor& x, const Tensor& v, const Tensor& u,
                                           const OptionalTensor& bias,
                                           std::optional<std::string> activation,
                                           const OptionalTensor& residual,
                                           bool keep_intermediates) {
  REQUIRE(x.dim() > 0 && is_weight(v) && is_weight(u), "x (..., in), v, u matrices expected");
  const int64_t in = x.size(-1), rank = weight_size(v, 1), out = weight_size(u, 0);
  const int64_t rows = row_count(x);
  check_weight(x, v, "v", {in, rank});
  check_weight(x, u, "u", {out, rank});
  check_like(x, bias, "bias", {out});
  check_like(x, residual, "residual", with_last(x, out));

  const Tensor y = empty_rows(x, out), middle = empty_rows(x, rank, keep_intermediates);
  if (!rows || !out) return {y, middle};

  const Engine& e = engine_for(x, v);
  const PackedWeight pv = read_weight(e, v, false), pu = read_weight(e, u, true);
  const TensorRows xs(x), residuals(residual ? *residual : x);
  const Bias b(bias);
  const Activation act = parse_activation(activation);
  const OutputRows result(y);
  const int64_t block = block_rows(e, rows), middle_stride = e.padded_k(rank);
  const int64_t sum_bytes = block * split_k_columns(e, in, rank) * sizeof(float);

  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn turn) {
    Scratch scratch({lhs_bytes(e, block, in), lhs_bytes(e, block, rank), sum_bytes});
    const LhsOperand lhs = lhs_operand(e, m, in, rows_from(xs.rows, row), {}, scratch.next());
    void* t = scratch.next();
    if (middle_stride != rank) std::memset(t, 0, lhs_bytes(e, m, rank));
    multiply_split_k(e, pv.product(m, lhs), {t, middle_stride, e.operand}, scratch.next<float>());
    if (keep_intermediates) store_rows(e, m, rank, t, middle_stride, middle, row);
    Epilogue epilogue = result.epilogue(row);
    epilogue.bias = b.rows, epilogue.activation = act;
    if (residual) epilogue.residual = rows_from(residuals.rows, row);
    const int64_t following = turn.last ? 0 : std::min(m, rows - row - m);
    e.multiply(pu.product(m, {t, middle_stride}, hint_for_rows(xs.rows, row + m, following, in)),
               epilogue);
  });
  return {y, middle};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("low_rank_linear_cpu", TORCH_BOX(&low_rank_linear));
}

}  // namespace adacomcat
