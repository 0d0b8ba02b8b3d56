// Truncated SVD of one matrix, the same code compiled for several instruction sets.
#pragma once

#include <algorithm>
#include <cstdint>

namespace adacomcat {

// Threads that share the work of one matrix.
class Workers {
 public:
  virtual ~Workers() = default;
  // body(i) for i = 0 … count - 1, in any order and on any threads.
  template <class Body>
  void each(int64_t count, Body body) {
    if (count == 1) return body(0);
    run(count, &body, [](void* body, int64_t i) { (*static_cast<Body*>(body))(i); });
  }

 private:
  virtual void run(int64_t count, void* body, void (*call)(void* body, int64_t i)) = 0;
};

// a (rows, columns), row-major with strides; the results are row-major and dense. All memory is the
// caller's; `workspace` holds svd_workspace() elements and is aligned to 64 bytes.
template <class T>
struct SvdProblem {
  int64_t rows, columns, rank;
  const T* a;
  int64_t row_stride, column_stride;
  T *u, *s, *v;  // (rows, rank), (rank,), (columns, rank); no u and v where they are not wanted
  T* workspace;
  Workers& workers;
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

// Columns that are rotated together: all, or where the first cache does not hold them a block, two of
// which it holds.
template <class T>
constexpr int64_t svd_block(int64_t n) {
  constexpr int64_t kMost = 32 << 10, kBlock = 16 << 10;  // bytes
  const int64_t size = padded<T>(n) * sizeof(T), step = padded<T>(1);
  const int64_t block = kBlock / size / step * step;
  return n * size <= kMost || block == 0 ? std::max<int64_t>(n, 1) : block;
}

template <class T>
constexpr int64_t svd_blocks(int64_t n) {
  return (n + svd_block<T>(n) - 1) / svd_block<T>(n);
}

// Elements from block to block: columns, four numbers for each, and a gap, for what the hardware
// fetches ahead at the end of one block would be taken from the thread that has the next.
template <class T>
constexpr int64_t svd_block_stride(int64_t n) {
  const int64_t block = svd_block<T>(n), gap = block < n ? (8 << 10) / sizeof(T) : 0;
  return block * padded<T>(n) + 4 * padded<T>(block) + gap;
}

// `tall` and `narrow` are the larger and the smaller side.
template <class T>
constexpr int64_t svd_workspace(int64_t tall, int64_t narrow) {
  return svd_blocks<T>(narrow) * svd_block_stride<T>(narrow) + 2 * narrow * padded<T>(tall) +
         (narrow + 4) * padded<T>(narrow);
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
