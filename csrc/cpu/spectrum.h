// Gram matrices and eigenvalues in double, the same code compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace adacomcat {

// Rows of a matrix that are packed and multiplied at a time: with 768 columns they fill half of a
// core's second cache or so.
constexpr int64_t kGramRows = 128;
// Householder reflections that are applied together.
constexpr int64_t kReflections = 32;

// Rows of doubles are aligned to 64 bytes, an odd number of times so: a column then spreads over all
// of a cache's sets.
constexpr int64_t spread(int64_t n) { return ((n + 7) / 8 | 1) * 8; }

// Elements: the matrix with whole vectors of rows, reflections and what they change, and a row or so.
constexpr int64_t eigenvalue_workspace(int64_t n) {
  return spread(n) * ((n + 7) / 8 * 8 + 2 * kReflections + 1) + 2 * kReflections;
}

struct Spectrum {
  int64_t panel;  // columns of a packed panel
  // Panel `index` of a (rows, columns) with strides, rows <= kGramRows, to `packed` (rows, panel).
  void (*pack_float)(int64_t rows, int64_t columns, const float* a, int64_t row, int64_t column,
                     int64_t index, double* packed);
  void (*pack_double)(int64_t rows, int64_t columns, const double* a, int64_t row, int64_t column,
                      int64_t index, double* packed);
  // gram (columns, columns) += what the packed panels give above the diagonal, in columns of panel
  // `index`; panels lie rows * panel elements apart.
  void (*add_products)(int64_t rows, int64_t columns, const double* packed, int64_t index,
                       double* gram);
  // Eigenvalues, in no order, of a symmetric a (n, n), row-major; aligned workspace of
  // eigenvalue_workspace() elements. False where they do not converge.
  bool (*eigenvalues)(int64_t n, const double* a, double* values, double* workspace);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ADACOMCAT_X86_KERNELS 1
namespace avx2 {
extern const Spectrum kSpectrum;
}
namespace avx512 {
extern const Spectrum kSpectrum;
}
#endif

}  // namespace adacomcat
