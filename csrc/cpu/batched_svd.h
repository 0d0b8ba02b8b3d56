// Truncated SVD of one matrix, the same code compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace adacomcat {

// a (rows, columns), row-major with strides; the results are row-major and dense. All memory is the
// caller's; `workspace` holds svd_workspace() elements and is aligned to 64 bytes.
template <class T>
struct SvdProblem {
  int64_t rows, columns, rank;
  const T* a;
  int64_t row_stride, column_stride;
  T *u, *s, *v;  // (rows, rank), (rank,), (columns, rank); no u and v where they are not wanted
  T* workspace;
};

enum class SvdStatus { ok, not_finite, not_converged };

template <class T>
using SvdKernel = SvdStatus (*)(const SvdProblem<T>&);

// Columns start at multiples of 64 bytes.
template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t step = 64 / sizeof(T);
  return (n + step - 1) / step * step;
}

// `tall` and `narrow` are the larger and the smaller side.
template <class T>
constexpr int64_t svd_workspace(int64_t tall, int64_t narrow) {
  return narrow * 2 * (padded<T>(tall) + padded<T>(narrow)) + 7 * padded<T>(narrow);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADACOMCAT_X86_KERNELS 1
namespace avx2 {
SvdStatus batched_svd(const SvdProblem<float>&);
SvdStatus batched_svd(const SvdProblem<double>&);
}  // namespace avx2
namespace avx512 {
SvdStatus batched_svd(const SvdProblem<float>&);
SvdStatus batched_svd(const SvdProblem<double>&);
}  // namespace avx512
#endif

}  // namespace adacomcat
