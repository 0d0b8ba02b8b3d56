// y = act((x V) Uᵀ + b) + residual, or with a gate ((x V) * gate) Uᵀ + b. A block computes x V of its
// rows once, keeps it in shared memory, and then computes its columns of y: x is read once, not once
// for each tile of y. Where the rows are few, several blocks share the columns of y.
#include "blocks.cuh"
#include "grid.cuh"
#include "tiles.cuh"

namespace adacomcat::cuda {
namespace {

// Bytes of shared memory: the stages of both products or results on their way out, x V, and moments.
template <class T, int rows>
int64_t bytes_of(int rank) {
  using Tile = Tile<T, rows>;
  const int64_t stages = std::max<int64_t>(Tile::kStages * Tile::kStage * sizeof(T),
                                           Tile::kStaging);
  return stages + rows * (middle_pitch<Tile>(rank) * sizeof(T) + 2 * sizeof(float));
}

// Blocks that follow each other share the rows: `sharing` of them, with `columns` of y each.
template <class T, int rows>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_linear_kernel(const LowRankLinear p, const int sharing, const int columns) {
  using Tile = Tile<T, rows>;
  float* const moments = reinterpret_cast<float*>(shared_memory());
  T* const middle = reinterpret_cast<T*>(moments + 2 * rows);
  T* const stages = middle + rows * middle_pitch<Tile>(p.rank);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / sharing) * rows;
  const int share = blockIdx.x % sharing, begin = share * columns;
  const Source<T> x(p.x, p.rows, p.in), v(p.v, p.in, p.rank), u(p.u, p.out, p.rank);

  if (p.epsilon >= 0) row_moments<Tile>(moments, x, first_row, p.epsilon);
  contract<Tile>(stages, middle, x, v, first_row, {moments, p.epsilon >= 0},
                 [&](int row, int r, float (&values)[Tile::kChunk]) {
                   if (p.middle && share == 0 && first_row + row < p.rows && r < p.rank) {
                     T* to = static_cast<T*>(p.middle) + (first_row + row) * p.rank + r;
                     store_elements(to, values, p.rank - r);
                   }
                   if (p.gate && r < p.rank) {
                     float gate[Tile::kChunk];
                     load_elements(gate, static_cast<const T*>(p.gate) + r, p.rank - r);
#pragma unroll
                     for (int i = 0; i < Tile::kChunk; ++i) values[i] *= gate[i];
                   }
                 });
  const Epilogue epilogue{p.rows, p.out, p.bias, p.activation, p.residual, p.y};
  expand<Tile>(stages, middle, u, begin, min(begin + columns, p.out),
               [&](int row, int column, float (&values)[Tile::kChunk]) {
                 epilogue.store<T>(first_row + row, column, values);
               });
}

template <class T, int rows>
const char* run(const LowRankLinear& p, Stream stream) {
  const SharedColumns sharing(p.rows, rows, p.out);
  return launch(low_rank_linear_kernel<T, rows>, row_blocks(p.rows, rows) * sharing.blocks,
                kThreads, bytes_of<T, rows>(p.rank), stream, p, sharing.blocks, sharing.columns);
}

template <class T>
const char* run(const LowRankLinear& p, Stream stream) {
  constexpr int large = kLargeRows<T>;
  if (takes_large_tile<T>(p.rows) && bytes_of<T, large>(p.rank) <= block_shared_memory()) {
    return run<T, large>(p, stream);
  }
  return run<T, kSmallRows<T>>(p, stream);
}

}  // namespace

int64_t low_rank_linear_shared_memory(Dtype dtype, int rank) {
  return dtype == Dtype::f32 ? bytes_of<float, kSmallRows<float>>(rank)
                             : bytes_of<__half, kSmallRows<__half>>(rank);
}

const char* low_rank_linear(Dtype dtype, const LowRankLinear& problem, Stream stream) {
  if (dtype == Dtype::f32) return run<float>(problem, stream);
  return dtype == Dtype::f16 ? run<__half>(problem, stream) : run<__nv_bfloat16>(problem, stream);
}

}  // namespace adacomcat::cuda
