// errors[r] = Σ_h Σ_{i ≥ r} s_hi² of each batch, in float64: one warp walks from the smallest
// singular values to the largest, 32 ranks at a time.
#include "kernels.h"
#include "primitives.cuh"

namespace adacomcat::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 4;

template <class T>
__global__ void __launch_bounds__(kWarp* kWarps)
    truncation_errors_kernel(const T* s, T* errors, int64_t count, int64_t heads, int64_t ranks) {
  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (index >= count) return;
  s += index * heads * ranks;
  errors += index * (ranks + 1);
  double behind = 0;  // the sum over all ranks after these 32
  for (int64_t first = ranks / kWarp * kWarp; first >= 0; first -= kWarp) {
    const int64_t rank = first + lane;
    double sum = 0;
    for (int64_t head = 0; rank < ranks && head < heads; ++head) {
      const double value = s[head * ranks + rank];
      sum += value * value;
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const double other = __shfl_down_sync(kWholeWarp, sum, step);
      if (lane + step < kWarp) sum += other;
    }
    sum += behind;
    if (rank <= ranks) errors[rank] = static_cast<T>(sum);
    behind = __shfl_sync(kWholeWarp, sum, 0);
  }
}

template <class T>
const char* run(const T* s, T* errors, int64_t count, int64_t heads, int64_t ranks, Stream stream) {
  return launch(truncation_errors_kernel<T>, (count + kWarps - 1) / kWarps, kWarp * kWarps, 0,
                stream, s, errors, count, heads, ranks);
}

}  // namespace

const char* truncation_errors(const float* s, float* errors, int64_t count, int64_t heads,
                              int64_t ranks, Stream stream) {
  return run(s, errors, count, heads, ranks, stream);
}
const char* truncation_errors(const double* s, double* errors, int64_t count, int64_t heads,
                              int64_t ranks, Stream stream) {
  return run(s, errors, count, heads, ranks, stream);
}

}  // namespace adacomcat::cuda
