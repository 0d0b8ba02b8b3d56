// The interface of the CUDA kernels: raw pointers, sizes and strides in elements, and a stream. Functions
// that launch a kernel return the error's text, or null.
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "../common/dtype.h"

struct CUstream_st;

namespace adacomcat::cuda {

using Stream = CUstream_st*;

// Truncated SVD of `count` matrices of at most 128 x 128; the results are row-major and dense.
template <class T>
struct SvdBatch {
  int64_t count;
  int rows, columns, rank;
  const T* a;
  int64_t batch_stride, row_stride, column_stride;
  T *u, *s, *v;  // (count, rows, rank), (count, rank), (count, columns, rank)
  int* status;   // (count,): SvdStatus
  T* rotations;  // (count, svd_rotations()) of scratch where svd_needs_scratch, else null
};

enum SvdStatus : int { kSvdDone = 0, kSvdNotFinite = 1, kSvdNotConverged = 2 };
constexpr int kSvdMaxSide = 128;

// Bytes of shared memory that one matrix needs at least; and whether its rotations do not fit into the
// `available` bytes beside it, so that they need scratch memory.
int64_t svd_shared_memory(int rows, int columns, int element_size);
bool svd_needs_scratch(int rows, int columns, int element_size, int64_t available);
int64_t svd_rotations(int rows, int columns);

const char* batched_svd(const SvdBatch<float>& problem, Stream stream);
const char* batched_svd(const SvdBatch<double>& problem, Stream stream);

// errors (count, ranks + 1) of s (count, heads, ranks), dense.
const char* truncation_errors(const float* s, float* errors, int64_t count, int64_t heads,
                              int64_t ranks, Stream stream);
const char* truncation_errors(const double* s, double* errors, int64_t count, int64_t heads,
                              int64_t ranks, Stream stream);

// A matrix with dense rows, `stride` elements apart. Null if there is none.
struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;
};

// An epsilon of zero or more puts the layer norm of x in the place of x; this one leaves x as it is.
constexpr float kNoNorm = -1.0f;

// y = act(((x V) * gate) Uᵀ + b) + residual. x (rows, in), V (in, rank), gate (rank,), U (out, rank); y
// (rows, out) and, where it is not null, middle = x V (rows, rank) are dense.
struct LowRankLinear {
  int64_t rows;
  int in, rank, out;
  Matrix x, v, u, residual;
  const void *gate, *bias;
  void *y, *middle;
  Activation activation;
  float epsilon;
};

// Bytes of shared memory that a block needs at least.
int64_t low_rank_linear_shared_memory(Dtype dtype, int rank);
const char* low_rank_linear(Dtype dtype, const LowRankLinear& problem, Stream stream);

// y = (h V2) U2ᵀ + b2 + residual with h = act((x V1) U1ᵀ + b1). x (rows, in), V1 (in, rank1), U1
// (hidden, rank1), V2 (hidden, rank2), U2 (out, rank2); y and, where they are not null, middle1 = x V1
// and middle2 = h V2 are dense. The hidden layer is shared out among `parts` blocks for the same rows;
// where they are several, `partial` is (parts, rows, rank2) of scratch. Where a block does not hold the
// ranks, two layers run, and `layer` is (rows, hidden) of scratch between them.
struct LowRankMlp {
  int64_t rows;
  int in, rank1, hidden, rank2, out;
  Matrix x, v1, u1, v2, u2, residual;
  const void *b1, *b2;
  void *y, *middle1, *middle2, *layer;
  float* partial;
  Activation activation;
  float epsilon;
  int parts;
};

bool low_rank_mlp_fits(Dtype dtype, int rank1, int rank2);
int low_rank_mlp_parts(Dtype dtype, const LowRankMlp& problem);
const char* low_rank_mlp(Dtype dtype, const LowRankMlp& problem, Stream stream);

// y = act(x Wᵀ + b) + residual for up to three weights W (out, in) at once. y (rows, out) is dense.
struct Projection {
  Matrix weight;
  const void* bias = nullptr;
  void* y = nullptr;
  int out = 0;
};
struct Projections {
  int64_t rows;
  int in;
  Matrix x, residual;
  Projection first, second, third;
  Activation activation;
  float epsilon;
};

const char* project(Dtype dtype, const Projections& problem, Stream stream);

// y = act(x W1ᵀ + b1) W2ᵀ + b2 + residual. W1 (hidden, in), W2 (out, hidden); y and `hidden`, (rows,
// hidden) of scratch, are dense.
struct DenseMlp {
  int64_t rows;
  int in, width, out;
  Matrix x, w1, w2, residual;
  const void *b1, *b2;
  void *hidden, *y;
  Activation activation;
  float epsilon;
};

const char* dense_mlp(Dtype dtype, const DenseMlp& problem, Stream stream);

enum class Mask : int { none, boolean, additive };

// y = concat_h[softmax(q_h k_hᵀ · scale + mask) v_h] Woᵀ + bo + residual, with q = x Wqᵀ + bq, k = x Wkᵀ
// and v = x Wvᵀ. x (batch · tokens, in), Wq and Wk (heads · rank_qk, in), Wv (heads · rank_vo, in), Wo
// (out, heads · rank_vo). q, k, v, the context and y are dense; y is the result, the others are scratch
// or results. The mask (batch, heads, tokens, tokens) has any strides, of zero where it is broadcast.
struct LowRankAttention {
  int64_t batch;
  int tokens, in, heads, rank_qk, rank_vo, out;
  float scale, epsilon;
  Matrix x, wq, wk, wv, wo, residual;
  const void *bq, *bo;
  void *q, *k, *v, *context, *y;
  Mask mask_kind;
  const void* mask;
  int64_t mask_strides[4];
};

int64_t low_rank_attention_shared_memory(Dtype dtype, int rank_qk);
const char* low_rank_attention(Dtype dtype, const LowRankAttention& problem, Stream stream);

// Bytes of shared memory that a block may have on the current device.
int64_t shared_memory_limit();

}  // namespace adacomcat::cuda
