// Gram matrices, a (..., m, n) → aᵀ a (..., n, n) in double, and the eigenvalues of symmetric matrices in
// ascending order, a (..., n, n) → (..., n).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/svd.h"
#include "cpu/isa.h"
#include "cpu/linalg/kernels.h"
#include "cpu/threads.h"

namespace adacomcat {
namespace {

const Spectrum& spectrum() {
  const Spectrum* found = instruction_set().linalg->spectrum;
  REQUIRE(found, "there are kernels for AVX2 and AVX512 only");
  return *found;
}

void pack(const Spectrum& with, int64_t rows, int64_t columns, const float* a, int64_t row,
          int64_t column, int64_t index, double* packed) {
  with.pack_float(rows, columns, a, row, column, index, packed);
}

void pack(const Spectrum& with, int64_t rows, int64_t columns, const double* a, int64_t row,
          int64_t column, int64_t index, double* packed) {
  with.pack_double(rows, columns, a, row, column, index, packed);
}

// Copies what is above the diagonal below it.
void mirror(int64_t n, double* gram) {
  constexpr int64_t block = 32;
  for (int64_t top = 0; top < n; top += block) {
    for (int64_t left = 0; left <= top; left += block) {
      for (int64_t i = top; i < std::min(n, top + block); ++i) {
        for (int64_t j = left; j < std::min(i, left + block); ++j)
          gram[i * n + j] = gram[j * n + i];
      }
    }
  }
}

template <class T>
void gram_of_one(int64_t m, int64_t n, const T* a, int64_t row, int64_t column, double* gram) {
  const Spectrum& with = spectrum();
  const int64_t panels = (n + with.panel - 1) / with.panel;
  const int64_t rows = std::min(m, kGramRows);
  const Tensor workspace = empty({rows * panels * with.panel}, ScalarType::Double);
  double* packed = workspace.mutable_data_ptr<double>();
  for (int64_t first = 0; first < m; first += kGramRows) {
    const int64_t count = std::min(kGramRows, m - first);
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pack(with, count, n, a + first * row, row, column, i, packed);
      }
    });
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        // Long and short panels alternate, so that threads get equal shares.
        const int64_t panel = i % 2 ? i / 2 : panels - 1 - i / 2;
        with.add_products(count, n, packed, panel, gram);
      }
    });
  }
  mirror(n, gram);
}

Tensor gram_cpu(const Tensor& a) {
  REQUIRE(a.dim() >= 2, "a must be a matrix or a batch of them, got shape ", a.sizes());
  REQUIRE(a.is_cpu(), "a must be on the CPU, got ", a.device());
  const int64_t m = a.size(-2), n = a.size(-1);
  auto shape = a.sizes().vec();
  shape[shape.size() - 2] = n;
  const Tensor gram = empty(shape, ScalarType::Double);
  double* to = gram.mutable_data_ptr<double>();
  std::fill_n(to, gram.numel(), 0.0);
  if (gram.numel() == 0 || m == 0) return gram;
  const Tensor batch = as_batch(a);
  for_floating(a.scalar_type(), "gram", [&](auto zero) {
    const auto* data = batch.const_data_ptr<decltype(zero)>();
    parallel_for(0, batch.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        gram_of_one(m, n, data + i * batch.stride(0), batch.stride(1), batch.stride(2),
                    to + i * n * n);
      }
    });
  });
  return gram;
}

Tensor eigenvalues_cpu(const Tensor& a) {
  REQUIRE(a.dim() >= 2 && a.size(-1) == a.size(-2), "a must be square, got shape ", a.sizes());
  REQUIRE(a.is_cpu() && a.scalar_type() == ScalarType::Double, "a must be float64 on the CPU, got ",
          a.scalar_type(), " on ", a.device());
  const Spectrum& with = spectrum();
  const int64_t n = a.size(-1);
  const Tensor matrices = torch::stable::contiguous(a);
  const Tensor values = empty_beside(a, a.sizes().slice(0, a.dim() - 1));
  if (values.numel() == 0) return values;
  const double* data = matrices.const_data_ptr<double>();
  double* to = values.mutable_data_ptr<double>();
  std::atomic<bool> finite{true}, converged{true};
  parallel_for(0, values.numel() / n, 1, [&](int64_t begin, int64_t end) {
    const Tensor workspace = empty_beside(a, {eigenvalue_workspace(n)});
    for (int64_t i = begin; i < end; ++i) {
      double* found = to + i * n;
      if (!with.eigenvalues(n, data + i * n * n, found, workspace.mutable_data_ptr<double>())) {
        converged = false;
      }
      if (std::all_of(found, found + n, [](double x) { return std::isfinite(x); })) {
        std::sort(found, found + n);
      } else {
        finite = false;
      }
    }
  });
  REQUIRE_VALUE(finite, "a holds NaN or infinite values; it has no eigenvalues");
  REQUIRE(converged, "the eigenvalues of a matrix did not converge");
  return values;
}

}  // namespace
}  // namespace adacomcat

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("gram_cpu", TORCH_BOX(&adacomcat::gram_cpu));
  m.impl("eigenvalues_cpu", TORCH_BOX(&adacomcat::eigenvalues_cpu));
}
