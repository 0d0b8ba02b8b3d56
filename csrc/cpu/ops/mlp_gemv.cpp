// The MLP of a few rows: each weight is read once, as it is. Every thread takes all rows through its share
// of the hidden layer.
#include "cpu/ops/mlp.h"
#include "cpu/runtime/scratch.h"

namespace adacomcat {
namespace {

constexpr int64_t kFloat = sizeof(float);

// How the hidden layer is shared out: `parts` shares of `columns` hidden columns, the last one shorter.
struct HiddenShares {
  int64_t columns, parts;

  explicit HiddenShares(const MlpGemvWeights& w) {
    const int64_t step = worthwhile_columns(w.inner + w.middle);
    columns = std::max<int64_t>(ceil_div(ceil_div(w.hidden, step), thread_count()), 1) * step;
    parts = std::max<int64_t>(ceil_div(w.hidden, columns), 1);
  }
};

// sums (rows, stride) = act(lhs · up + b1) · down, over all shares. `sums` has room for a copy of it for
// each share.
void multiply_hidden(const Engine& e, const MlpGemvWeights& w, const HiddenShares& shares,
                     int64_t rows, const float* lhs, const Bias& bias, Activation act, float* sums,
                     int64_t stride) {
  parallel_for(0, shares.parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t share_bytes = rows * shares.columns * kFloat;
    Scratch scratch({share_bytes, share_bytes});
    float* before = scratch.next<float>();
    float* h = scratch.next<float>();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * shares.columns,
                    columns = std::min(shares.columns, w.hidden - first);
      w.up.multiply(e, rows, lhs, w.inner, 0, w.inner, first, columns, before, shares.columns);
      apply_epilogue(e, rows, columns, before, shares.columns,
                     {h, shares.columns, Dtype::f32, rows_from(bias.rows, 0, first), act});
      w.down.multiply(e, rows, h, shares.columns, first, columns, 0, w.middle,
                      sums + i * rows * stride, stride);
    }
  });
  for (int64_t i = 1; i < shares.parts; ++i) {
    const float* other = sums + i * rows * stride;
    for (int64_t j = 0; j < rows * stride; ++j) sums[j] += other[j];
  }
}

}  // namespace

void run_mlp_gemv(const Engine& e, const Tensor& x, const MlpGemvWeights& w,
                  const MlpOptions& options, const Tensor& y) {
  const int64_t rows = row_count(x), in = x.size(-1), out = y.size(-1);
  const int64_t sum_stride = e.padded_n(w.middle), out_stride = e.padded_n(out);
  const TensorRows xs(x), residuals(options.residual ? *options.residual : x);
  const Bias bias1(options.b1), bias2(options.b2);
  const HiddenShares shares(w);
  const int64_t lhs_bytes_of_rows = rows * std::max(in, w.inner) * kFloat;
  Workspace workspace({lhs_bytes_of_rows, lhs_bytes_of_rows,
                       shares.parts * rows * sum_stride * kFloat,
                       std::max(lhs_bytes(e, 1, in), rows * out_stride * kFloat)});
  float* lhs = workspace.next<float>();
  float* inner = workspace.next<float>();
  float* sums = workspace.next<float>();
  float* last = workspace.next<float>();

  rows_to_floats(e, rows, in, xs.rows, options.epsilon, last, lhs);
  if (w.in) {
    for_each_column_share(in, w.inner, [&](int64_t n, int64_t columns) {
      w.in->multiply(e, rows, lhs, in, 0, in, n, columns, inner + n, w.inner);
    });
    lhs = inner;
  }
  multiply_hidden(e, w, shares, rows, lhs, bias1, parse_activation(options.activation), sums,
                  sum_stride);
  if (w.out) {
    for_each_column_share(w.middle, out, [&](int64_t n, int64_t columns) {
      w.out->multiply(e, rows, sums, sum_stride, 0, w.middle, n, columns, last + n, out_stride);
    });
  }
  Epilogue epilogue = OutputRows(y).epilogue(0);
  epilogue.bias = bias2.rows;
  if (options.residual) epilogue.residual = residuals.rows;
  apply_epilogue(e, rows, out, w.out ? last : sums, out_stride, epilogue);
}

}  // namespace adacomcat
