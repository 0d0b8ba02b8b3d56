// What the gradients of the ops are made of: products of rows with a weight, aᵀ b over all rows, and
// the derivative of a hidden layer that is computed anew.
#include <torch/library.h>

#include "shell.h"

namespace adacomcat {
namespace {

// Of the wide factor a thread packs so much at a time, which stays in its L2 cache.
constexpr int64_t kRowsAtOnce = 1024;
constexpr int64_t kPanelsAtOnce = 2;

// to (columns, stride) = the transpose of from (rows, columns), in squares that fit the L1 cache.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to,
               int64_t stride) {
  constexpr int64_t kSquare = 32;
  for (int64_t r = 0; r < rows; r += kSquare) {
    const int64_t last_row = std::min(r + kSquare, rows);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = r; i < last_row; ++i) to[c * stride + i] = from[i * from_stride + c];
    }
  }
}

// Rows of x in the operand format, transposed: (k, padded rows), zeros at the end.
std::vector<char> transposed(const Engine& e, const Rows& x, int64_t rows, int64_t k) {
  const int64_t size = e.operand_size(), stride = e.padded_k(rows);
  std::vector<char> result(k * stride * size);
  const int64_t block = 16 * e.tile_rows;
  at::parallel_for(0, ceil_div(rows, block), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < std::min(end * block, rows); row += block) {
      const int64_t m = std::min(block, rows - row);
      Scratch scratch(Scratch::aligned(block * e.padded_k(k) * size));
      const Left left = left_operand(e, m, k, rows_from(x, row), {},
                                     scratch.take(block * e.padded_k(k) * size));
      if (e.operand == Dtype::f32) {
        transpose(m, k, static_cast<const float*>(left.data), left.stride,
                  reinterpret_cast<float*>(result.data()) + row, stride);
      } else {
        transpose(m, k, static_cast<const uint16_t*>(left.data), left.stride,
                  reinterpret_cast<uint16_t*>(result.data()) + row, stride);
      }
    }
  });
  return result;
}

// narrowᵀ wide, (n, m), for narrow (rows, n) and wide (rows, m).
at::Tensor product_of_rows(const at::Tensor& narrow, const at::Tensor& wide) {
  const Engine& e = engine(dtype_of(wide));
  const int64_t rows = row_count(wide), n = narrow.size(-1), m = wide.size(-1);
  const RowsOf ns(narrow), ws(wide);
  at::Tensor result = at::empty({n, m}, wide.options());
  const int64_t size = e.operand_size(), stride = e.padded_k(rows), dtype = dtype_size(ws.rows.dtype);
  const std::vector<char> left = transposed(e, ns.rows, rows, n);
  const int64_t step = kPanelsAtOnce * 2 * e.width, k_step = kRowsAtOnce;
  char* out = static_cast<char*>(result.mutable_data_ptr());

  at::parallel_for(0, ceil_div(m, step), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::aligned(k_step * step * size) + Scratch::aligned(n * step * 4));
    void* panel = scratch.take(k_step * step * size);
    float* sum = scratch.take<float>(n * step * 4);
    for (int64_t first = begin * step; first < std::min(end * step, m); first += step) {
      const int64_t columns = std::min(step, m - first);
      for (int64_t row = 0; row == 0 || row < rows; row += k_step) {
        const int64_t k = std::min(k_step, rows - row);
        const char* from = static_cast<const char*>(ws.rows.data) +
                           (row * ws.rows.stride + first) * dtype;
        e.pack(k, columns, from, ws.rows.stride, 1, ws.rows.dtype, panel);
        const Product product{n, columns, k, left.data() + row * size, stride, panel,
                              e.padded_k(k), 0};
        if (row + k < rows) {
          e.accumulate(product, sum, step, row > 0);
          continue;
        }
        Finish finish{out + first * dtype, m, ws.rows.dtype};
        if (row) finish.sum = sum, finish.sum_stride = step;
        e.multiply(product, finish);
      }
    }
  });
  return result;
}

// aᵀ b over all rows: a (..., m), b (..., n) → (m, n).
at::Tensor weight_gradient(const at::Tensor& a, const at::Tensor& b) {
  check(a, b, "b", with_last(a, b.size(-1)));
  const bool swap = b.size(-1) < a.size(-1);  // the narrow one is transposed
  return swap ? product_of_rows(b, a).t() : product_of_rows(a, b);
}

