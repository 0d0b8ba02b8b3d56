// y = act((x V) Uᵀ + b) + residual: the middle (rows, r) of a block stays in cache.
#include <torch/library.h>

#include <tuple>

#include "shell.h"

namespace adacomcat {
namespace {

std::tuple<at::Tensor, at::Tensor> low_rank_linear(
    const at::Tensor& x, const at::Tensor& v, const at::Tensor& u, const OptionalTensor& bias,
    std::optional<std::string_view> activation, const OptionalTensor& residual, bool keep) {
  TORCH_CHECK(x.dim() > 0 && v.dim() == 2 && u.dim() == 2, "x (..., in), v, u matrices expected");
  const int64_t in = x.size(-1), rank = v.size(1), out = u.size(0), rows = row_count(x);
  check(x, v, "v", {in, rank});
  check(x, u, "u", {out, rank});
  if (bias) check(x, *bias, "bias", {out});
  if (residual) check(x, *residual, "residual", with_last(x, out));

  at::Tensor y = at::empty(with_last(x, out), x.options());
  at::Tensor middle = keep ? at::empty(with_last(x, rank), x.options()) : at::empty({0}, x.options());
  if (!rows || !out) return {y, middle};

  const Engine& e = engine(dtype_of(x));
  const Packed pv = packed(e, v, false), pu = packed(e, u, true);
  const RowsOf xs(x), rs(residual ? *residual : x);
  const Bias b(bias);
  const Activation act = parse_activation(activation);
  const int64_t kx = e.padded_k(in), kr = e.padded_k(rank), size = e.operand_size();
  const int64_t block = block_rows(e, rows), columns = sum_columns(e, in, rank);
  char* result = static_cast<char*>(y.mutable_data_ptr());
  const Dtype dtype = dtype_of(y);

  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn turn) {
    Scratch scratch(Scratch::aligned(block * kx * size) + Scratch::aligned(block * kr * size) +
                    Scratch::aligned(block * columns * 4));
    const Left left = left_operand(e, m, in, rows_from(xs.rows, row), {},
                                   scratch.take(block * kx * size));
    void* t = scratch.take(block * kr * size);
    if (kr != rank) std::memset(t, 0, m * kr * size);
    multiply_long(e, {m, rank, in, left.data, left.stride, pv.data.get(), pv.rows, 0},
                  {t, kr, e.operand}, scratch.take<float>(block * columns * 4));
    if (keep) keep_rows(m, rank, t, kr, e.operand, middle, row);
    Finish finish{result + row * out * dtype_size(dtype), out, dtype, b.rows, act};
    if (residual) finish.residual = rows_from(rs.rows, row);
    const Ahead next = turn.last ? Ahead{} : rows_ahead(xs.rows, row + m, std::min(m, rows - row - m), in);
    e.multiply({m, out, rank, t, kr, pu.data.get(), pu.rows, 0, next}, finish);
  });
  return {y, middle};
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("low_rank_linear_cpu", &low_rank_linear); }

}  // namespace adacomcat
