// y = act((x V) Uᵀ + b) + residual. A block computes x V of its rows once, keeps it in shared memory,
// and then computes all columns of y: x is read once, not once for each tile of y.
#include "tiles.cuh"

namespace adacomcat::cuda {
namespace {

// With fewer blocks than these, the small tile uses more of the GPU than the large one.
constexpr int64_t kEnoughBlocks = 128;
constexpr int kSmallRows = 16;
template <class T>
constexpr int kLargeRows = sizeof(T) == 2 ? 64 : 32;

// The distance of rows of x V: whole tiles of operands, plus 16 bytes to spread over the banks.
template <class Tile>
__host__ __device__ constexpr int64_t middle_pitch(int rank) {
  return (rank + Tile::kDepth - 1) / Tile::kDepth * Tile::kDepth + Tile::kChunk;
}

template <class T, int rows>
int64_t bytes_of(int rank) {
  using Tile = Tile<T, rows>;
  return (2 * Tile::kStage + rows * middle_pitch<Tile>(rank)) * sizeof(T);
}

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::silu:
      return x / (1.0f + expf(-x));
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;  // NaN stays
    default:
      return x;
  }
}

template <class T, int rows>
__global__ void __launch_bounds__(kThreads, 1) low_rank_linear_kernel(const LowRankLinear p) {
  using Tile = Tile<T, rows>;
  T* const stages = reinterpret_cast<T*>(shared_memory());
  T* const middle = stages + 2 * Tile::kStage;
  float* const staging = reinterpret_cast<float*>(stages);
  const int pitch = middle_pitch<Tile>(p.rank), padded = pitch - Tile::kChunk;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows;
  const Source<T> x(p.x, p.rows, p.in), v(p.v, p.in, p.rank), u(p.u, p.out, p.rank);

  for (int first = 0; first < p.rank; first += kColumns) {
    typename Tile::Sums sums = {};
    pipeline((p.in + Tile::kDepth - 1) / Tile::kDepth,
             [&](int step, int stage) {
               T* to = stages + stage * Tile::kStage;
               load_tile<rows, Tile::kDepth>(to, Tile::kPitch, x, first_row, step * Tile::kDepth);
               load_tile<Tile::kDepth, kColumns>(to + Tile::kLhs, Tile::kWidePitch, v,
                                                 step * Tile::kDepth, first);
             },
             [&](int, int stage) {
               const T* from = stages + stage * Tile::kStage;
               multiply_tiles<Tile, true>(sums, from, Tile::kPitch, from + Tile::kLhs);
             });
    drain<Tile>(sums, staging, [&](int row, int column, float sum) {
      const int r = first + column;
      // Zero beyond the rank even where x is infinite.
      const T value = from_float<T>(r < p.rank ? sum : 0.0f);
      if (r < padded) middle[row * pitch + r] = value;
      if (p.middle && first_row + row < p.rows && r < p.rank) {
        static_cast<T*>(p.middle)[(first_row + row) * p.rank + r] = value;
      }
    });
  }

  for (int first = 0; first < p.out; first += kColumns) {
    typename Tile::Sums sums = {};
    pipeline(
        padded / Tile::kDepth,
        [&](int step, int stage) {
          load_tile<kColumns, Tile::kDepth>(stages + stage * Tile::kStage + Tile::kLhs,
                                            Tile::kPitch, u, first, step * Tile::kDepth);
        },
        [&](int step, int stage) {
          multiply_tiles<Tile, false>(sums, middle + step * Tile::kDepth, pitch,
                                      stages + stage * Tile::kStage + Tile::kLhs);
        });
    drain<Tile>(sums, staging, [&](int row, int column, float sum) {
      const int64_t m = first_row + row;
      const int n = first + column;
      if (m >= p.rows || n >= p.out) return;
      if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
      sum = activate(sum, p.activation);
      if (p.residual.data) {
        sum += to_float(static_cast<const T*>(p.residual.data)[m * p.residual.stride + n]);
      }
      static_cast<T*>(p.y)[m * p.out + n] = from_float<T>(sum);
    });
  }
}

template <class T, int rows>
const char* run(const LowRankLinear& p, Stream stream) {
  return launch(low_rank_linear_kernel<T, rows>, (p.rows + rows - 1) / rows, kThreads,
                bytes_of<T, rows>(p.rank), stream, p);
}

template <class T>
const char* run(const LowRankLinear& p, Stream stream) {
  constexpr int large = kLargeRows<T>;
  const bool enough = p.rows >= large * kEnoughBlocks;
  if (enough && bytes_of<T, large>(p.rank) <= block_shared_memory()) {
    return run<T, large>(p, stream);
  }
  return run<T, kSmallRows>(p, stream);
}

}  // namespace

int64_t low_rank_linear_shared_memory(Dtype dtype, int rank) {
  return dtype == Dtype::f32 ? bytes_of<float, kSmallRows>(rank)
                             : bytes_of<__half, kSmallRows>(rank);
}

const char* low_rank_linear(Dtype dtype, const LowRankLinear& problem, Stream stream) {
  if (dtype == Dtype::f32) return run<float>(problem, stream);
  return dtype == Dtype::f16 ? run<__half>(problem, stream) : run<__nv_bfloat16>(problem, stream);
}

}  // namespace adacomcat::cuda
