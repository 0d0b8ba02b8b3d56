// Packs the rhs: panel after panel; in a panel, group after group of kGroup rows; in a group, lane after
// lane. Each layout of B has a function of its own that packs one group, or many.

#include "cpu/gemm/pack_block-inl.h"

// A panel of B: `columns` columns, and the lanes that they take when packed. Element (i, j) is element
// i * row + j * column of `data`.
struct PanelSource {
  const char* data;
  int64_t row, column;
  Dtype dtype;
  int64_t columns, lanes;

  const char* element(int64_t i, int64_t j = 0) const {
    return data + (i * row + j * column) * dtype_size(dtype);
  }
};

// Rows of the operand format that are adjacent in B, by transposing squares. Returns how many rows are
// done: all but less than a square.
inline int64_t pack_squares(int64_t k, const PanelSource& b, char* out) {
  constexpr int64_t kRows = kLanes * kGroup;
  const int64_t whole = k / kRows * kRows;
  for (int64_t i = 0; i < whole; i += kRows) {
    for (int64_t first = 0; first < b.lanes; first += kLanes) {
      Vector square[kLanes] = {};
      for (int64_t j = 0; j < least(kLanes, b.columns - first); ++j) {
        __builtin_memcpy(&square[j], b.data + ((first + j) * b.column + i) * kOperandSize,
                         sizeof(Vector));
      }
      transpose(square);
      float* to = reinterpret_cast<float*>(out + (i / kGroup * b.lanes + first) * kLaneBytes);
      for (int64_t j = 0; j < kLanes; ++j) store(to + j * b.lanes, square[j]);
    }
  }
  return whole;
}

// A group of rows of the operand format that are adjacent in B.
inline void pack_adjacent_rows(int64_t i, const PanelSource& b, char* out) {
  const char* from = b.element(i);
  for (int64_t j = 0; j < b.columns; ++j) {
    __builtin_memcpy(out + j * kLaneBytes, from + j * b.column * kOperandSize, kLaneBytes);
  }
  __builtin_memset(out + b.columns * kLaneBytes, 0, (b.lanes - b.columns) * kLaneBytes);
}

// Two rows of bfloat16, interleaved; the columns are adjacent in B and fill all lanes.
inline void pack_row_pair(int64_t i, const PanelSource& b, char* out) {
  auto* to = reinterpret_cast<uint32_t*>(out);
  const auto* from = reinterpret_cast<const uint16_t*>(b.element(i));
  for (int64_t j = 0; j < b.lanes; ++j) to[j] = from[j] | uint32_t{from[b.row + j]} << 16;
}

// A row of the operand format.
inline void pack_row(int64_t filled, const char* from, const PanelSource& b, char* out) {
  if (kGroup == 1 && b.column == 1) {
    __builtin_memcpy(out, from, filled * kOperandSize);
    return;
  }
  for (int64_t j = 0; j < filled; ++j) {
    __builtin_memcpy(out + j * kLaneBytes, from + j * b.column * kOperandSize, kOperandSize);
  }
}

// A row of another dtype.
inline void convert_row(int64_t filled, const char* from, const PanelSource& b, char* out) {
  for (int64_t j = 0; j < filled; ++j) {
    const float x = read_one(from, j * b.column, b.dtype);
    if constexpr (kOperand == Dtype::f32) {
      __builtin_memcpy(out + j * kLaneBytes, &x, sizeof x);
    } else {
      const uint16_t rounded = to_bf16(broadcast(x))[0];
      __builtin_memcpy(out + j * kLaneBytes, &rounded, sizeof rounded);
    }
  }
}

// Rows of another dtype for float32 operands, by squares of vectors. Returns how many rows are done: all.
inline int64_t convert_squares(int64_t k, const PanelSource& b, char* out) {
  float* to = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < k; i += kBlock) {
    const int64_t rows = least(kBlock, k - i);
    for (int64_t first = 0; first < b.lanes; first += kLanes) {
      Vector block[kBlock] = {};
      const int64_t columns = least(kLanes, b.columns - first);
      if (columns > 0) {
        read_block(rows, columns, b.element(i, first), b.row, b.column, b.dtype, block);
      }
      for (int64_t r = 0; r < rows; ++r) store(to + (i + r) * b.lanes + first, block[r]);
    }
  }
  return k;
}

// A group of rows of any layout and dtype; rows from k on are zeros.
inline void pack_any_rows(int64_t k, int64_t i, const PanelSource& b, char* out) {
  for (int g = 0; g < kGroup; ++g, out += kOperandSize) {
    const int64_t filled = i + g < k ? b.columns : 0;
    if (b.dtype == kOperand) {
      pack_row(filled, b.element(i + g), b, out);
    } else {
      convert_row(filled, b.element(i + g), b, out);
    }
    for (int64_t j = filled; j < b.lanes; ++j) {
      __builtin_memset(out + j * kLaneBytes, 0, kOperandSize);
    }
  }
}

void pack(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
          void* packed, const float*) {
  const int64_t padded = (k + kKMultiple - 1) / kKMultiple * kKMultiple;
  const bool copies = dtype == kOperand;
  char* out = static_cast<char*>(packed);
  for_each_panel(0, n, [&](int64_t first, int64_t vectors) {
    PanelSource panel{static_cast<const char*>(b), row, column, dtype, 0, vectors * kLanes};
    panel.data = panel.element(0, first);
    panel.columns = least(panel.lanes, n - first);
    int64_t i = 0;
    if (copies && row == 1) i = pack_squares(k, panel, out);
    if constexpr (kOperand == Dtype::f32) {
      if (!copies && (row == 1 || column == 1)) i = convert_squares(k, panel, out);
    }
    out += i / kGroup * panel.lanes * kLaneBytes;
    for (; i < padded; i += kGroup, out += panel.lanes * kLaneBytes) {
      const bool whole = copies && i + kGroup <= k;
      if (whole && row == 1) {
        pack_adjacent_rows(i, panel, out);
      } else if (whole && kGroup == 2 && column == 1 && panel.columns == panel.lanes) {
        pack_row_pair(i, panel, out);
      } else {
        pack_any_rows(k, i, panel, out);
      }
    }
  });
}
