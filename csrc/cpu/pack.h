// Right operands in panels: panel after panel; in a panel, group after group of rows; in a group, lane
// after lane.

inline void write_operand(void* out, int64_t i, float x) {
  store_some(out, i, kOperand, broadcast(x), 1);
}

// Of a panel whose rows lie side by side in B, the lanes of `k` rows and `columns` columns: squares of them
// are transposed. Returns the rows that are done; what is left is less than a square high.
inline int64_t pack_columns(int64_t k, int64_t columns, const char* b, int64_t column, int64_t lanes,
                            char* out) {
  constexpr int64_t kRows = kLanes * kGroup;
  const int64_t whole = k / kRows * kRows;
  for (int64_t i = 0; i < whole; i += kRows) {
    for (int64_t first = 0; first < lanes; first += kLanes) {
      Vector square[kLanes] = {};
      for (int64_t j = 0; j < least(kLanes, columns - first); ++j) {
        __builtin_memcpy(&square[j], b + ((first + j) * column + i) * kOperandSize, sizeof(Vector));
      }
      transpose(square);
      float* to = reinterpret_cast<float*>(out + (i / kGroup * lanes + first) * kStep);
      for (int64_t j = 0; j < kLanes; ++j) store(to + j * lanes, square[j]);
    }
  }
  return whole;
}

void pack(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
          void* packed) {
  const int64_t size = dtype_size(dtype), padded = (k + kDepth - 1) / kDepth * kDepth;
  const bool copy = dtype == kOperand;
  int64_t at = 0;
  for (int64_t first = 0; first < n; first += kPanel * kLanes) {
    const int64_t lanes = n - first <= kLanes ? kLanes : kPanel * kLanes;
    const int64_t columns = least(lanes, n - first);
    int64_t done = 0;
    if (copy && row == 1) {
      done = pack_columns(k, columns, static_cast<const char*>(b) + first * column * size, column, lanes,
                          static_cast<char*>(packed) + at * kOperandSize);
      at += done * lanes;
    }
    for (int64_t i = done; i < padded; i += kGroup) {
      if (copy && row == 1 && i + kGroup <= k) {  // a lane's rows lie side by side
        char* out = static_cast<char*>(packed) + at * kOperandSize;
        const char* from = static_cast<const char*>(b) + (i + first * column) * size;
        for (int64_t j = 0; j < columns; ++j) {
          __builtin_memcpy(out + j * kStep, from + j * column * size, kStep);
        }
        __builtin_memset(out + columns * kStep, 0, (lanes - columns) * kStep);
        at += lanes * kGroup;
        continue;
      }
#ifdef ADACOMCAT_BF16_DOT
      if (copy && column == 1 && i + kGroup <= k && columns == lanes) {  // rows in pairs, whole
        auto* out = reinterpret_cast<uint32_t*>(packed) + at / kGroup;
        const auto* from = static_cast<const uint16_t*>(b) + i * row + first;
        for (int64_t j = 0; j < lanes; ++j) out[j] = from[j] | uint32_t{from[row + j]} << 16;
        at += lanes * kGroup;
        continue;
      }
#endif
      for (int g = 0; g < kGroup; ++g) {
        char* out = static_cast<char*>(packed) + (at + g) * kOperandSize;
        const char* from = static_cast<const char*>(b) + ((i + g) * row + first * column) * size;
        const int64_t filled = i + g < k ? columns : 0;
        if (copy && kGroup == 1 && column == 1) {
          __builtin_memcpy(out, from, filled * kOperandSize);
        } else if (copy) {
          for (int64_t j = 0; j < filled; ++j) {
            __builtin_memcpy(out + j * kStep, from + j * column * size, kOperandSize);
          }
        } else {
          for (int64_t j = 0; j < filled; ++j) {
            write_operand(out + j * kStep, 0, read_one(from, j * column, dtype));
          }
        }
        for (int64_t j = filled; j < lanes; ++j) __builtin_memset(out + j * kStep, 0, kOperandSize);
      }
      at += lanes * kGroup;
    }
  }
}
