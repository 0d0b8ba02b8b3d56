// The first token of x + low_rank_attention(x̂), without any key or value: its logits are
// x̂ (wk_hᵀ q_h), its values wv_h (x̂ᵀ p_h), so a weight meets single vectors only.
#include <torch/library.h>

#include <cmath>

#include "vectors.h"

namespace adacomcat {
namespace {

// softmax(scale · row), in place.
void softmax(float* row, int64_t n, float scale) {
  float most = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, row[i] *= scale);
  for (int64_t i = 0; i < n; ++i) sum += row[i] = std::exp(row[i] - most);
  for (int64_t i = 0; i < n; ++i) row[i] /= sum;
}

at::Tensor first_token_attention(const at::Tensor& x, const at::Tensor& wq, const OptionalTensor& bq,
                                 const at::Tensor& wk, const at::Tensor& wv, const at::Tensor& wo,
                                 const OptionalTensor& bo, int64_t num_heads, double scale,
                                 double epsilon) {
  TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, "x must be (B, N, d) with a token, got ", x.sizes());
  TORCH_CHECK(wq.dim() == 2 && wv.dim() == 2, "wq and wv must be matrices");
  const int64_t tokens = x.size(1), d = x.size(2), columns_qk = wq.size(0), columns_vo = wv.size(0);
  TORCH_CHECK(num_heads > 0 && columns_qk % num_heads == 0 && columns_vo % num_heads == 0,
              "the rows of wq and wv must split into ", num_heads, " heads");
  check(x, wq, "wq", {columns_qk, d});
  check(x, wk, "wk", {columns_qk, d});
  check(x, wv, "wv", {columns_vo, d});
  check(x, wo, "wo", {d, columns_vo});
  if (bq) check(x, *bq, "bq", {columns_qk});
  if (bo) check(x, *bo, "bo", {d});

  at::Tensor y = at::empty({x.size(0), 1, d}, x.options());
  const Engine& e = engine(dtype_of(x));
  const RowsOf xs(x), qs(wq), ks(wk), vs(wv), os(wo);
  const Bias bias_q(bq), bias_o(bo);
  const int64_t rank_qk = columns_qk / num_heads, rank_vo = columns_vo / num_heads;
  const int64_t stride = e.padded_k(d), normed_row = stride * e.operand_size();
  const int64_t row_stride = e.padded_n(d);  // of floats
  const Dtype dtype = dtype_of(y);

  // Threads share out the rows, then the heads, then the columns of the result.
  const auto attend = [&](int64_t image) {
    Workspace workspace(Scratch::aligned(tokens * normed_row) + 2 * Scratch::aligned(row_stride * 4) +
                        Scratch::aligned(columns_vo * 4));
    char* rows = workspace.take(tokens * normed_row);
    float* first = reinterpret_cast<float*>(workspace.take(row_stride * 4));
    float* sums = reinterpret_cast<float*>(workspace.take(row_stride * 4));
    float* heads = reinterpret_cast<float*>(workspace.take(columns_vo * 4));
    const Rows normed{rows, stride, e.operand}, from = rows_from(xs.rows, image * tokens);

    at::parallel_for(0, tokens, worthwhile_columns(d), [&](int64_t begin, int64_t end) {
      e.normalize(end - begin, d, rows_from(from, begin), static_cast<float>(epsilon),
                  rows + begin * normed_row, stride);
    });
    floats_of(e, normed, d, first);
    at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin, head_bytes = Scratch::aligned(count * d * 4);
      const int64_t query_bytes = Scratch::aligned(count * rank_qk * 4);
      Scratch scratch(2 * head_bytes + 2 * query_bytes + Scratch::aligned(count * tokens * 4));
      float* directions = scratch.take<float>(head_bytes);
      float* averages = scratch.take<float>(head_bytes);
      float* query = scratch.take<float>(query_bytes);
      float* bias = scratch.take<float>(query_bytes);
      float* p = scratch.take<float>(count * tokens * 4);

      e.inner_products(count * rank_qk, d, rows_from(qs.rows, begin * rank_qk), 1, first, d, query, 0);
      floats_of(e, bias_q.from(begin * rank_qk), count * rank_qk, bias);
      for (int64_t j = 0; j < count * rank_qk; ++j) query[j] += bias[j];
      for (int64_t h = 0; h < count; ++h) {
        e.weighted_sums(rank_qk, d, rows_from(ks.rows, (begin + h) * rank_qk), 1, query + h * rank_qk,
                        rank_qk, directions + h * d, d);
      }
      e.inner_products(tokens, d, normed, count, directions, d, p, tokens);
      for (int64_t h = 0; h < count; ++h) softmax(p + h * tokens, tokens, scale);
      e.weighted_sums(tokens, d, normed, count, p, tokens, averages, d);
      for (int64_t h = 0; h < count; ++h) {
        e.inner_products(rank_vo, d, rows_from(vs.rows, (begin + h) * rank_vo), 1, averages + h * d, d,
                         heads + (begin + h) * rank_vo, rank_vo);
      }
    });
    for_each_column(columns_vo, d, [&](int64_t n, int64_t columns) {
      e.inner_products(columns, columns_vo, rows_from(os.rows, n), 1, heads, columns_vo, sums + n, 0);
    });
    Finish finish{static_cast<char*>(y.mutable_data_ptr()) + image * d * dtype_size(dtype), d, dtype,
                  bias_o.rows};
    finish.residual = from;
    finish_sums(e, 1, d, sums, row_stride, finish);
  };
  if (x.size(0) < at::get_num_threads()) {
    for (int64_t image = 0; image < x.size(0); ++image) attend(image);
    return y;
  }
  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) attend(image);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("first_token_attention_cpu", &first_token_attention);
}

}  // namespace adacomcat
