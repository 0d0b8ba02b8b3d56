// Which tile a launcher takes, and how many blocks share the same rows. The answers depend on sizes and
// on the number of multiprocessors only, so that results repeat bit for bit.
#pragma once

#include <algorithm>

#include "tiles.cuh"

namespace adacomcat::cuda {

// Rows of the tiles of each type. float32 has one: a larger one would take too many registers.
template <class T>
constexpr int kSmallRows = sizeof(T) == 2 ? 16 : 32;
template <class T>
constexpr int kLargeRows = sizeof(T) == 2 ? 128 : 32;

// Blocks that share rows each compute x V again. Large tiles, which are efficient, are for inputs that
// fill the GPU with at most so many blocks for the same rows; small tiles are for the others.
constexpr int kMostSharingLarge = 4, kMostSharingSmall = 12;

inline int64_t row_blocks(int64_t rows, int tile) { return (rows + tile - 1) / tile; }

template <class T>
bool takes_large_tile(int64_t rows) {
  return row_blocks(rows, kLargeRows<T>) * kMostSharingLarge >= multiprocessors();
}

// Blocks for the same rows, among which `pieces` are shared out: as many as keep the GPU busy.
inline int blocks_for_rows(int64_t rows, int tile, int64_t pieces) {
  const int64_t most = tile >= 128 ? kMostSharingLarge : kMostSharingSmall;
  const int64_t wanted = multiprocessors() / std::max<int64_t>(row_blocks(rows, tile), 1);
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, most, pieces})));
}

// Pieces of each of `blocks` that share `pieces` of them.
inline int64_t pieces_per_block(int64_t pieces, int64_t blocks) {
  return (pieces + blocks - 1) / blocks;
}

// Blocks that share the same rows of y, and the columns of each: whole tiles.
struct SharedColumns {
  int blocks, columns;

  SharedColumns(int64_t rows, int tile, int out) {
    const int64_t tiles = (out + kColumns - 1) / kColumns;
    const int64_t most = pieces_per_block(tiles, blocks_for_rows(rows, tile, tiles));
    columns = static_cast<int>(std::max<int64_t>(most, 1) * kColumns);
    blocks = std::max((out + columns - 1) / columns, 1);
  }
};

}  // namespace adacomcat::cuda
