// y = act(x Wᵀ + b) + residual for up to three weights in one launch: the projections of attention, and
// the layers of a dense MLP. A block computes one tile of one y.
#include "blocks.cuh"
#include "grid.cuh"
#include "tiles.cuh"

namespace adacomcat::cuda {
namespace {

__host__ __device__ constexpr int tiles_of(const Projection& projection) {
  return (projection.out + kColumns - 1) / kColumns;
}

template <class T, int rows>
__global__ void __launch_bounds__(kThreads, 1)
    project_kernel(const Projections p, const int tiles) {
  using Tile = cuda::Tile<T, rows>;
  float* const moments = reinterpret_cast<float*>(shared_memory());
  T* const stages = reinterpret_cast<T*>(moments + 2 * rows);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / tiles) * rows;
  int tile = blockIdx.x % tiles;
  const bool second = tile >= tiles_of(p.first);
  if (second) tile -= tiles_of(p.first);
  const bool third = second && tile >= tiles_of(p.second);
  if (third) tile -= tiles_of(p.second);
  const Projection mine = third ? p.third : second ? p.second : p.first;
  const int first = tile * kColumns;
  const Source<T> x(p.x, p.rows, p.in), weight(mine.weight, mine.out, p.in);

  if (p.epsilon >= 0) row_moments<Tile>(moments, x, first_row, p.epsilon);
  const Normalize<Tile> normalize{moments, p.epsilon >= 0};
  typename Tile::Sums sums = {};
  pipeline<Tile::kStages>(
      (p.in + Tile::kDepth - 1) / Tile::kDepth,
      [&](int step, int stage) {
        T* to = stages + stage * Tile::kStage;
        const int k = step * Tile::kDepth;
        load_tile(to, Tile::kPitch, x, first_row, k, Tile::kRows, Tile::kDepth);
        load_tile(to + Tile::kLhs, Tile::kPitch, weight, first, k, kColumns, Tile::kDepth);
      },
      [&](int, int stage) {
        const T* from = stages + stage * Tile::kStage;
        multiply_warp<false>(sums, from + warp_row<Tile>() * Tile::kPitch, Tile::kPitch,
                             from + Tile::kLhs + warp_column<Tile>() * Tile::kPitch, Tile::kPitch,
                             Tile::kDepth, normalize);
      });
  const Epilogue epilogue{p.rows, mine.out, mine.bias, p.activation, p.residual, mine.y};
  drain<Tile>(sums, reinterpret_cast<float*>(stages),
              [&](int row, int column, float (&values)[Tile::kChunk]) {
                epilogue.store<T>(first_row + row, first + column, values);
              });
}

template <class T, int rows>
const char* run(const Projections& p, Stream stream) {
  using Tile = cuda::Tile<T, rows>;
  const int tiles = tiles_of(p.first) + tiles_of(p.second) + tiles_of(p.third);
  const int64_t stages = std::max<int64_t>(Tile::kStages * Tile::kStage * sizeof(T),
                                           Tile::kStaging);
  return launch(project_kernel<T, rows>, row_blocks(p.rows, rows) * tiles, kThreads,
                stages + 2 * rows * sizeof(float), stream, p, tiles);
}

template <class T>
const char* run(const Projections& p, Stream stream) {
  if (takes_large_tile<T>(p.rows)) return run<T, kLargeRows<T>>(p, stream);
  return run<T, kSmallRows<T>>(p, stream);
}

}  // namespace

const char* project(Dtype dtype, const Projections& problem, Stream stream) {
  if (dtype == Dtype::f32) return run<float>(problem, stream);
  return dtype == Dtype::f16 ? run<__half>(problem, stream) : run<__nv_bfloat16>(problem, stream);
}

}  // namespace adacomcat::cuda
