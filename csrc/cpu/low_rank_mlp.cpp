// y = (h V2) U2ᵀ + b2, h = act((x̂ V1) U1ᵀ + b1): of h a block of rows sees a few columns at a time.
#include <torch/library.h>

#include <tuple>

#include "shell.h"

namespace adacomcat {
namespace {

constexpr int64_t kHiddenPanels = 8;

std::tuple<at::Tensor, at::Tensor, at::Tensor> low_rank_mlp(
    const at::Tensor& x, const at::Tensor& v1, const at::Tensor& u1, const OptionalTensor& b1,
    const at::Tensor& v2, const at::Tensor& u2, const OptionalTensor& b2,
    std::optional<std::string_view> activation, std::optional<double> epsilon,
    const OptionalTensor& residual, bool keep) {
  TORCH_CHECK(x.dim() > 0 && v1.dim() == 2 && u1.dim() == 2 && v2.dim() == 2 && u2.dim() == 2,
              "x (..., in) and matrices v1, u1, v2, u2 expected");
  const int64_t in = x.size(-1), rank1 = v1.size(1), hidden = u1.size(0), rank2 = v2.size(1);
  const int64_t out = u2.size(0), rows = row_count(x);
  check(x, v1, "v1", {in, rank1});
  check(x, u1, "u1", {hidden, rank1});
  check(x, v2, "v2", {hidden, rank2});
  check(x, u2, "u2", {out, rank2});
  if (b1) check(x, *b1, "b1", {hidden});
  if (b2) check(x, *b2, "b2", {out});
  if (residual) check(x, *residual, "residual", with_last(x, out));

  const auto kept = [&](int64_t n) {
    return keep ? at::empty(with_last(x, n), x.options()) : at::empty({0}, x.options());
  };
  at::Tensor y = at::empty(with_last(x, out), x.options());
  at::Tensor middle1 = kept(rank1), middle2 = kept(rank2);
  if (!rows || !out) return {y, middle1, middle2};

  const Engine& e = engine(dtype_of(x));
  const Packed pv1 = packed(e, v1, false), pu1 = packed(e, u1, true);
  const Packed pv2 = packed(e, v2, false), pu2 = packed(e, u2, true);
  const RowsOf xs(x), rs(residual ? *residual : x);
  const Bias bias1(b1), bias2(b2);
  const Activation act = parse_activation(activation);
  const int64_t size = e.operand_size(), block = block_rows(e, rows);
  const int64_t kx = e.padded_k(in), k1 = e.padded_k(rank1), k2 = e.padded_k(rank2);
  const int64_t n2 = e.padded_n(rank2), kh = e.padded_k(hidden);
  const int64_t chunk = kHiddenPanels * 2 * e.width;
  const Dtype dtype = dtype_of(y);
  char* result = static_cast<char*>(y.mutable_data_ptr());
  const int64_t bytes = Scratch::aligned(block * kx * size) + Scratch::aligned(block * k1 * size) +
                        Scratch::aligned(block * chunk * size) + Scratch::aligned(block * n2 * 4) +
                        Scratch::aligned(block * k2 * size);

  for_each_block(e, rows, [&](int64_t row, int64_t m) {
    Scratch scratch(bytes);
    const Left left = left_operand(e, m, in, rows_from(xs.rows, row), epsilon,
                                   scratch.take(block * kx * size));
    void* t1 = scratch.take(block * k1 * size);
    char* h = scratch.take<char>(block * chunk * size);
    float* sum = scratch.take<float>(block * n2 * 4);
    void* t2 = scratch.take(block * k2 * size);
    if (k1 != rank1) std::memset(t1, 0, m * k1 * size);
    // The first rows see every weight for the first time: each product fetches what the next needs.
    const auto ahead = [&](Ahead memory) { return row ? Ahead{} : memory; };
    const auto part_of_u1 = [&](int64_t first) {
      const int64_t bytes = e.padded_n(std::min(chunk, hidden - first)) * k1 * size;
      return Ahead{static_cast<const char*>(pu1.data.get()) + first * k1 * size, bytes};
    };
    const auto part_of_v2 = [&](int64_t first, int64_t columns) {
      const int64_t lanes = std::min(2 * e.width, n2) * size, panels = ceil_div(n2 * size, lanes);
      return Ahead{static_cast<const char*>(pv2.data.get()) + first * lanes,
                   panels * columns * lanes, columns * lanes, kh * lanes};
    };
    e.multiply({m, rank1, in, left.data, left.stride, pv1.data.get(), kx, 0, ahead(part_of_u1(0))},
               {t1, k1, e.operand});
    for (int64_t first = 0; first < hidden; first += chunk) {
      const int64_t columns = std::min(chunk, hidden - first), following = first + columns;
      if (columns % e.group) std::memset(h, 0, m * chunk * size);
      e.multiply({m, columns, rank1, t1, k1, part_of_u1(first).data, k1, 0,
                  ahead(part_of_v2(first, columns))},
                 {h, chunk, e.operand, bias1.from(first), act});
      e.accumulate({m, rank2, columns, h, chunk, pv2.data.get(), kh, first,
                    ahead(following < hidden ? part_of_u1(following) : pu2.all())},
                   sum, n2, first > 0);
    }
    e.load(m, rank2, {sum, n2, Dtype::f32}, t2, k2);
    if (keep) {
      keep_rows(m, rank1, t1, k1, e.operand, middle1, row);
      keep_rows(m, rank2, t2, k2, e.operand, middle2, row);
    }
    Finish finish{result + row * out * dtype_size(dtype), out, dtype, bias2.rows};
    if (residual) finish.residual = rows_from(rs.rows, row);
    e.multiply({m, out, rank2, t2, k2, pu2.data.get(), k2, 0, ahead(pu2.follower())}, finish);
  });
  return {y, middle1, middle2};
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) { m.impl("low_rank_mlp_cpu", &low_rank_mlp); }

}  // namespace adacomcat
