// What the kernels of low-rank layers share: x V of a block's rows into shared memory (`contract`), all
// columns of · Uᵀ from there (`expand`), the moments of a layer norm, and what follows a product.
#pragma once

#include "activations.cuh"
#include "tiles.cuh"

namespace adacomcat::cuda {

// The distance of rows of x V in shared memory: whole tiles of operands, plus 16 bytes to spread over
// the banks.
template <class Tile>
__host__ __device__ constexpr int middle_pitch(int rank) {
  return static_cast<int>(round_up(rank, Tile::kDepth)) + Tile::kChunk;
}

// Mean and 1 / sqrt(variance + epsilon) of a block's rows, one pair a row; eight lanes take a row.
// Each lane sums relative to its first element: E[x²] - E[x]² would cancel where the mean is large
// and the variance small. The barrier of the next pipeline makes the moments visible.
template <class Tile, class T>
__device__ __forceinline__ void row_moments(float* moments, const Source<T>& x, int64_t first_row,
                                            float epsilon) {
  constexpr int lanes = 8, chunk = Tile::kChunk;
  const int lane = threadIdx.x % lanes;
  for (int first = 0; first < Tile::kRows; first += kThreads / lanes) {
    const int row = first + threadIdx.x / lanes;
    const bool inside = row < Tile::kRows && first_row + row < x.rows;
    const T* from = x.data + (inside ? first_row + row : 0) * x.stride;
    const int columns = inside ? x.columns : 0;
    float count = 0, base = 0, sum = 0, squares = 0;
    for (int column = lane * chunk; column < columns; column += lanes * chunk) {
      float values[chunk];
      const int valid = min(columns - column, chunk);
      load_elements(values, from + column, valid);
      if (count == 0) base = values[0];
#pragma unroll
      for (int i = 0; i < chunk; ++i) {
        const float value = i < valid ? values[i] - base : 0.0f;
        sum += value;
        squares += value * value;
      }
      count += valid;
    }
    float mean = count > 0 ? base + sum / count : 0.0f;
    float deviation = count > 0 ? squares - sum * (sum / count) : 0.0f;
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) {  // Chan's formula for two parts
      const float others = __shfl_xor_sync(kWholeWarp, count, step);
      const float apart = __shfl_xor_sync(kWholeWarp, mean, step) - mean;
      const float part = count + others > 0 ? others / (count + others) : 0.0f;
      deviation += __shfl_xor_sync(kWholeWarp, deviation, step) + apart * apart * part * count;
      mean += apart * part;
      count += others;
    }
    if (lane == 0 && row < Tile::kRows) {
      moments[2 * row] = mean;
      const float variance = fmaxf(deviation / max(x.columns, 1), 0.0f);
      moments[2 * row + 1] = 1.0f / sqrtf(variance + epsilon);
    }
  }
}

// (x - mean) scale for the operands of one instruction, of this warp's rows.
template <class Tile>
struct Normalize {
  const float* moments;
  bool wanted;

  template <class T>
  __device__ __forceinline__ void operator()(Operand<T>& x, int i) const {
    if (!wanted) return;
    const int row = warp_row<Tile>() + 16 * i + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mean = moments[2 * (row + 8 * half)], scale = moments[2 * (row + 8 * half) + 1];
#pragma unroll
      for (int w = half; w < 4; w += 2) {
        const Words word{{x.word[w]}};
        if constexpr (sizeof(T) == 2) {
          x.word[w] = pack<T>((element<T>(word, 0) - mean) * scale,
                              (element<T>(word, 1) - mean) * scale);
        } else {
          x.word[w] = __float_as_uint((element<T>(word, 0) - mean) * scale);
        }
      }
    }
  }
};

// What follows a product in a matrix y (rows, columns): y = act(sums + bias) + residual.
struct Epilogue {
  int64_t rows;
  int columns;
  const void* bias;
  Activation activation;
  Matrix residual;
  void* y;

