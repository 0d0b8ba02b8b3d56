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

// y = act((x V) Uᵀ + b) + residual. x (rows, in), V (in, rank), U (out, rank); y (rows, out) and,
// where it is not null, middle = x V (rows, rank) are dense.
struct LowRankLinear {
  int64_t rows;
  int in, rank, out;
  Matrix x, v, u, residual;
  const void* bias;
  void *y, *middle;
  Activation activation;
};

// Bytes of shared memory that a block needs at least.
int64_t low_rank_linear_shared_memory(Dtype dtype, int rank);
const char* low_rank_linear(Dtype dtype, const LowRankLinear& problem, Stream stream);

// Bytes of shared memory that a block may have on the current device.
int64_t shared_memory_limit();

}  // namespace adacomcat::cuda
