// The class token of x + low_rank_attention(x̂), x̂ the layer norm of x: the last attention of a classifier
// needs no other token. No key and no value is computed. The logits of head h are x̂ (Wk_hᵀ q_h), and its
// values are Wv_h (x̂ᵀ p_h) for the softmax p_h, so each weight meets single vectors only.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cpu/ops/attention.h"
#include "cpu/runtime/gemv.h"
#include "cpu/runtime/scratch.h"

namespace adacomcat {
namespace {

constexpr int64_t kFloat = sizeof(float);

// softmax(scale · row), in place.
void softmax(float* row, int64_t n, float scale) {
  float most = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, row[i] *= scale);
  for (int64_t i = 0; i < n; ++i) sum += row[i] = std::exp(row[i] - most);
  for (int64_t i = 0; i < n; ++i) row[i] /= sum;
}

// One call of the op.
class ClassAttention {
 public:
  ClassAttention(const Tensor& x, const AttentionWeights& w, int64_t num_heads, double scale,
                 double epsilon, const Tensor& y)
      : e(engine(dtype_of(x))), xs(x), qs(w.wq), ks(w.wk), vs(w.wv), os(w.wo), bias_q(w.bq),
        bias_o(w.bo), out(y), tokens(x.size(1)), d(x.size(2)), num_heads(num_heads),
        rank_qk(w.wq.size(0) / num_heads), rank_vo(w.wv.size(0) / num_heads),
        scale(static_cast<float>(scale)), epsilon(static_cast<float>(epsilon)) {}

  // The class token of one image. Threads share out the tokens, then the heads, then the columns of y.
  void attend(int64_t image) const {
    const int64_t columns_vo = num_heads * rank_vo, sum_stride = e.padded_n(d);
    Workspace workspace(
        {lhs_bytes(e, tokens, d), d * kFloat, sum_stride * kFloat, columns_vo * kFloat});
    char* rows = workspace.next<char>();
    float* class_token = workspace.next<float>();
    float* sums = workspace.next<float>();
    float* heads = workspace.next<float>();

    const Rows from = rows_from(xs.rows, image * tokens);
    const Rows normed{rows, e.padded_k(d), e.operand};
    parallel_for(0, tokens, worthwhile_columns(d), [&](int64_t begin, int64_t end) {
      e.normalize(end - begin, d, rows_from(from, begin), epsilon, rows + lhs_bytes(e, begin, d),
                  normed.stride);
    });
    row_to_floats(e, normed, d, class_token);
    parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
      attend_heads(begin, end - begin, normed, class_token, heads + begin * rank_vo);
    });
    for_each_column_share(columns_vo, d, [&](int64_t n, int64_t columns) {
      e.inner_products(columns, columns_vo, rows_from(os.rows, n), 1, heads, columns_vo, sums + n,
                       0);
    });
    Epilogue epilogue = out.epilogue(image);
    epilogue.bias = bias_o.rows;
    epilogue.residual = from;
    apply_epilogue(e, 1, d, sums, sum_stride, epilogue);
  }

 private:
  // The values of `count` heads from `first` on, to `values` (count, rank_vo).
  void attend_heads(int64_t first, int64_t count, const Rows& normed, const float* class_token,
                    float* values) const {
    const int64_t query_bytes = count * rank_qk * kFloat, rows_bytes = count * d * kFloat;
    Scratch scratch({query_bytes, query_bytes, rows_bytes, count * tokens * kFloat, rows_bytes});
    float* queries = scratch.next<float>();
    float* bias = scratch.next<float>();
    float* directions = scratch.next<float>();
    float* p = scratch.next<float>();
    float* averages = scratch.next<float>();

    e.inner_products(count * rank_qk, d, rows_from(qs.rows, first * rank_qk), 1, class_token, d,
                     queries, 0);
    row_to_floats(e, rows_from(bias_q.rows, 0, first * rank_qk), count * rank_qk, bias);
    for (int64_t j = 0; j < count * rank_qk; ++j) queries[j] += bias[j];
    for (int64_t h = 0; h < count; ++h) {
      e.weighted_sums(rank_qk, d, rows_from(ks.rows, (first + h) * rank_qk), 1,
                      queries + h * rank_qk, rank_qk, directions + h * d, d);
    }
    e.inner_products(tokens, d, normed, count, directions, d, p, tokens);
    for (int64_t h = 0; h < count; ++h) softmax(p + h * tokens, tokens, scale);
    e.weighted_sums(tokens, d, normed, count, p, tokens, averages, d);
    for (int64_t h = 0; h < count; ++h) {
      e.inner_products(rank_vo, d, rows_from(vs.rows, (first + h) * rank_vo), 1, averages + h * d,
                       d, values + h * rank_vo, rank_vo);
    }
  }

  const Engine& e;
  const TensorRows xs, qs, ks, vs, os;
  const Bias bias_q, bias_o;
  const OutputRows out;
  const int64_t tokens, d, num_heads, rank_qk, rank_vo;
  const float scale, epsilon;
};

Tensor class_attention(const Tensor& x, const Tensor& wq, const OptionalTensor& bq,
                       const Tensor& wk, const Tensor& wv, const Tensor& wo,
                       const OptionalTensor& bo, int64_t num_heads, double scale, double epsilon) {
  const AttentionWeights weights{wq, wk, wv, wo, bq, bo};
  check_attention(x, weights, num_heads);
  const int64_t images = x.size(0), d = x.size(2);
  REQUIRE(x.size(1) > 0, "x must be (B, N, d) with a token, got ", x.sizes());
  check_like(x, wo, "wo", {d, wv.size(0)});
  const Tensor y = empty_beside(x, {images, 1, d});
  const ClassAttention call(x, weights, num_heads, scale, epsilon, y);
  const auto attend = [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) call.attend(image);
  };
  // Few images go one after the other, each on all threads.
  if (images < thread_count()) {
    attend(0, images);
  } else {
    parallel_for(0, images, 1, attend);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("class_attention_cpu", TORCH_BOX(&class_attention));
}

}  // namespace adacomcat
