// y = (h V2) U2ᵀ + b2 + residual with h = act((x V1) U1ᵀ + b1).
//
// A block keeps x V1 of its rows in shared memory. It computes the hidden layer some units at a time and
// adds their share to h V2 at once, so the hidden layer is never written. Where the rows are few, the
// hidden units are shared out among several blocks for the same rows: each stores its part of h V2 in
// float32, and a second launch adds the parts in a fixed order and multiplies by U2ᵀ.
//
// More ranks than kColumns in the second layer take several passes over the hidden layer. Ranks whose
// tiles exceed a block's shared memory run as two layers.
#include "blocks.cuh"
#include "chain.cuh"
#include "grid.cuh"
#include "tiles.cuh"

namespace adacomcat::cuda {
namespace {

template <class T, int rows>
struct Mlp {
  using Tile = cuda::Tile<T, rows>;
  // Hidden units of a step: of each warp, and of the warps that share rows.
  static constexpr int kInner = rows >= 64 ? 32 : 16, kHidden = kInner * Tile::kWarpsAcross;
  static constexpr int kStages = 2;

  // Elements of a stage: rows of U1, then rows of V2.
  __host__ __device__ static int stage(int rank1) {
    return kHidden * (middle_pitch<Tile>(rank1) + Tile::kWidePitch);
  }
  // Elements of x V1 and h V2, which takes the place of the former if it is complete in one pass.
  __host__ __device__ static int64_t middles(int rank1, int rank2) {
    const int64_t first = middle_pitch<Tile>(rank1), second = middle_pitch<Tile>(rank2);
    return rows * (rank2 > kColumns ? first + second : first > second ? first : second);
  }
  static int64_t bytes(int rank1, int rank2) {
    const int64_t stages = std::max<int64_t>(
        {Tile::kStages * Tile::kStage * int64_t(sizeof(T)), Tile::kStaging,
         kStages * stage(rank1) * int64_t(sizeof(T)), kChainedStaging});
    return stages + middles(rank1, rank2) * sizeof(T) + 2 * rows * sizeof(float);
  }
};

// Stores the first `count` elements in float32.
template <int chunk>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[chunk], int count) {
#pragma unroll
  for (int i = 0; i < chunk; i += 4) {
    const float four[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
    if (i < count) store_elements(to + i, four, count - i);
  }
}

// sums += act(middle1 U1ᵀ + b1) V2 for hidden units `begin` to `end`, in the ranks from `first` on.
template <class T, int rows>
__device__ __forceinline__ void add_hidden(ChainedSums<Tile<T, rows>>& sums, T* stages,
                                           const T* middle1, const LowRankMlp& p, int begin,
                                           int end, int first) {
  using M = Mlp<T, rows>;
  using Tile = typename M::Tile;
  constexpr int down = Tile::kWarpRows / 16;
  const int pitch = middle_pitch<Tile>(p.rank1), padded = pitch - Tile::kChunk;
  const int columns = min(p.rank2 - first, kColumns), part = warp_part<Tile>();
  const Source<T> u1(p.u1, p.hidden, p.rank1), v2(p.v2, p.hidden, p.rank2);
  pipeline<M::kStages>(
      (end - begin + M::kHidden - 1) / M::kHidden,
      [&](int step, int stage) {
        T* to = stages + stage * M::stage(p.rank1);
        const int unit = begin + step * M::kHidden;
        load_tile(to, pitch, u1, unit, 0, M::kHidden, padded);
        load_tile(to + M::kHidden * pitch, Tile::kWidePitch, v2, unit, first, M::kHidden,
                  (columns + 15) / 16 * 16);
      },
      [&](int step, int stage) {
        const T* from = stages + stage * M::stage(p.rank1);
        float hidden[down][M::kInner / 8][4] = {};
        multiply_warp<false>(hidden, middle1 + warp_row<Tile>() * pitch, pitch,
                             from + part * M::kInner * pitch, pitch, padded);
        const int unit = begin + step * M::kHidden + part * M::kInner + threadIdx.x % 4 * 2;
#pragma unroll
        for (int at = 0; at < M::kInner / 4; ++at) {
          const int column = unit + at / 2 * 8 + at % 2;
          const bool there = p.b1 && column < p.hidden;
          const float bias = there ? to_float(static_cast<const T*>(p.b1)[column]) : 0.0f;
#pragma unroll
          for (int i = 0; i < down; ++i) {
            hidden[i][at / 2][at % 2] += bias;
            hidden[i][at / 2][at % 2 + 2] += bias;
          }
        }
        activate<T, down * M::kInner / 2>(&hidden[0][0][0], p.activation);
        multiply_chained(sums, hidden,
                         from + M::kHidden * pitch + part * M::kInner * Tile::kWidePitch,
                         Tile::kWidePitch, columns);
      });
}

// Blocks that follow each other share the rows: p.parts of them, with `units` of the hidden layer each.
template <class T, int rows>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_mlp_kernel(const LowRankMlp p, const int units) {
  using M = Mlp<T, rows>;
  using Tile = typename M::Tile;
  float* const moments = reinterpret_cast<float*>(shared_memory());
  T* const middle1 = reinterpret_cast<T*>(moments + 2 * rows);
  T* const stages = middle1 + M::middles(p.rank1, p.rank2);
  const int pitch1 = middle_pitch<Tile>(p.rank1), pitch2 = middle_pitch<Tile>(p.rank2);
  T* const middle2 = middle1 + (p.rank2 > kColumns ? rows * pitch1 : 0);
  const int part = blockIdx.x % p.parts, begin = part * units;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / p.parts) * rows;
  const Source<T> x(p.x, p.rows, p.in), v1(p.v1, p.in, p.rank1), u2(p.u2, p.out, p.rank2);

  if (p.epsilon >= 0) row_moments<Tile>(moments, x, first_row, p.epsilon);
  contract<Tile>(stages, middle1, x, v1, first_row, {moments, p.epsilon >= 0},
                 [&](int row, int r, const float (&values)[Tile::kChunk]) {
                   if (!p.middle1 || part > 0 || first_row + row >= p.rows) return;
                   T* to = static_cast<T*>(p.middle1) + (first_row + row) * p.rank1 + r;
                   store_elements(to, values, p.rank1 - r);
                 });
  for (int first = 0; first < p.rank2; first += kColumns) {
    ChainedSums<Tile> sums = {};
    add_hidden<T, rows>(sums, stages, middle1, p, begin, min(begin + units, p.hidden), first);
    drain_chained<Tile>(
        sums, reinterpret_cast<float*>(stages),
        [&](int row, int column, float (&values)[Tile::kChunk]) {
          const int r = first + column, left = p.rank2 - r;
          const int64_t m = first_row + row;
          if (p.parts > 1) {
            if (m < p.rows) store_floats(p.partial + (part * p.rows + m) * p.rank2 + r, values, left);
            return;
          }
          // Zero beyond the rank even where the hidden layer is infinite.
#pragma unroll
          for (int i = 0; i < Tile::kChunk; ++i) {
            if (i >= left) values[i] = 0.0f;
          }
          if (p.middle2 && m < p.rows) {
            store_elements(static_cast<T*>(p.middle2) + m * p.rank2 + r, values, left);
          }
          if (r < pitch2 - Tile::kChunk) {
            store_words(middle2 + row * pitch2 + r, words_of<T>(values));
          }
        });
  }
  if (p.parts > 1) return;
  const Epilogue epilogue{p.rows, p.out, p.b2, Activation::none, p.residual, p.y};
  expand<Tile>(stages, middle2, u2, 0, p.out,
               [&](int row, int column, float (&values)[Tile::kChunk]) {
                 epilogue.store<T>(first_row + row, column, values);
               });
}

// y = (Σ partial) U2ᵀ + b2 + residual. `sharing` blocks share rows, with `columns` of y each.
template <class T, int rows>
__global__ void __launch_bounds__(kThreads, 1)
    expand_parts_kernel(const LowRankMlp p, const int sharing, const int columns) {
  using Tile = cuda::Tile<T, rows>;
  T* const middle = reinterpret_cast<T*>(shared_memory());
  const int pitch = middle_pitch<Tile>(p.rank2), across = pitch / Tile::kChunk - 1;
  T* const stages = middle + rows * pitch;
  const int share = blockIdx.x % sharing, begin = share * columns;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / sharing) * rows;
  const Source<T> u2(p.u2, p.out, p.rank2);

