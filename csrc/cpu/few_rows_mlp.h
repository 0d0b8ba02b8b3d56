// An MLP of a few rows, by products of single vectors with weights as they lie.
#pragma once

#include "vectors.h"

namespace adacomcat {

// What an MLP's call says beside x and the weights.
struct MlpOptions {
  const OptionalTensor &b1, &b2;
  std::optional<std::string_view> activation;
  std::optional<double> epsilon;
  const OptionalTensor& residual;
};

// The weights of an MLP, not packed; dense ones need neither `in` nor `out`.
struct MlpMatrices {
  std::optional<Matrix> in;
  Matrix up, down;
  std::optional<Matrix> out;
  int64_t inner, hidden, middle;  // columns of in, up, down
};

// Of single rows: every thread takes them through its part of the hidden layer.
inline void by_vectors(const Engine& e, const at::Tensor& x, const MlpMatrices& w,
                       const MlpOptions& options, const at::Tensor& y) {
  const int64_t rows = row_count(x), in = x.size(-1), out = y.size(-1);
  const int64_t middle_stride = e.padded_n(w.middle), out_stride = e.padded_n(out);
  const RowsOf xs(x), rs(options.residual ? *options.residual : x);
  const Bias bias1(options.b1), bias2(options.b2);
  const Activation act = parse_activation(options.activation);
  const int64_t step = worthwhile_columns(w.inner + w.middle), units = ceil_div(w.hidden, step);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t share = std::max<int64_t>(ceil_div(units, threads), 1) * step;
  const int64_t parts = std::max<int64_t>(ceil_div(w.hidden, share), 1);
  const int64_t left_bytes = rows * std::max(in, w.inner) * 4, sum_bytes = rows * middle_stride * 4;
  Workspace workspace(2 * Scratch::aligned(left_bytes) + Scratch::aligned(parts * sum_bytes) +
                      Scratch::aligned(std::max(e.padded_k(in) * e.operand_size(),
                                                rows * out_stride * 4)));
  float* left = reinterpret_cast<float*>(workspace.take(left_bytes));
  float* inner = reinterpret_cast<float*>(workspace.take(left_bytes));
  float* sums = reinterpret_cast<float*>(workspace.take(parts * sum_bytes));
  char* last = workspace.take(0);

  vectors_of(e, rows, in, xs.rows, options.epsilon, last, left);
  if (w.in) {
    for_each_column(in, w.inner, [&](int64_t n, int64_t columns) {
      w.in->multiply(e, rows, left, in, 0, in, n, columns, inner + n, w.inner);
    });
    left = inner;
  }
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t bytes = Scratch::aligned(rows * share * 4);
    Scratch scratch(2 * bytes);
    float* before = scratch.take<float>(bytes);
    float* h = scratch.take<float>(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * share, columns = std::min(share, w.hidden - first);
      w.up.multiply(e, rows, left, w.inner, 0, w.inner, first, columns, before, share);
      finish_sums(e, rows, columns, before, share,
                  {h, share, Dtype::f32, bias1.from(first), act});
      w.down.multiply(e, rows, h, share, first, columns, 0, w.middle,
                      sums + i * rows * middle_stride, middle_stride);
    }
  });
  for (int64_t i = 1; i < parts; ++i) {
    const float* other = sums + i * rows * middle_stride;
    for (int64_t j = 0; j < rows * middle_stride; ++j) sums[j] += other[j];
  }
  float* result = sums;
  if (w.out) {
    result = reinterpret_cast<float*>(last);
    for_each_column(w.middle, out, [&](int64_t n, int64_t columns) {
      w.out->multiply(e, rows, sums, middle_stride, 0, w.middle, n, columns, result + n, out_stride);
    });
  }
  Finish finish{y.mutable_data_ptr(), out, dtype_of(y), bias2.rows};
  if (options.residual) finish.residual = rs.rows;
  finish_sums(e, rows, out, result, out_stride, finish);
}

inline bool are_vectors(const at::Tensor& x) { return row_count(x) <= kMostVectors; }

}  // namespace adacomcat
