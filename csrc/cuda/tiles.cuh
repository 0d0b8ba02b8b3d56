// Products of tiles on tensor cores. The next tiles of the operands are copied to shared memory while
// the current ones are multiplied; the sums stay in registers.
//
// float16 and bfloat16 are multiplied as they are. float32 is split into two numbers of 10 bits, and
// three of their four products are summed: the error is that of float32. Infinity gives NaN.
//
// Tensor cores truncate their sums (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA
// tensor cores, 2021), and errors of one sign add up. With float32 they therefore sum one step only;
// steps are added outside of them, rounded to nearest (as Ootomo and Yokota do, 2022). 16-bit results
// are rounded far more coarsely than this error.
#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace adacomcat::cuda {

constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;
constexpr int kColumns = 128;  // columns of a tile of results

__host__ __device__ constexpr int64_t round_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}

// A block computes kRows x kColumns results. With many rows each of its four warps has rows of its own
// and all columns, so that a warp reads its part of the rhs once for 32 rows; with few rows the warps
// share the columns.
template <class T, int rows>
struct Tile {
  static constexpr int kRows = rows;
  static constexpr int kChunk = 16 / sizeof(T);  // elements of 16 bytes
  static constexpr int kStep = 2 * kChunk;       // depth of one instruction
  static constexpr int kDepth = 2 * kStep;       // depth of a tile of operands
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;
  static constexpr int kWarpsDown = rows >= 64 ? 4 : rows / 16;
  static constexpr int kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kWarpRows = rows / kWarpsDown;
  static constexpr int kWarpColumns = kColumns / kWarpsAcross;
  // Distances of rows. Eight consecutive rows start in different banks.
  static constexpr int kPitch = kDepth + kChunk, kWidePitch = kColumns + 8;
  // Elements of the lhs, and of the rhs in either layout.
  static constexpr int kLhs = rows * kPitch, kRhs = kColumns * kPitch;
  static_assert(kDepth * kWidePitch <= kRhs);
  static constexpr int kStage = kLhs + kRhs;
  // Bytes of the results of each warp on their way to global memory.
  static constexpr int kStaging = kWarps * 16 * (kWarpColumns + 8) * sizeof(float);

  using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];
};

// A matrix in global memory. Tiles that reach beyond its edges are filled with zeros.
template <class T>
struct Source {
  const T* data;
  int64_t stride, rows;
  int columns;
  bool chunks;  // 16 bytes may be read at a time

  __device__ Source(const T* data, int64_t stride, int64_t rows, int columns)
      : data(data), stride(stride), rows(rows), columns(columns) {
    constexpr int chunk = 16 / sizeof(T);
    chunks = is_aligned(data) && stride % chunk == 0 && columns % chunk == 0;
  }
  __device__ Source(const Matrix& from, int64_t rows, int columns)
      : Source(static_cast<const T*>(from.data), from.stride, rows, columns) {}
};

// Copies rows x columns elements from (row, column) on; `columns` is a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load_tile(T* to, int pitch, const Source<T>& from, int64_t row,
                                          int column, int rows, int columns) {
  constexpr int chunk = 16 / sizeof(T);
  if (from.chunks) {
    const int across = columns / chunk;
#pragma unroll 1  // addresses of 64 bits would take the registers that sums need
    for (int i = threadIdx.x; i < rows * across; i += kThreads) {
      const int r = i / across, c = i % across * chunk;
      const bool valid = row + r < from.rows && column + c < from.columns;
      const T* source = from.data + (row + r) * from.stride + column + c;
      copy_async(to + r * pitch + c, valid ? source : from.data, valid);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
      const int r = i / columns, c = i % columns;
      const bool valid = row + r < from.rows && column + c < from.columns;
      to[r * pitch + c] =
          valid ? from.data[(row + r) * from.stride + column + c] : from_float<T>(0.0f);
    }
  }
}

// Calls load(step, stage) `stages` - 1 steps ahead of use(step, stage). One barrier per step suffices:
// after it, this stage is loaded, and no thread uses the stage before it any more.
template <int stages, class Load, class Use>
__device__ __forceinline__ void pipeline(int steps, Load load, Use use) {
  __syncthreads();
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) load(step, step);
    commit_copies();
  }
  int stage = 0, next = stages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    if (step + stages - 1 < steps) load(step + stages - 1, next);
    commit_copies();
    use(step, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
    next = next + 1 == stages ? 0 : next + 1;
  }
}

// The operands of one instruction; for float32 also the rest that 10 bits do not hold.
template <class T>
struct Operand {
  uint32_t word[4];

  __device__ __forceinline__ void split() {}
};

template <>
struct Operand<float> {
  uint32_t word[4], rest[4];

  __device__ __forceinline__ void split() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = __uint_as_float(word[i]);
      word[i] = to_tf32(value);
      rest[i] = to_tf32(value - __uint_as_float(word[i]));
    }
  }
};

