// Truncated SVD of many small matrices: a (..., m, n) → u (..., m, k), s (..., k), v (..., n, k), and
// their singular values alone.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <tuple>

#define ISA plain
#define VECTOR_BYTES 16
#include "batched_svd_core.h"
#include "engine.h"

namespace adacomcat {
namespace {

template <class T>
SvdKernel<T> choose_kernel() {
#ifdef ADACOMCAT_X86_KERNELS
  const std::string_view set = instruction_set();
  if (has_avx512()) return &avx512::batched_svd;
  if (set == "avx2") return &avx2::batched_svd;
#endif
  return [](const SvdProblem<T>& p) { return plain::Svd<T>(p).run(); };
}

void lower(std::atomic<int64_t>& first, int64_t index) {
  int64_t seen = first.load();
  while (index < seen && !first.compare_exchange_weak(seen, index)) {
  }
}

// The threads that a batch leaves idle: inside of a parallel batch these are none.
class IdleThreads final : public Workers {
  void run(int64_t count, void* body, void (*call)(void*, int64_t)) override {
    const auto part = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) call(body, i);
    };
    if (hindered || at::in_parallel_region()) return part(0, count);
    // Where another process has the other core, every barrier waits for its share of time to end.
    // A matrix has dozens of them: once is enough.
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
    Clock::duration own{};
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      const auto start = Clock::now();
      part(first, last);
      if (at::get_thread_num() == 0) own = Clock::now() - start;
    });
    const auto all = Clock::now() - begin;
    hindered = all > 2 * own + std::chrono::milliseconds(1);
  }

  bool hindered = false;
};

// Decomposes all matrices; the first that holds NaN or infinity, and the first that does not
// converge, are named.
template <class T>
void batched_svd_core(const at::Tensor& a, int64_t k, T* u, T* s, T* v) {
  const int64_t rows = a.size(1), columns = a.size(2), count = a.size(0);
  const int64_t size = svd_workspace<T>(std::max(rows, columns), std::min(rows, columns));
  const SvdKernel<T> kernel = choose_kernel<T>();
  const T* data = a.const_data_ptr<T>();
  std::atomic<int64_t> not_finite{count}, not_converged{count};
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor workspace = at::empty({size}, a.options());
    IdleThreads workers;
    for (int64_t i = begin; i < end; ++i) {
      const SvdStatus status = kernel({rows, columns, k, data + i * a.stride(0), a.stride(1),
                                       a.stride(2), u ? u + i * rows * k : nullptr, s + i * k,
                                       v ? v + i * columns * k : nullptr,
                                       workspace.data_ptr<T>(), workers});
      if (status == SvdStatus::not_finite) lower(not_finite, i);
      if (status == SvdStatus::not_converged) lower(not_converged, i);
    }
  });
  TORCH_CHECK_VALUE(not_finite == count, "matrix ", not_finite.load(), " of ", count,
                    " holds NaN or infinite values; it has no singular values");
  TORCH_CHECK(not_converged == count, "the SVD of matrix ", not_converged.load(), " of ", count,
              " did not converge");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batched_svd_cpu(const at::Tensor& a, int64_t k) {
  TORCH_CHECK(a.dim() >= 2, "a must be a matrix or a batch of them, got shape ", a.sizes());
  TORCH_CHECK(a.device().is_cpu(), "a must be on the CPU, got ", a.device());
  const int64_t rows = a.size(-2), columns = a.size(-1);
  TORCH_CHECK(0 <= k && k <= std::min(rows, columns), "k must lie in 0 … ",
              std::min(rows, columns), ", got ", k);
  const auto lead = a.sizes().slice(0, a.dim() - 2);
  auto shape = [&](std::initializer_list<int64_t> last) {
    auto sizes = lead.vec();
    sizes.insert(sizes.end(), last);
    return sizes;
  };
  const at::Tensor u = at::empty(shape({rows, k}), a.options());
  const at::Tensor s = at::empty(shape({k}), a.options());
  const at::Tensor v = at::empty(shape({columns, k}), a.options());
  const at::Tensor batch = a.reshape({c10::multiply_integers(lead), rows, columns});
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "batched_svd", [&] {
    batched_svd_core<scalar_t>(batch, k, u.data_ptr<scalar_t>(), s.data_ptr<scalar_t>(),
                               v.data_ptr<scalar_t>());
  });
  return {u, s, v};
}

// All singular values of a (..., m, n), without vectors.
at::Tensor singular_values_cpu(const at::Tensor& a) {
  TORCH_CHECK(a.dim() >= 2, "a must be a matrix or a batch of them, got shape ", a.sizes());
  TORCH_CHECK(a.device().is_cpu(), "a must be on the CPU, got ", a.device());
  const int64_t rows = a.size(-2), columns = a.size(-1), k = std::min(rows, columns);
  auto shape = a.sizes().slice(0, a.dim() - 2).vec();
  const int64_t count = c10::multiply_integers(shape);
  shape.push_back(k);
  const at::Tensor s = at::empty(shape, a.options());
  const at::Tensor batch = a.reshape({count, rows, columns});
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "singular_values", [&] {
    batched_svd_core<scalar_t>(batch, k, nullptr, s.data_ptr<scalar_t>(), nullptr);
  });
  return s;
}

}  // namespace
}  // namespace adacomcat

TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("batched_svd_cpu", &adacomcat::batched_svd_cpu);
  m.impl("singular_values_cpu", &adacomcat::singular_values_cpu);
}
