// Gram matrices and eigenvalues in double, as each file in linalg/targets compiles them.
#pragma once

#include <cstdint>

namespace adacomcat {

// Rows of a matrix that are packed and multiplied at a time. With 768 columns they fill about half of a
// core's second cache.
constexpr int64_t kGramRows = 128;
// Householder reflections that are applied together.
constexpr int64_t kReflections = 32;

// The length of a row of n doubles in memory: an odd number of cache lines, so that a column spreads over
// all sets of a cache.
constexpr int64_t spread(int64_t n) { return ((n + 7) / 8 | 1) * 8; }

// Elements of workspace: the matrix padded to whole vectors, v and w of the reflections, and two rows.
constexpr int64_t eigenvalue_workspace(int64_t n) {
  return spread(n) * ((n + 7) / 8 * 8 + 2 * kReflections + 1) + 2 * kReflections;
}

struct Spectrum {
  int64_t panel;  // columns of a packed panel
  // Packs panel `index` of a (rows, columns), rows <= kGramRows, into `packed`, where panel i starts at
  // i * rows * panel.
  void (*pack_float)(int64_t rows, int64_t columns, const float* a, int64_t row, int64_t column,
                     int64_t index, double* packed);
  void (*pack_double)(int64_t rows, int64_t columns, const double* a, int64_t row, int64_t column,
                      int64_t index, double* packed);
  // gram (columns, columns) += aᵀ a of the packed rows: on and above the diagonal, in the columns of panel
  // `index`.
  void (*add_products)(int64_t rows, int64_t columns, const double* packed, int64_t index,
                       double* gram);
  // The eigenvalues, in no order, of a symmetric a (n, n), row-major. `workspace` is aligned and has
  // eigenvalue_workspace() elements. False if the iteration does not converge.
  bool (*eigenvalues)(int64_t n, const double* a, double* values, double* workspace);
};

}  // namespace adacomcat