// sums (16, 8) += lhs · words `first` and `first + 1` of rhs.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const Operand<T>& lhs,
                                             const Operand<T>& rhs, int first) {
  if constexpr (std::is_same_v<T, float>) {
    float step[4] = {};
    multiply_tf32(step, lhs.rest, rhs.word[first], rhs.word[first + 1]);
    multiply_tf32(step, lhs.word, rhs.rest[first], rhs.rest[first + 1]);
    multiply_tf32(step, lhs.word, rhs.word[first], rhs.word[first + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += step[i];
  } else {
    multiply<T>(sums, lhs.word, rhs.word[first], rhs.word[first + 1]);
  }
}

// Where this warp's results lie in the tile.
template <class Tile>
__device__ __forceinline__ int warp_row() {
  return threadIdx.x / kWarp / Tile::kWarpsAcross * Tile::kWarpRows;
}
template <class Tile>
__device__ __forceinline__ int warp_column() {
  return threadIdx.x / kWarp % Tile::kWarpsAcross * Tile::kWarpColumns;
}

// Two adjacent groups of 8 columns of an rhs that is stored by columns of the result, at depth k.
template <class T>
__device__ __forceinline__ Operand<T> rhs_operand(const T* rhs, int pitch, int column, int k) {
  const int lane = threadIdx.x % kWarp, half = lane / 8 % 2, pair = lane / 16;
  Operand<T> operand;
  load_matrices(operand.word,
                rhs + (column + lane % 8 + 8 * pair) * pitch + k + half * (16 / sizeof(T)));
  operand.split();
  return operand;
}

// The same of one that is stored by depth. With float32 lane 4 g + t of the lhs holds depths t and
// t + 4 of a step, or, `chained`, 2 t and 2 t + 1.
template <bool chained, class T>
__device__ __forceinline__ Operand<T> wide_operand(const T* rhs, int pitch, int column, int k) {
  const int lane = threadIdx.x % kWarp;
  Operand<T> operand;
  if constexpr (sizeof(T) == 2) {
    const int row = k + lane % 8 + 8 * (lane / 8 % 2);
    load_transposed(operand.word, rhs + row * pitch + column + 8 * (lane / 16));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = k + (chained ? 2 * (lane % 4) + i % 2 : lane % 4 + i % 2 * 4);
      operand.word[i] = __float_as_uint(rhs[row * pitch + column + 8 * (i / 2) + lane / 4]);
    }
  }
  operand.split();
  return operand;
}

struct AsItIs {
  template <class T>
  __device__ __forceinline__ void operator()(Operand<T>&, int) const {}
};

// sums += lhs · rhs of one warp, for its first row of the lhs and its first column of the rhs, which is
// stored by depth if `wide`. prepare(operand, i) may change the lhs of the i-th 16 rows.
template <bool wide, int down, int groups, class T, class Prepare = AsItIs>
__device__ __forceinline__ void multiply_warp(float (&sums)[down][groups][4], const T* lhs,
                                              int lhs_pitch, const T* rhs, int rhs_pitch,
                                              int depth, Prepare prepare = {}) {
  constexpr int chunk = 16 / sizeof(T);
  const int lane = threadIdx.x % kWarp;
#pragma unroll 2
  for (int k = 0; k < depth; k += 2 * chunk) {
    Operand<T> a[down];
#pragma unroll
    for (int i = 0; i < down; ++i) {
      load_matrices(a[i].word, lhs + (16 * i + lane % 16) * lhs_pitch + k + lane / 16 * chunk);
      prepare(a[i], i);
      a[i].split();
    }
#pragma unroll
    for (int j = 0; j < groups / 2; ++j) {
      const Operand<T> b = wide ? wide_operand<false>(rhs, rhs_pitch, 16 * j, k)
                                : rhs_operand(rhs, rhs_pitch, 16 * j, k);
#pragma unroll
      for (int i = 0; i < down; ++i) {
        multiply_add(sums[i][2 * j], a[i], b, 0);
        multiply_add(sums[i][2 * j + 1], a[i], b, 2);
      }
    }
  }
}

// Stores the sums of 16 rows in rows of 8 groups + 8 floats.
template <int groups>
__device__ __forceinline__ void put_sums(float* to, const float (&sums)[groups][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < groups; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[(lane / 4 + e / 2 * 8) * (8 * groups + 8) + 8 * j + lane % 4 * 2 + e % 2] = sums[j][e];
    }
  }
}

// Adds the elements of 16 bytes of T, from their place in rows that `put_sums` has stored.
template <int chunk>
__device__ __forceinline__ void add_sums(float (&values)[chunk], const float* from) {
#pragma unroll
  for (int i = 0; i < chunk; i += 4) {
    const Words words = load_words(from + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) values[i + e] += __uint_as_float(words.word[e]);
  }
}

// Calls use(row, column, values) for the results of the tile, as many adjacent ones as 16 bytes of T
// hold; adjacent lanes get adjacent columns. Other threads may still use `memory`, kStaging bytes,
// when one arrives here.
template <class Tile, class Use>
__device__ __forceinline__ void drain(const typename Tile::Sums& sums, float* memory, Use use) {
  constexpr int chunk = Tile::kChunk, across = Tile::kWarpColumns / chunk;
  constexpr int pitch = Tile::kWarpColumns + 8;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  float* own = memory + threadIdx.x / kWarp * 16 * pitch;
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
    put_sums(own, sums[i]);
    __syncwarp();
    for (int at = lane; at < 16 * across; at += kWarp) {
      const int row = at / across, column = at % across * chunk;
      float values[chunk] = {};
      add_sums(values, own + row * pitch + column);
      use(warp_row<Tile>() + 16 * i + row, warp_column<Tile>() + column, values);
    }
    if (i + 1 < Tile::kWarpRows / 16) __syncwarp();
  }
}

}  // namespace adacomcat::cuda
