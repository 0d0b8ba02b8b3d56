// What the gradients of the ops are made of: products of rows with a weight, aᵀ b over all rows, and
// the derivative of a hidden layer that is computed anew.
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <tuple>

#include "shell.h"

namespace adacomcat {
namespace {

// Of the wide factor a thread packs so much at a time, which stays in its L2 cache.
constexpr int64_t kRowsAtOnce = 1024;
constexpr int64_t kPanelsAtOnce = 2;
constexpr int64_t kHiddenPanels = 8;

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

// Rows of x in the operand format, transposed, and a row of ones: (k + 1, padded rows), the columns
// padded with zeros.
std::vector<char> transposed(const Engine& e, const Rows& x, int64_t rows, int64_t k) {
  const int64_t size = e.operand_size(), stride = e.padded_k(rows);
  std::vector<char> result((k + 1) * stride * size);
  const std::vector<float> ones(rows, 1.0f);
  e.load(1, rows, {ones.data(), rows, Dtype::f32}, result.data() + k * stride * size, stride);
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

// [narrow, 1]ᵀ wide, (n + 1, m), for narrow (rows, n) and wide (rows, m).
at::Tensor product_of_rows(const at::Tensor& narrow, const at::Tensor& wide) {
  const Engine& e = activation_engine(dtype_of(wide));
  const int64_t rows = row_count(wide), n = narrow.size(-1) + 1, m = wide.size(-1);
  const RowsOf ns(narrow), ws(wide);
  at::Tensor result = at::empty({n, m}, wide.options());
  const int64_t size = e.operand_size(), stride = e.padded_k(rows), dtype = dtype_size(ws.rows.dtype);
  const std::vector<char> left = transposed(e, ns.rows, rows, n - 1);
  const int64_t step = kPanelsAtOnce * 2 * e.width, k_step = kRowsAtOnce;
  char* out = static_cast<char*>(result.mutable_data_ptr());

  at::parallel_for(0, ceil_div(m, step), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::aligned(e.packed_bytes(k_step, step)) + Scratch::aligned(n * step * 4));
    void* panel = scratch.take(e.packed_bytes(k_step, step));
    float* sum = scratch.take<float>(n * step * 4);
    for (int64_t first = begin * step; first < std::min(end * step, m); first += step) {
      const int64_t columns = std::min(step, m - first);
      for (int64_t row = 0; row == 0 || row < rows; row += k_step) {
        const int64_t k = std::min(k_step, rows - row);
        const char* from = static_cast<const char*>(ws.rows.data) +
                           (row * ws.rows.stride + first) * dtype;
        e.pack(k, columns, from, ws.rows.stride, 1, ws.rows.dtype, panel);
        const Product product{n, columns, k, left.data() + row * size, stride, panel,
                              e.packed_k(k), 0};
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

// aᵀ b over all rows, a (..., m), b (..., n) → (m, n), and the sum of a over them.
std::tuple<at::Tensor, at::Tensor> weight_gradient(const at::Tensor& a, const at::Tensor& b) {
  check(a, b, "b", with_last(a, b.size(-1)));
  const int64_t m = a.size(-1), n = b.size(-1);
  if (n <= m) {  // the narrow one is transposed
    const at::Tensor result = product_of_rows(b, a);
    return {result.narrow(0, 0, n).t(), result.select(0, n)};
  }
  return {product_of_rows(a, b).narrow(0, 0, m), a.reshape({row_count(a), m}).sum(0)};
}

// a b (+ c): a (..., k), b (k, n), c (..., n).
at::Tensor row_product(const at::Tensor& a, const at::Tensor& b, const OptionalTensor& c) {
  const int64_t k = a.size(-1), n = b.size(1), rows = row_count(a);
  check(a, b, "b", {k, n});
  if (c) check(a, *c, "c", with_last(a, n));
  at::Tensor y = at::empty(with_last(a, n), a.options());
  if (!rows || !n) return y;
  const Engine& e = activation_engine(dtype_of(a));
  const Packed weight = packed(e, b, false);
  const RowsOf as(a), cs(c ? *c : a);
  const int64_t ka = e.padded_k(k), block = block_rows(e, rows);
  const Dtype dtype = as.rows.dtype;
  char* const out = static_cast<char*>(y.mutable_data_ptr());

  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn) {
    Scratch scratch(Scratch::aligned(block * ka * e.operand_size()));
    const Left left = left_operand(e, m, k, rows_from(as.rows, row), {},
                                   scratch.take(block * ka * e.operand_size()));
    Finish finish{out + row * n * dtype_size(dtype), n, dtype};
    if (c) finish.residual = rows_from(cs.rows, row);
    e.multiply({m, n, k, left.data, left.stride, weight.data.get(), weight.rows, 0}, finish);
  });
  return y;
}

// Gradients of h = act(middle Uᵀ + b) and around it; grad_h = (grad U2) V2ᵀ, or grad V2ᵀ without u2, or
// grad where there is neither. Returns grad_pre = act'(middle Uᵀ + b) · grad_h, h if it is wanted,
// grad U2, and of the middle the gradient grad_pre U and, with a v, what that is of x: grad_pre U Vᵀ.
// Neither the middle's product nor grad_h is ever written whole.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> hidden_gradient(
    const at::Tensor& grad, const at::Tensor& middle, const at::Tensor& u,
    const OptionalTensor& bias, std::optional<std::string_view> activation,
    const OptionalTensor& u2, const OptionalTensor& v2, const OptionalTensor& v, bool want_hidden) {
  const int64_t inner = middle.size(-1), hidden = u.size(0), rows = row_count(middle);
  const int64_t out = grad.size(-1), inner2 = u2 ? u2->size(1) : out;
  check(middle, u, "u", {hidden, inner});
  if (bias) check(middle, *bias, "bias", {hidden});
  check(middle, grad, "grad", with_last(middle, v2 ? out : hidden));
  if (u2) check(middle, *u2, "u2", {out, inner2});
  if (v2) check(middle, *v2, "v2", {hidden, inner2});
  if (v) check(middle, *v, "v", {v->size(0), inner});

  const auto make = [&](bool wanted, int64_t n) {
    return wanted ? at::empty(with_last(middle, n), middle.options())
                  : at::empty({0}, middle.options());
  };
  const at::Tensor grad_pre = make(true, hidden), h = make(want_hidden, hidden);
  const at::Tensor grad_middle2 = make(u2.has_value(), inner2), grad_middle = make(true, inner);
  const at::Tensor grad_x = make(v.has_value(), v ? v->size(0) : 0);
  const auto results = std::make_tuple(grad_pre, h, grad_middle2, grad_middle, grad_x);
  if (!rows) return results;

  const Engine& e = activation_engine(dtype_of(middle));
  Packed into2, out_of2, into_x;
  if (u2) into2 = packed(e, *u2, false);
  if (v2) out_of2 = packed(e, *v2, true);
  const Packed up = packed(e, u, true), back = packed(e, u, false);
  if (v) into_x = packed(e, *v, true);
  const RowsOf middles(middle), grads(grad);
  const Bias b(bias);
  const Activation act = parse_activation(activation);
  const Dtype dtype = grads.rows.dtype;
  const int64_t size = e.operand_size(), element = dtype_size(dtype), block = block_rows(e, rows);
  const int64_t k = e.padded_k(inner), k2 = e.padded_k(inner2), ko = e.padded_k(out);
  const int64_t n = e.padded_n(inner), chunk = kHiddenPanels * 2 * e.width;
  const auto row_of = [&](const at::Tensor& t, int64_t row) {
    return static_cast<char*>(t.mutable_data_ptr()) + row * t.size(-1) * element;
  };
  const int64_t bytes = Scratch::aligned(block * ko * size) + 2 * Scratch::aligned(block * k * size) +
                        Scratch::aligned(block * k2 * size) + Scratch::aligned(block * chunk * 4) +
                        Scratch::aligned(block * chunk * size) + Scratch::aligned(block * n * 4);

  for_each_block(e, rows, [&](int64_t row, int64_t m, Turn) {
    Scratch scratch(bytes);
    const Rows incoming = rows_from(grads.rows, row);
    Left left2 = left_operand(e, m, out, incoming, {}, scratch.take(block * ko * size));
    const Left left = left_operand(e, m, inner, rows_from(middles.rows, row), {},
                                   scratch.take(block * k * size));
    void* t2 = scratch.take(block * k2 * size);
    void* t1 = scratch.take(block * k * size);
    void* grad_h = scratch.take(block * chunk * 4);
    void* part = scratch.take(block * chunk * size);
    float* sum = scratch.take<float>(block * n * 4);
    if (u2) {
      if (k2 != inner2) std::memset(t2, 0, m * k2 * size);
      e.multiply({m, inner2, out, left2.data, left2.stride, into2.data.get(), into2.rows, 0},
                 {t2, k2, e.operand});
      keep_rows(m, inner2, t2, k2, e.operand, grad_middle2, row);
      left2 = {t2, k2};
    }
    for (int64_t first = 0; first == 0 || first < hidden; first += chunk) {
      const int64_t columns = std::min(chunk, hidden - first);
      Finish finish{row_of(grad_pre, row) + first * element, hidden, dtype, b.from(first), act};
      if (v2) {
        e.multiply({m, columns, inner2, left2.data, left2.stride, out_of2.from(e, first),
                    out_of2.rows, 0},
                   {grad_h, chunk, dtype});
        finish.gradient = {grad_h, chunk, dtype};
      } else {
        finish.gradient = {static_cast<const char*>(incoming.data) + first * element,
                           incoming.stride, dtype};
      }
      if (want_hidden) finish.activated = row_of(h, row) + first * element;
      e.multiply({m, columns, inner, left.data, left.stride, up.from(e, first), up.rows, 0}, finish);
      const Left pre = left_operand(e, m, columns, {finish.out, hidden, dtype}, {}, part);
      e.accumulate({m, inner, columns, pre.data, pre.stride, back.data.get(), back.rows, first},
                   sum, n, first > 0);
    }
    e.load(m, inner, {sum, n, Dtype::f32}, t1, k);
    keep_rows(m, inner, t1, k, e.operand, grad_middle, row);
    if (!v) return;
    e.multiply({m, grad_x.size(-1), inner, t1, k, into_x.data.get(), into_x.rows, 0},
               {row_of(grad_x, row), grad_x.size(-1), dtype});
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(adacomcat, m) {
  m.def("row_product_cpu(Tensor a, Tensor b, Tensor? c=None) -> Tensor");
  m.def("weight_gradient_cpu(Tensor a, Tensor b) -> (Tensor, Tensor)");
  m.def(
      "hidden_gradient_cpu(Tensor grad, Tensor middle, Tensor u, Tensor? bias, str? activation, "
      "Tensor? u2, Tensor? v2, Tensor? v, bool want_hidden) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("row_product_cpu", &row_product);
  m.impl("weight_gradient_cpu", &weight_gradient);
  m.impl("hidden_gradient_cpu", &hidden_gradient);
}

}  // namespace adacomcat
