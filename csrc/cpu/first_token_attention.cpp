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

template <typename T>
void store(const float* from, int64_t k, void* to) {
  for (int64_t j = 0; j < k; ++j) static_cast<T*>(to)[j] = from[j];
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
  const int64_t stride = e.padded_k(d), row_bytes = d * 4, head_bytes = num_heads * row_bytes;
  const Dtype dtype = dtype_of(y);
  const int64_t bytes = Scratch::aligned(tokens * stride * e.operand_size()) +
                        2 * Scratch::aligned(row_bytes) + 2 * Scratch::aligned(head_bytes) +
                        2 * Scratch::aligned(columns_qk * 4) + Scratch::aligned(columns_vo * 4) +
                        Scratch::aligned(num_heads * tokens * 4);

  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      Scratch scratch(bytes);
      const Rows normed{scratch.take(tokens * stride * e.operand_size()), stride, e.operand};
      float* first = scratch.take<float>(row_bytes);
      float* added = scratch.take<float>(row_bytes);
      float* directions = scratch.take<float>(head_bytes);
      float* averages = scratch.take<float>(head_bytes);
      float* query = scratch.take<float>(columns_qk * 4);
      float* bias = scratch.take<float>(columns_qk * 4);
      float* heads = scratch.take<float>(columns_vo * 4);
      float* p = scratch.take<float>(num_heads * tokens * 4);
      const Rows from = rows_from(xs.rows, image * tokens);

      e.normalize(tokens, d, from, static_cast<float>(epsilon), const_cast<void*>(normed.data), stride);
      floats_of(e, normed, d, first);
      e.inner_products(columns_qk, d, qs.rows, 1, first, d, query, columns_qk);
      floats_of(e, bias_q.rows, columns_qk, bias);
      for (int64_t j = 0; j < columns_qk; ++j) query[j] += bias[j];
      for (int64_t h = 0; h < num_heads; ++h) {
        e.weighted_sums(rank_qk, d, rows_from(ks.rows, h * rank_qk), 1, query + h * rank_qk, rank_qk,
                        directions + h * d, d);
      }
      e.inner_products(tokens, d, normed, num_heads, directions, d, p, tokens);
      for (int64_t h = 0; h < num_heads; ++h) softmax(p + h * tokens, tokens, scale);
      e.weighted_sums(tokens, d, normed, num_heads, p, tokens, averages, d);
      for (int64_t h = 0; h < num_heads; ++h) {
        e.inner_products(rank_vo, d, rows_from(vs.rows, h * rank_vo), 1, averages + h * d, d,
                         heads + h * rank_vo, rank_vo);
      }
      e.inner_products(d, columns_vo, os.rows, 1, heads, columns_vo, first, d);
      for (const Rows& row : {bias_o.rows, from}) {
        floats_of(e, row, d, added);
        for (int64_t j = 0; j < d; ++j) first[j] += added[j];
      }
      void* to = static_cast<char*>(y.mutable_data_ptr()) + image * d * dtype_size(dtype);
      if (dtype == Dtype::f32) store<float>(first, d, to);
      if (dtype == Dtype::bf16) store<at::BFloat16>(first, d, to);
      if (dtype == Dtype::f16) store<at::Half>(first, d, to);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("first_token_attention_cpu", &first_token_attention);
}

}  // namespace adacomcat