// a b (+ c): a (..., k), b (k, n), c (..., n).
at::Tensor row_product(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& c) {
  const int64_t k = a.size(-1), n = b.size(1), rows = row_count(a);
  check(a, b, "b", {k, n});
  if (c) check(a, *c, "c", with_last(a, n));
  at::Tensor y = at::empty(with_last(a, n), a.options());
  if (!rows || !n) return y;
  const Engine& e = engine(dtype_of(a));
  const Packed weight = packed(e, b, false);
  const RowsOf as(a), cs(c ? *c : a);
  const int64_t ka = e.padded_k(k), block = block_rows(e, rows);
  const Dtype dtype = as.rows.dtype;
  char* const out = static_cast<char*>(y.mutable_data_ptr());

  for_each_block(e, rows, [&](int64_t row, int64_t m) {
    Scratch scratch(Scratch::aligned(block * ka * e.operand_size()));
    const Left left = left_operand(e, m, k, rows_from(as.rows, row), {},
                                   scratch.take(block * ka * e.operand_size()));
    Finish finish{out + row * n * dtype_size(dtype), n, dtype};
    if (c) finish.residual = rows_from(cs.rows, row);
    e.multiply({m, n, k, left.data, left.stride, weight.data.get(), ka, 0}, finish);
  });
  return y;
}

// grad_pre = act'(pre) · grad for pre = middle Uᵀ + b, and hidden = act(pre) where it is given.
// grad_pre may be grad.
void activation_gradient(const at::Tensor& middle, const at::Tensor& u, const OptionalTensor& bias,
                         const at::Tensor& grad, std::optional<std::string_view> activation,
                         const at::Tensor& grad_pre, const OptionalTensor& hidden) {
  const int64_t rank = middle.size(-1), out = u.size(0), rows = row_count(middle);
  check(middle, u, "u", {out, rank});
  if (bias) check(middle, *bias, "bias", {out});
  check(middle, grad, "grad", with_last(middle, out));
  check(middle, grad_pre, "grad_pre", grad.sizes());
  if (hidden) check(middle, *hidden, "hidden", grad.sizes());
  TORCH_CHECK(grad_pre.is_contiguous() && (!hidden || hidden->is_contiguous()),
              "grad_pre and hidden must be contiguous");
  if (!rows || !out) return;

  const Engine& e = engine(dtype_of(middle));
  const Packed pu = packed(e, u, true);
  const RowsOf middles(middle), grads(grad);
  const Bias b(bias);
  const Activation act = parse_activation(activation);
  const int64_t kr = e.padded_k(rank), block = block_rows(e, rows), size = e.operand_size();
  const int64_t row_size = out * dtype_size(grads.rows.dtype);
  char* const to = static_cast<char*>(grad_pre.mutable_data_ptr());
  char* const activated = hidden ? static_cast<char*>(hidden->mutable_data_ptr()) : nullptr;

  for_each_block(e, rows, [&](int64_t row, int64_t m) {
    Scratch scratch(Scratch::aligned(block * kr * size));
    const Left left = left_operand(e, m, rank, rows_from(middles.rows, row), {},
                                   scratch.take(block * kr * size));
    Finish finish{to + row * row_size, out, grads.rows.dtype, b.rows, act};
    finish.gradient = rows_from(grads.rows, row);
    if (activated) finish.activated = activated + row * row_size;
    e.multiply({m, out, rank, left.data, left.stride, pu.data.get(), kr, 0}, finish);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(adacomcat, m) {
  m.def("row_product_cpu(Tensor a, Tensor b, Tensor? c=None) -> Tensor");
  m.def("weight_gradient_cpu(Tensor a, Tensor b) -> Tensor");
  m.def(
      "activation_gradient_cpu(Tensor middle, Tensor u, Tensor? bias, Tensor grad, "
      "str? activation, Tensor(a!) grad_pre, Tensor(b!)? hidden) -> ()");
}

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("row_product_cpu", &row_product);
  m.impl("weight_gradient_cpu", &weight_gradient);
  m.impl("activation_gradient_cpu", &activation_gradient);
}

}  // namespace adacomcat
