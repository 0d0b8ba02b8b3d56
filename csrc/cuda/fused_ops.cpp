// The CUDA kernels of fused ops as ops on tensors: checks of the arguments, scratch memory, launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/arguments.h"
#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace adacomcat::cuda {
namespace {

using Activate = std::optional<std::string>;

// What low_rank_linear and gated_low_rank_linear have in common.
std::tuple<Tensor, Tensor> run_low_rank_linear(const Tensor& x, const Tensor& v,
                                               const OptionalTensor& gate, const Tensor& u,
                                               const OptionalTensor& bias, Activation activation,
                                               const OptionalTensor& residual, float epsilon,
                                               bool keep_intermediates) {
  REQUIRE(x.dim() > 0 && v.dim() == 2 && u.dim() == 2, "x (..., in), v, u matrices expected");
  check_device(x, "x");
  const int64_t in = x.size(-1), rank = v.size(1), out = u.size(0);
  check_like(x, v, "v", {in, rank});
  check_like(x, gate, "gate", {rank});
  check_like(x, u, "u", {out, rank});
  check_like(x, bias, "bias", {out});
  check_like(x, residual, "residual", with_last(x, out));
  check_sizes({in, rank, out});
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_rows(x, out), middle = empty_rows(x, rank, keep_intermediates);
  const int64_t rows = row_count(x);
  if (rows == 0 || (out == 0 && !keep_intermediates)) return {y, middle};
  const Dtype dtype = dtype_of(x);
  check_shared_memory(low_rank_linear_shared_memory(dtype, rank), rank);
  const DenseRows xs(x), vs(v), us(u);
  const MaybeRows residuals(residual);
  const MaybeVector gates(gate), biases(bias);
  const LowRankLinear problem{rows,
                              static_cast<int>(in),
                              static_cast<int>(rank),
                              static_cast<int>(out),
                              matrix_of(xs),
                              matrix_of(vs),
                              matrix_of(us),
                              residuals.matrix(),
                              gates.data(),
                              biases.data(),
                              y.mutable_data_ptr(),
                              data_of(middle),
                              activation,
                              epsilon};
  check_launch(low_rank_linear(dtype, problem, stream_of(x)));
  return {y, middle};
}

std::tuple<Tensor, Tensor> low_rank_linear_cuda(const Tensor& x, const Tensor& v, const Tensor& u,
                                                const OptionalTensor& bias, Activate activation,
                                                const OptionalTensor& residual,
                                                bool keep_intermediates) {
  return run_low_rank_linear(x, v, {}, u, bias, parse_activation(activation), residual, kNoNorm,
                             keep_intermediates);
}

std::tuple<Tensor, Tensor> gated_low_rank_linear_cuda(const Tensor& x, const Tensor& v,
                                                      const Tensor& gate, const Tensor& u,
                                                      const OptionalTensor& bias,
                                                      bool keep_intermediates) {
  return run_low_rank_linear(x, v, gate, u, bias, Activation::none, {}, kNoNorm,
                             keep_intermediates);
}

void check_mlp(const Tensor& x, const Tensor& v1, const Tensor& u1, const OptionalTensor& b1,
               const Tensor& v2, const Tensor& u2, const OptionalTensor& b2,
               const OptionalTensor& residual) {
  REQUIRE(x.dim() > 0 && v1.dim() == 2 && u1.dim() == 2 && v2.dim() == 2 && u2.dim() == 2,
          "x (..., in) and matrices v1, u1, v2, u2 expected");
  check_device(x, "x");
  const int64_t in = x.size(-1), rank1 = v1.size(1), hidden = u1.size(0), rank2 = v2.size(1),
                out = u2.size(0);
  check_like(x, v1, "v1", {in, rank1});
  check_like(x, u1, "u1", {hidden, rank1});
  check_like(x, b1, "b1", {hidden});
  check_like(x, v2, "v2", {hidden, rank2});
  check_like(x, u2, "u2", {out, rank2});
  check_like(x, b2, "b2", {out});
  check_like(x, residual, "residual", with_last(x, out));
  check_sizes({in, rank1, hidden, rank2, out});
}

std::tuple<Tensor, Tensor, Tensor> low_rank_mlp_cuda(
    const Tensor& x, const Tensor& v1, const Tensor& u1, const OptionalTensor& b1, const Tensor& v2,
    const Tensor& u2, const OptionalTensor& b2, Activate activation, std::optional<double> epsilon,
    const OptionalTensor& residual, bool keep_intermediates) {
  check_mlp(x, v1, u1, b1, v2, u2, b2, residual);
  const int64_t rank1 = v1.size(1), rank2 = v2.size(1), out = u2.size(0), rows = row_count(x);
  const DeviceGuard guard(x.get_device_index());
  const Dtype dtype = dtype_of(x);
  const Tensor y = empty_rows(x, out), middle1 = empty_rows(x, rank1, keep_intermediates),
               middle2 = empty_rows(x, rank2, keep_intermediates);
  if (rows == 0 || (out == 0 && !keep_intermediates)) return {y, middle1, middle2};
  const DenseRows xs(x), v1s(v1), u1s(u1), v2s(v2), u2s(u2);
  const MaybeRows residuals(residual);
  const MaybeVector b1s(b1), b2s(b2);
  LowRankMlp problem{rows,
                     static_cast<int>(x.size(-1)),
                     static_cast<int>(rank1),
                     static_cast<int>(u1.size(0)),
                     static_cast<int>(rank2),
                     static_cast<int>(out),
                     matrix_of(xs),
                     matrix_of(v1s),
                     matrix_of(u1s),
                     matrix_of(v2s),
                     matrix_of(u2s),
                     residuals.matrix(),
                     b1s.data(),
                     b2s.data(),
                     y.mutable_data_ptr(),
                     data_of(middle1),
                     data_of(middle2),
                     nullptr,
                     nullptr,
                     parse_activation(activation),
                     epsilon_of(epsilon),
                     1};
  problem.parts = low_rank_mlp_parts(dtype, problem);
  OptionalTensor partial, layer;
  if (!low_rank_mlp_fits(dtype, rank1, rank2)) {
    check_shared_memory(low_rank_linear_shared_memory(dtype, std::max(rank1, rank2)),
                        std::max(rank1, rank2));
    layer = empty_rows(x, u1.size(0));
    problem.layer = layer->mutable_data_ptr();
  }
  if (problem.parts > 1) {
    partial = empty_beside(x, {problem.parts, rows, rank2}, ScalarType::Float);
    problem.partial = partial->mutable_data_ptr<float>();
  }
  check_launch(low_rank_mlp(dtype, problem, stream_of(x)));
  return {y, middle1, middle2};
}

Tensor dense_mlp_cuda(const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                      const OptionalTensor& b2, Activate activation, std::optional<double> epsilon,
                      const OptionalTensor& residual, bool) {
  REQUIRE(x.dim() > 0 && w1.dim() == 2 && w2.dim() == 2, "x (..., in), w1, w2 matrices expected");
  check_device(x, "x");
  const int64_t in = x.size(-1), width = w1.size(0), out = w2.size(0), rows = row_count(x);
  check_like(x, w1, "w1", {width, in});
  check_like(x, b1, "b1", {width});
  check_like(x, w2, "w2", {out, width});
  check_like(x, b2, "b2", {out});
  check_like(x, residual, "residual", with_last(x, out));
  check_sizes({in, width, out});
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_rows(x, out), hidden = empty_rows(x, width);
  if (rows == 0 || out == 0) return y;
  const DenseRows xs(x), w1s(w1), w2s(w2);
  const MaybeRows residuals(residual);
  const MaybeVector b1s(b1), b2s(b2);
  const DenseMlp problem{rows,
                         static_cast<int>(in),
                         static_cast<int>(width),
                         static_cast<int>(out),
                         matrix_of(xs),
                         matrix_of(w1s),
                         matrix_of(w2s),
                         residuals.matrix(),
                         b1s.data(),
                         b2s.data(),
                         hidden.mutable_data_ptr(),
                         y.mutable_data_ptr(),
                         parse_activation(activation),
                         epsilon_of(epsilon)};
  check_launch(dense_mlp(dtype_of(x), problem, stream_of(x)));
  return y;
}

// The mask as the kernel takes it: any strides, of zero where it is broadcast to (B, H, N, N).
void set_mask(LowRankAttention& problem, const OptionalTensor& attn_mask) {
  if (!attn_mask) return;
  const auto strides =
      broadcast_strides(*attn_mask, {problem.batch, problem.heads, problem.tokens, problem.tokens});
  std::copy(strides.begin(), strides.end(), problem.mask_strides);
  problem.mask = attn_mask->const_data_ptr();
  problem.mask_kind = attn_mask->scalar_type() == ScalarType::Bool ? Mask::boolean : Mask::additive;
}

void check_attention(const Tensor& x, const Tensor& wq, const OptionalTensor& bq, const Tensor& wk,
                     const Tensor& wv, const Tensor& wo, const OptionalTensor& bo,
                     int64_t num_heads, const OptionalTensor& attn_mask,
                     const OptionalTensor& residual) {
  REQUIRE(x.dim() == 3 && wq.dim() == 2 && wk.dim() == 2 && wv.dim() == 2 && wo.dim() == 2,
          "x (B, N, d) and matrices wq, wk, wv, wo expected");
  check_device(x, "x");
  const int64_t in = x.size(2), qk = wq.size(0), vo = wv.size(0), out = wo.size(0);
  REQUIRE(num_heads > 0 && qk % num_heads == 0 && vo % num_heads == 0, qk, " and ", vo,
          " rows do not split into ", num_heads, " heads");
  check_like(x, wq, "wq", {qk, in});
  check_like(x, bq, "bq", {qk});
  check_like(x, wk, "wk", {qk, in});
  check_like(x, wv, "wv", {vo, in});
  check_like(x, wo, "wo", {out, vo});
  check_like(x, bo, "bo", {out});
  check_like(x, residual, "residual", with_last(x, out));
  if (attn_mask && attn_mask->scalar_type() != ScalarType::Bool) {
    check_like(x, attn_mask, "attn_mask", attn_mask->sizes());
  }
  check_sizes({x.size(1), in, qk, vo, out});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_attention_cuda(
    const Tensor& x, const Tensor& wq, const OptionalTensor& bq, const Tensor& wk, const Tensor& wv,
    const Tensor& wo, const OptionalTensor& bo, int64_t num_heads, double scale,
    const OptionalTensor& attn_mask, std::optional<double> epsilon, const OptionalTensor& residual,
    bool keep_intermediates) {
  check_attention(x, wq, bq, wk, wv, wo, bo, num_heads, attn_mask, residual);
  const int64_t in = x.size(2), qk = wq.size(0), vo = wv.size(0), out = wo.size(0);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_rows(x, out), q = empty_rows(x, qk), k = empty_rows(x, qk),
               v = empty_rows(x, vo), context = empty_rows(x, vo);
  const auto none = [&] { return empty_rows(x, 0, false); };
  if (row_count(x) && out) {
    const Dtype dtype = dtype_of(x);
    check_shared_memory(low_rank_attention_shared_memory(dtype, qk / num_heads), qk / num_heads);
    const DenseRows xs(x), wqs(wq), wks(wk), wvs(wv), wos(wo);
    const MaybeRows residuals(residual);
    const MaybeVector bqs(bq), bos(bo);
    LowRankAttention problem{x.size(0),
                             static_cast<int>(x.size(1)),
                             static_cast<int>(in),
                             static_cast<int>(num_heads),
                             static_cast<int>(qk / num_heads),
                             static_cast<int>(vo / num_heads),
                             static_cast<int>(out),
                             static_cast<float>(scale),
                             epsilon_of(epsilon),
                             matrix_of(xs),
                             matrix_of(wqs),
                             matrix_of(wks),
                             matrix_of(wvs),
                             matrix_of(wos),
                             residuals.matrix(),
                             bqs.data(),
                             bos.data(),
                             q.mutable_data_ptr(),
                             k.mutable_data_ptr(),
                             v.mutable_data_ptr(),
                             context.mutable_data_ptr(),
                             y.mutable_data_ptr(),
                             Mask::none,
                             nullptr,
                             {}};
    set_mask(problem, attn_mask);
    check_launch(low_rank_attention(dtype, problem, stream_of(x)));
  }
  if (!keep_intermediates) return {y, none(), none(), none(), none()};
  return {y, q, k, v, context};
}

}  // namespace
}  // namespace adacomcat::cuda

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CUDA, m) {
  m.impl("dense_mlp_cuda", TORCH_BOX(&adacomcat::cuda::dense_mlp_cuda));
  m.impl("gated_low_rank_linear_cuda", TORCH_BOX(&adacomcat::cuda::gated_low_rank_linear_cuda));
  m.impl("low_rank_attention_cuda", TORCH_BOX(&adacomcat::cuda::low_rank_attention_cuda));
  m.impl("low_rank_linear_cuda", TORCH_BOX(&adacomcat::cuda::low_rank_linear_cuda));
  m.impl("low_rank_mlp_cuda", TORCH_BOX(&adacomcat::cuda::low_rank_mlp_cuda));
}