  for (int at = threadIdx.x; at < rows * across; at += kThreads) {
    const int row = at / across, r = at % across * Tile::kChunk;
    const int64_t m = first_row + row;
    const int count = m < p.rows ? p.rank2 - r : 0;
    float values[Tile::kChunk] = {};
#pragma unroll 4
    for (int part = 0; part < p.parts; ++part) {
      const float* from = p.partial + (part * p.rows + m) * p.rank2 + r;
#pragma unroll
      for (int i = 0; i < Tile::kChunk; i += 4) {
        float four[4];
        load_elements(four, from + i, count - i);
#pragma unroll
        for (int e = 0; e < 4; ++e) values[i + e] += four[e];
      }
    }
    if (p.middle2 && share == 0) {
      store_elements(static_cast<T*>(p.middle2) + m * p.rank2 + r, values, count);
    }
    store_words(middle + row * pitch + r, words_of<T>(values));
  }
  const Epilogue epilogue{p.rows, p.out, p.b2, Activation::none, p.residual, p.y};
  expand<Tile>(stages, middle, u2, begin, min(begin + columns, p.out),
               [&](int row, int column, float (&values)[Tile::kChunk]) {
                 epilogue.store<T>(first_row + row, column, values);
               });
}

// Units of the hidden layer, whole steps, of each of the blocks that share rows.
template <class T, int rows>
int units_per_block(const LowRankMlp& p) {
  constexpr int step = Mlp<T, rows>::kHidden;
  const int64_t steps = (p.hidden + step - 1) / step;
  const int64_t most = pieces_per_block(steps, blocks_for_rows(p.rows, rows, steps));
  return static_cast<int>(std::max<int64_t>(most, 1) * step);
}

