// The truncated SVD of one matrix, as each file in linalg/targets compiles it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

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

// a (rows, columns) with any strides. The results are row-major and dense. The caller owns all memory;
// `workspace` holds svd_workspace() elements and is aligned to 64 bytes.
template <class T>
struct SvdProblem {
  int64_t rows, columns, rank;
  const T* a;
  int64_t row_stride, column_stride;
  T *u, *s, *v;  // (rows, rank), (rank,), (columns, rank); u and v are null if they are not wanted
  T* workspace;
  Workers& workers;
};

// out_of_range: T has no squares of some column, which is far smaller than the largest one but not zero.
// Only float gives up on such a matrix; double counts the column as zero.
enum class SvdStatus { ok, not_finite, not_converged, out_of_range };

// The square of a smaller number would be denormal, or lose digits in sums with denormal squares.
template <class T>
constexpr T kLeastSquare = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();

template <class T>
using SvdKernel = SvdStatus (*)(const SvdProblem<T>&);

// The length of a column of n elements in memory: columns start at multiples of 64 bytes.
template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t step = 64 / sizeof(T);
  return (n + step - 1) / step * step;
}

// Columns that are rotated together: all n of them, or a block if the first cache does not hold all. It
// holds two blocks.
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

// Elements from block to block: its columns, four numbers for each, and a gap. Without the gap the
// hardware would prefetch, at the end of a block, lines of the next, which another thread writes.
template <class T>
constexpr int64_t svd_block_stride(int64_t n) {
  const int64_t block = svd_block<T>(n), gap = block < n ? (8 << 10) / sizeof(T) : 0;
  return block * padded<T>(n) + 4 * padded<T>(block) + gap;
}

// Elements of workspace.
template <class T>
constexpr int64_t svd_workspace(int64_t long_side, int64_t short_side) {
  return svd_blocks<T>(short_side) * svd_block_stride<T>(short_side) +
         2 * short_side * padded<T>(long_side) + (short_side + 4) * padded<T>(short_side);
}

}  // namespace adacomcat
