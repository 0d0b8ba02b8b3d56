// The truncated SVD of many small matrices, a (..., m, n) → u (..., m, k), s (..., k), v (..., n, k), and
// their singular values alone.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "common/svd.h"
#include "cpu/isa.h"
#include "cpu/linalg/kernels.h"
#include "cpu/threads.h"

namespace adacomcat {
namespace {

SvdStatus decompose(const LinalgKernels& kernels, const SvdProblem<double>& problem) {
  return kernels.svd_double(problem);
}

// A matrix of floats in double, which has the squares of all floats.
SvdStatus decompose_in_double(const LinalgKernels& kernels, const SvdProblem<float>& p) {
  const int64_t size =
      svd_workspace<double>(std::max(p.rows, p.columns), std::min(p.rows, p.columns));
  const auto memory = [](int64_t count) { return empty({count}, ScalarType::Double); };
  const Tensor a = memory(p.rows * p.columns), workspace = memory(size), s = memory(p.rank),
               u = memory(p.rows * p.rank), v = memory(p.columns * p.rank);
  double* next = a.mutable_data_ptr<double>();
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < p.columns; ++j) *next++ = p.a[i * p.row_stride + j * p.column_stride];
  }
  const SvdStatus status = decompose(
      kernels,
      SvdProblem<double>{p.rows, p.columns, p.rank, a.mutable_data_ptr<double>(), p.columns, 1,
                         p.u ? u.mutable_data_ptr<double>() : nullptr, s.mutable_data_ptr<double>(),
                         p.v ? v.mutable_data_ptr<double>() : nullptr,
                         workspace.mutable_data_ptr<double>(), p.workers});
  const auto store = [](const Tensor& from, float* to) {
    if (to) std::copy_n(from.const_data_ptr<double>(), from.numel(), to);
  };
  store(u, p.u), store(s, p.s), store(v, p.v);
  return status;
}

SvdStatus decompose(const LinalgKernels& kernels, const SvdProblem<float>& problem) {
  const SvdStatus status = kernels.svd_float(problem);
  return status == SvdStatus::out_of_range ? decompose_in_double(kernels, problem) : status;
}

// first = min(first, index)
void lower(std::atomic<int64_t>& first, int64_t index) {
  int64_t seen = first.load();
  while (index < seen && !first.compare_exchange_weak(seen, index)) {
  }
}

// The threads that are idle while one matrix is decomposed: none if its batch is shared out already.
class IdleThreads final : public Workers {
  void run(int64_t count, void* body, void (*call)(void*, int64_t)) override {
    share_out(count, [&](Items& items) {
      for (int64_t i; items.take(i);) call(body, i);
    });
  }
};

// Decomposes all matrices of a (count, rows, columns). u and v are null if they are not wanted.
template <class T>
void decompose_all(const Tensor& a, int64_t k, T* u, T* s, T* v) {
  const int64_t rows = a.size(1), columns = a.size(2), count = a.size(0);
  if (!rows || !columns) return;  // there is nothing to write
  const int64_t size = svd_workspace<T>(std::max(rows, columns), std::min(rows, columns));
  const LinalgKernels& kernels = *instruction_set().linalg;
  const T* data = a.const_data_ptr<T>();
  std::atomic<int64_t> not_finite{count}, not_converged{count};
  share_out(count, [&](Items& items) {
    const Tensor workspace = empty_beside(a, {size});
    IdleThreads workers;
    for (int64_t i; items.take(i);) {
      const SvdProblem<T> problem{rows,
                                  columns,
                                  k,
                                  data + i * a.stride(0),
                                  a.stride(1),
                                  a.stride(2),
                                  u ? u + i * rows * k : nullptr,
                                  s + i * k,
                                  v ? v + i * columns * k : nullptr,
                                  workspace.mutable_data_ptr<T>(),
                                  workers};
      const SvdStatus status = decompose(kernels, problem);
      if (status == SvdStatus::not_finite) lower(not_finite, i);
      if (status == SvdStatus::not_converged) lower(not_converged, i);
    }
  });
  check_svd(count, not_finite, not_converged);
}

void check(const Tensor& a) {
  check_matrices(a);
  REQUIRE(a.is_cpu(), "a must be on the CPU, got ", a.device());
}

std::tuple<Tensor, Tensor, Tensor> batched_svd_cpu(const Tensor& a, int64_t k) {
  check(a);
  const SvdResult result(a, k);
  for_floating(a.scalar_type(), "batched_svd", [&](auto zero) {
    using T = decltype(zero);
    decompose_all<T>(as_batch(a), k, result.u.mutable_data_ptr<T>(), result.s.mutable_data_ptr<T>(),
                     result.v.mutable_data_ptr<T>());
  });
  return {result.u, result.s, result.v};
}

// All singular values of a (..., m, n), without vectors.
Tensor singular_values_cpu(const Tensor& a) {
  check(a);
  const int64_t k = std::min(a.size(-2), a.size(-1));
  const Tensor s = empty_beside(a, join_sizes(a.sizes().slice(0, a.dim() - 2), {k}));
  for_floating(a.scalar_type(), "singular_values", [&](auto zero) {
    using T = decltype(zero);
    decompose_all<T>(as_batch(a), k, nullptr, s.mutable_data_ptr<T>(), nullptr);
  });
  return s;
}

}  // namespace
}  // namespace adacomcat

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("batched_svd_cpu", TORCH_BOX(&adacomcat::batched_svd_cpu));
  m.impl("singular_values_cpu", TORCH_BOX(&adacomcat::singular_values_cpu));
}
