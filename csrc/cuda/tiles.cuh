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

// A block computes kRows x kColumns results. Each of its four warps computes a part of them.
template <class T, int rows>
struct Tile {
  static constexpr int kRows = rows;
  static constexpr int kChunk = 16 / sizeof(T);  // elements of 16 bytes
  static constexpr int kStep = 2 * kChunk;       // depth of one instruction
  static constexpr int kDepth = 2 * kStep;       // depth of a tile of operands
  static constexpr int kWarpRows = rows < 32 ? 16 : 32;
  static constexpr int kWarpsAcross = kWarps / (rows / kWarpRows);
  static constexpr int kWarpColumns = kColumns / kWarpsAcross;
  // Distances of rows. Eight consecutive rows start in different banks.
  static constexpr int kPitch = kDepth + kChunk, kWidePitch = kColumns + 8;
  // Elements of the lhs, and of the rhs in either layout.
  static constexpr int kLhs = rows * kPitch, kRhs = kColumns * kPitch;
  static_assert(kDepth * kWidePitch <= kRhs);
  static constexpr int kStage = kLhs + kRhs;
  // Results of each warp on their way to global memory.
  static constexpr int kOutPitch = kWarpColumns + 8, kOut = 16 * kOutPitch;
  static_assert(kWarps * kOut * sizeof(float) <= 2 * kStage * sizeof(T));

  using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];
};

// A matrix in global memory. Tiles that reach beyond its edges are filled with zeros.
template <class T>
struct Source {
  const T* data;
  int64_t stride, rows;
  int columns;
  bool chunks;  // 16 bytes may be read at a time

  __device__ Source(const Matrix& from, int64_t rows, int columns)
      : data(static_cast<const T*>(from.data)), stride(from.stride), rows(rows), columns(columns) {
    constexpr int chunk = 16 / sizeof(T);
    chunks =
        reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % chunk == 0 && columns % chunk == 0;
  }
};

template <int rows, int columns, class T>
__device__ __forceinline__ void load_tile(T* to, int pitch, const Source<T>& from, int64_t row,
                                          int column) {
  constexpr int chunk = 16 / sizeof(T), across = columns / chunk;
  if (from.chunks) {
    for (int i = threadIdx.x; i < rows * across; i += kThreads) {
      const int r = i / across, c = i % across * chunk;
      const bool valid = row + r < from.rows && column + c < from.columns;
      const T* source = from.data + (row + r) * from.stride + column + c;
      copy_async(to + r * pitch + c, valid ? source : from.data, valid);
    }
  } else {
    for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
      const int r = i / columns, c = i % columns;
      const bool valid = row + r < from.rows && column + c < from.columns;
      to[r * pitch + c] =
          valid ? from.data[(row + r) * from.stride + column + c] : from_float<T>(0.0f);
    }
  }
}

// Calls load(step, stage) one step ahead of use(step, stage). One barrier per step suffices: after it,
// this stage is loaded, and no thread uses the other stage any more.
template <class Load, class Use>
__device__ __forceinline__ void pipeline(int steps, Load load, Use use) {
  __syncthreads();
  if (steps > 0) load(0, 0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();
    if (step + 1 < steps) load(step + 1, (step + 1) % 2);
    commit_copies();
    use(step, step % 2);
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

// Two adjacent groups of 8 columns of the rhs at depth k. The rhs is stored by columns of the result, or,
// if `wide`, by depth.
template <class Tile, class T>
__device__ __forceinline__ Operand<T> rhs_operand(const T* rhs, bool wide, int column, int k) {
  const int lane = threadIdx.x % kWarp, half = lane / 8 % 2, pair = lane / 16;
  Operand<T> operand;
  if (!wide) {
    const int row = column + lane % 8 + 8 * pair;
    load_matrices(operand.word, rhs + row * Tile::kPitch + k + half * Tile::kChunk);
  } else if constexpr (sizeof(T) == 2) {
    const int row = k + lane % 8 + 8 * half;
    load_transposed(operand.word, rhs + row * Tile::kWidePitch + column + 8 * pair);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = k + lane % 4 + i % 2 * 4;
      operand.word[i] =
          __float_as_uint(rhs[row * Tile::kWidePitch + column + 8 * (i / 2) + lane / 4]);
    }
  }
  operand.split();
  return operand;
}

// sums += lhs (kRows, kDepth) · rhs (kDepth, kColumns)
template <class Tile, bool wide, class T>
__device__ __forceinline__ void multiply_tiles(typename Tile::Sums& sums, const T* lhs, int pitch,
                                               const T* rhs) {
  constexpr int down = Tile::kWarpRows / 16, across = Tile::kWarpColumns / 16;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < Tile::kDepth; k += Tile::kStep) {
    Operand<T> a[down];
#pragma unroll
    for (int i = 0; i < down; ++i) {
      const int row = warp_row<Tile>() + 16 * i + lane % 16;
      load_matrices(a[i].word, lhs + row * pitch + k + lane / 16 * Tile::kChunk);
      a[i].split();
    }
#pragma unroll
    for (int j = 0; j < across; ++j) {
      const Operand<T> b = rhs_operand<Tile>(rhs, wide, warp_column<Tile>() + 16 * j, k);
#pragma unroll
      for (int i = 0; i < down; ++i) {
        multiply_add(sums[i][2 * j], a[i], b, 0);
        multiply_add(sums[i][2 * j + 1], a[i], b, 2);
      }
    }
  }
}

// Calls use(row, column, sum) for every result of the tile; adjacent lanes get adjacent columns. Other
// threads may still use `memory` when one arrives here.
template <class Tile, class Use>
__device__ __forceinline__ void drain(const typename Tile::Sums& sums, float* memory, Use use) {
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  float* own = memory + threadIdx.x / kWarp * Tile::kOut;
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        own[(lane / 4 + e / 2 * 8) * Tile::kOutPitch + 8 * j + lane % 4 * 2 + e % 2] =
            sums[i][j][e];
      }
    }
    __syncwarp();
    for (int at = lane; at < 16 * Tile::kWarpColumns; at += kWarp) {
      const int row = at / Tile::kWarpColumns, column = at % Tile::kWarpColumns;
      use(warp_row<Tile>() + 16 * i + row, warp_column<Tile>() + column,
          own[row * Tile::kOutPitch + column]);
    }
    __syncwarp();
  }
}

}  // namespace adacomcat::cuda