template <class T, int rows>
int parts(const LowRankMlp& p) {
  const int units = units_per_block<T, rows>(p);
  return std::max((p.hidden + units - 1) / units, 1);
}

template <class T>
bool is_large(const LowRankMlp& p) {
  return takes_large_tile<T>(p.rows) &&
         Mlp<T, kLargeRows<T>>::bytes(p.rank1, p.rank2) <= block_shared_memory();
}

template <class T>
int parts(const LowRankMlp& p) {
  return is_large<T>(p) ? parts<T, kLargeRows<T>>(p) : parts<T, kSmallRows<T>>(p);
}

template <class T>
const char* run_second(const LowRankMlp& p, Stream stream) {
  constexpr int rows = kSmallRows<T>;
  using Tile = cuda::Tile<T, rows>;
  const SharedColumns sharing(p.rows, rows, p.out);
  const int64_t stages = std::max<int64_t>(Tile::kStages * Tile::kStage * sizeof(T),
                                           Tile::kStaging);
  const int64_t bytes = stages + rows * middle_pitch<Tile>(p.rank2) * sizeof(T);
  return launch(expand_parts_kernel<T, rows>, row_blocks(p.rows, rows) * sharing.blocks, kThreads,
                bytes, stream, p, sharing.blocks, sharing.columns);
}

template <class T, int rows>
const char* run(const LowRankMlp& p, Stream stream) {
  const char* error =
      launch(low_rank_mlp_kernel<T, rows>, row_blocks(p.rows, rows) * p.parts, kThreads,
             Mlp<T, rows>::bytes(p.rank1, p.rank2), stream, p, units_per_block<T, rows>(p));
  return error || p.parts == 1 ? error : run_second<T>(p, stream);
}

template <class T>
const char* run(const LowRankMlp& p, Stream stream) {
  return is_large<T>(p) ? run<T, kLargeRows<T>>(p, stream) : run<T, kSmallRows<T>>(p, stream);
}

// Ranks that no block holds: the hidden layer goes to memory and comes back.
const char* run_layers(Dtype dtype, const LowRankMlp& p, Stream stream) {
  const char* error = low_rank_linear(
      dtype,
      {p.rows, p.in, p.rank1, p.hidden, p.x, p.v1, p.u1, {}, nullptr, p.b1, p.layer, p.middle1,
       p.activation, p.epsilon},
      stream);
  if (error) return error;
  return low_rank_linear(dtype,
                         {p.rows, p.hidden, p.rank2, p.out, {p.layer, p.hidden}, p.v2, p.u2,
                          p.residual, nullptr, p.b2, p.y, p.middle2, Activation::none, kNoNorm},
                         stream);
}

}  // namespace

bool low_rank_mlp_fits(Dtype dtype, int rank1, int rank2) {
  const int64_t bytes = dtype == Dtype::f32 ? Mlp<float, kSmallRows<float>>::bytes(rank1, rank2)
                                            : Mlp<__half, kSmallRows<__half>>::bytes(rank1, rank2);
  return bytes <= block_shared_memory();
}

int low_rank_mlp_parts(Dtype dtype, const LowRankMlp& p) {
  if (!low_rank_mlp_fits(dtype, p.rank1, p.rank2)) return 1;
  return dtype == Dtype::f32 ? parts<float>(p) : parts<__half>(p);
}

const char* low_rank_mlp(Dtype dtype, const LowRankMlp& p, Stream stream) {
  if (!low_rank_mlp_fits(dtype, p.rank1, p.rank2)) return run_layers(dtype, p, stream);
  if (dtype == Dtype::f32) return run<float>(p, stream);
  return dtype == Dtype::f16 ? run<__half>(p, stream) : run<__nv_bfloat16>(p, stream);
}

}  // namespace adacomcat::cuda
