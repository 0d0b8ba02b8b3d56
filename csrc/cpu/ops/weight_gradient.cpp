// aᵀ b over all rows: the gradient of a weight. The wider factor is packed piece by piece, so the narrower
// one is transposed.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/scratch.h"

namespace adacomcat {
namespace {

// What a thread packs of the wide factor at a time: it stays in the second cache.
constexpr int64_t kPackedRows = 1024;
constexpr int64_t kPackedPanels = 2;

// to (columns, stride) = fromᵀ for from (rows, columns), in squares that fit the first cache.
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

// The transpose of x (rows, k) in the operand format, and below it a row of ones: (k + 1, padded rows).
// The padding is zeros.
std::vector<char> transposed_with_ones(const Engine& e, const Rows& x, int64_t rows, int64_t k) {
  const int64_t size = e.operand_size(), stride = e.padded_k(rows);
  std::vector<char> result((k + 1) * stride * size);
  const std::vector<float> ones(rows, 1.0f);
  e.load(1, rows, {ones.data(), rows, Dtype::f32}, result.data() + k * stride * size, stride);
  const int64_t block = 16 * e.tile_rows;
  parallel_for(0, ceil_div(rows, block), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < std::min(end * block, rows); row += block) {
      const int64_t m = std::min(block, rows - row);
      Scratch scratch({lhs_bytes(e, block, k)});
      const LhsOperand lhs = lhs_operand(e, m, k, rows_from(x, row), {}, scratch.next());
      if (e.operand == Dtype::f32) {
        transpose(m, k, static_cast<const float*>(lhs.data), lhs.stride,
                  reinterpret_cast<float*>(result.data()) + row, stride);
      } else {
        transpose(m, k, static_cast<const uint16_t*>(lhs.data), lhs.stride,
                  reinterpret_cast<uint16_t*>(result.data()) + row, stride);
      }
    }
  });
  return result;
}

// [small, 1]ᵀ large, (n + 1, m), for small (rows, n) and large (rows, m).
Tensor product_over_rows(const Tensor& small, const Tensor& large) {
  const Engine& e = activation_engine(dtype_of(large));
  const int64_t rows = row_count(large), n = small.size(-1) + 1, m = large.size(-1);
  const TensorRows small_rows(small), large_rows(large);
  const Tensor result = empty_beside(large, {n, m});
  const OutputRows out(result);
  const int64_t size = e.operand_size(), stride = e.padded_k(rows);
  const std::vector<char> lhs = transposed_with_ones(e, small_rows.rows, rows, n - 1);
  const int64_t step = kPackedPanels * e.panel_columns();

  parallel_for(0, ceil_div(m, step), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(
        {e.packed_bytes(kPackedRows, step), n * step * static_cast<int64_t>(sizeof(float))});
    void* packed = scratch.next();
    float* sum = scratch.next<float>();
    for (int64_t first = begin * step; first < std::min(end * step, m); first += step) {
      const int64_t columns = std::min(step, m - first);
      for (int64_t row = 0; row == 0 || row < rows; row += kPackedRows) {
        const int64_t k = std::min(kPackedRows, rows - row);
        const Rows from = rows_from(large_rows.rows, row, first);
        e.pack(k, columns, from.data, from.stride, 1, from.dtype, packed, nullptr);
        const Gemm gemm{n, columns, k, lhs.data() + row * size, stride, packed, e.packed_k(k), 0};
        if (row + k < rows) {
          e.accumulate(gemm, sum, step, row > 0);
          continue;
        }
        Epilogue epilogue = out.epilogue(0, first);
        if (row) epilogue.sum = sum, epilogue.sum_stride = step;
        e.multiply(gemm, epilogue);
      }
    }
  });
  return result;
}

// a (..., m), b (..., n) → aᵀ b (m, n), and the sum of a over all rows.
std::tuple<Tensor, Tensor> weight_gradient(const Tensor& a, const Tensor& b) {
  check_like(a, b, "b", with_last(a, b.size(-1)));
  using namespace torch::stable;
  const int64_t m = a.size(-1), n = b.size(-1);
  if (n <= m) {
    Tensor result = product_over_rows(b, a);
    return {transpose(narrow(result, 0, 0, n), 0, 1), select(result, 0, n)};
  }
  Tensor result = product_over_rows(a, b);
  return {narrow(result, 0, 0, m), sum(reshape(a, {row_count(a), m}), Sizes{0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(adacomcat, m) {
  m.def("weight_gradient_cpu(Tensor a, Tensor b) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("weight_gradient_cpu", TORCH_BOX(&weight_gradient));
}

}  // namespace adacomcat