  // For the adjacent columns of y that 16 bytes hold.
  template <class T>
  __device__ __forceinline__ void store(int64_t row, int column,
                                        float (&sums)[16 / sizeof(T)]) const {
    constexpr int chunk = 16 / sizeof(T);
    const int count = min(columns - column, chunk);
    if (row >= rows || count <= 0) return;
    float other[chunk];
    if (bias) {
      load_elements(other, static_cast<const T*>(bias) + column, count);
#pragma unroll
      for (int i = 0; i < chunk; ++i) sums[i] += other[i];
    }
    activate<T, chunk>(sums, activation);
    if (residual.data) {
      load_elements(other, static_cast<const T*>(residual.data) + row * residual.stride + column,
                    count);
#pragma unroll
      for (int i = 0; i < chunk; ++i) sums[i] += other[i];
    }
    store_elements(static_cast<T*>(y) + row * columns + column, sums, count);
  }
};

// middle (kRows, rank) = x V of the block's rows, `middle_pitch` apart and zero beyond the rank.
// keep(row, r, values) may store elements r and on, and change them.
template <class Tile, class T, class Keep>
__device__ __forceinline__ void contract(T* stages, T* middle, const Source<T>& x,
                                         const Source<T>& v, int64_t first_row,
                                         const Normalize<Tile>& normalize, Keep keep) {
  const int rank = v.columns, pitch = middle_pitch<Tile>(rank), padded = pitch - Tile::kChunk;
  for (int first = 0; first < rank; first += kColumns) {
    typename Tile::Sums sums = {};
    pipeline<Tile::kStages>(
        (x.columns + Tile::kDepth - 1) / Tile::kDepth,
        [&](int step, int stage) {
          T* to = stages + stage * Tile::kStage;
          const int k = step * Tile::kDepth;
          load_tile(to, Tile::kPitch, x, first_row, k, Tile::kRows, Tile::kDepth);
          load_tile(to + Tile::kLhs, Tile::kWidePitch, v, k, first, Tile::kDepth, kColumns);
        },
        [&](int, int stage) {
          const T* from = stages + stage * Tile::kStage;
          multiply_warp<true>(sums, from + warp_row<Tile>() * Tile::kPitch, Tile::kPitch,
                              from + Tile::kLhs + warp_column<Tile>(), Tile::kWidePitch,
                              Tile::kDepth, normalize);
        });
    drain<Tile>(sums, reinterpret_cast<float*>(stages),
                [&](int row, int column, float (&values)[Tile::kChunk]) {
                  const int r = first + column;
                  // Zero beyond the rank even where x is infinite.
#pragma unroll
                  for (int i = 0; i < Tile::kChunk; ++i) {
                    if (r + i >= rank) values[i] = 0.0f;
                  }
                  keep(row, r, values);
                  if (r < padded) store_words(middle + row * pitch + r, words_of<T>(values));
                });
  }
}

// Calls use(row, column, values) for middle · Uᵀ in the columns from `begin` to `end`; the middle lies
// as `contract` leaves it. U (columns, rank).
template <class Tile, class T, class Use>
__device__ __forceinline__ void expand(T* stages, const T* middle, const Source<T>& u, int begin,
                                       int end, Use use) {
  const int pitch = middle_pitch<Tile>(u.columns), padded = pitch - Tile::kChunk;
  for (int first = begin; first < end; first += kColumns) {
    typename Tile::Sums sums = {};
    pipeline<Tile::kStages>(
        padded / Tile::kDepth,
        [&](int step, int stage) {
          load_tile(stages + stage * Tile::kRhs, Tile::kPitch, u, first, step * Tile::kDepth,
                    kColumns, Tile::kDepth);
        },
        [&](int step, int stage) {
          multiply_warp<false>(sums, middle + warp_row<Tile>() * pitch + step * Tile::kDepth, pitch,
                               stages + stage * Tile::kRhs + warp_column<Tile>() * Tile::kPitch,
                               Tile::kPitch, Tile::kDepth);
        });
    drain<Tile>(sums, reinterpret_cast<float*>(stages),
                [&](int row, int column, float (&values)[Tile::kChunk]) {
                  use(row, first + column, values);
                });
  }
}

}  // namespace adacomcat::cuda
