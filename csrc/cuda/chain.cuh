// Two chained products: sums += f(lhs · firstᵀ) · second, where the middle f(...) stays in the registers
// of the warp that computed it. An MLP has hidden units in the middle, attention probabilities.
//
// A warp takes its own rows and all columns of the sums. Where several warps share their rows
// (Tile::kWarpsAcross), each takes other columns of the middle, and `drain_chained` adds their sums.
#pragma once

#include "tiles.cuh"

namespace adacomcat::cuda {

template <class Tile>
using ChainedSums = float[Tile::kWarpRows / 16][kColumns / 8][4];

// Bytes that `drain_chained` needs.
constexpr int kChainedStaging = kWarps * 16 * (kColumns + 8) * sizeof(float);

// The middle's columns of a warp lie in this part of a tile that is shared by warps across.
template <class Tile>
__device__ __forceinline__ int warp_part() {
  return threadIdx.x / kWarp % Tile::kWarpsAcross;
}

// The lhs of step `step` of the second product, from the results of the first one in 16 rows. A lane
// already has what the instruction wants of it; with float32 in another order (see `wide_operand`).
template <class T, int groups>
__device__ __forceinline__ Operand<T> chained_operand(const float (&middle)[groups][4], int step) {
  Operand<T> operand;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 2) {
      const float(&from)[4] = middle[2 * step + w / 2];
      operand.word[w] = pack<T>(from[w % 2 * 2], from[w % 2 * 2 + 1]);
    } else {
      operand.word[w] = __float_as_uint(middle[step][w % 2 * 2 + w / 2]);
    }
  }
  operand.split();
  return operand;
}

// sums += middle · rhs, in the first `columns` columns. The rhs is stored by depth.
template <class T, int down, int inner, int groups>
__device__ __forceinline__ void multiply_chained(float (&sums)[down][groups][4],
                                                 const float (&middle)[down][inner][4],
                                                 const T* rhs, int pitch, int columns) {
  constexpr int depth = 32 / sizeof(T);  // of an instruction
#pragma unroll
  for (int step = 0; step < 8 * inner / depth; ++step) {
    Operand<T> a[down];
#pragma unroll
    for (int i = 0; i < down; ++i) a[i] = chained_operand<T>(middle[i], step);
#pragma unroll
    for (int j = 0; j < groups / 2; ++j) {
      if (16 * j >= columns) break;
      const Operand<T> b = wide_operand<true>(rhs, pitch, 16 * j, step * depth);
#pragma unroll
      for (int i = 0; i < down; ++i) {
        multiply_add(sums[i][2 * j], a[i], b, 0);
        multiply_add(sums[i][2 * j + 1], a[i], b, 2);
      }
    }
  }
}

// Lets the warps that share rows wait for each other.
template <class Tile>
__device__ __forceinline__ void sync_rows() {
  if constexpr (Tile::kWarpsAcross == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// As `drain`, for sums of whole rows of kColumns columns, of which the warps that share rows hold a
// part each. Other threads may still use `memory`, kChainedStaging bytes.
template <class Tile, class Use>
__device__ __forceinline__ void drain_chained(const ChainedSums<Tile>& sums, float* memory,
                                              Use use) {
  constexpr int chunk = Tile::kChunk, across = kColumns / chunk, pitch = kColumns + 8;
  constexpr int threads = kWarp * Tile::kWarpsAcross;
  __syncthreads();
  float* own = memory + threadIdx.x / kWarp * 16 * pitch;
  const float* first = memory + threadIdx.x / threads * Tile::kWarpsAcross * 16 * pitch;
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i) {
    put_sums(own, sums[i]);
    sync_rows<Tile>();
    for (int at = threadIdx.x % threads; at < 16 * across; at += threads) {
      const int row = at / across, column = at % across * chunk;
      float values[chunk] = {};
#pragma unroll
      for (int part = 0; part < Tile::kWarpsAcross; ++part) {
        add_sums(values, first + (16 * part + row) * pitch + column);
      }
      use(warp_row<Tile>() + 16 * i + row, column, values);
    }
    if (i + 1 < Tile::kWarpRows / 16) sync_rows<Tile>();
  }
}

}  // namespace adacomcat::cuda
