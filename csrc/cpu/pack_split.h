// Right operands for tile_amx_split.h: panel after panel; in a panel, 32 rows after 32; in those, part
// after part; in a part, a register for each vector.

// Up to 32 rows and one vector of columns of B, closed with zeros.
inline void read_block(int64_t rows, int64_t columns, const char* b, int64_t row, int64_t column,
                       Dtype dtype, Vector* block) {
  const int64_t size = dtype_size(dtype);
  for (int64_t i = 0; i < kDepth; ++i) block[i] = Vector{};
  if (row == 1) {
    for (int64_t first = 0; first < rows; first += kLanes) {
      for (int64_t j = 0; j < columns; ++j) {
        block[first + j] = load_some(b, first + j * column, dtype, least(kLanes, rows - first));
      }
      transpose(block + first);
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i, b += row * size) {
    if (column == 1) {
      block[i] = load_some(b, 0, dtype, columns);
      continue;
    }
    for (int64_t j = 0; j < columns; ++j) block[i][j] = read_one(b, j * column, dtype);
  }
}

void pack(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
          void* packed) {
  const int64_t size = dtype_size(dtype), bytes = kRegisterFloats * 4;
  char* out = static_cast<char*>(packed);
  for_each_panel(0, n, [&](int64_t first, int64_t vectors) {
    for (int64_t i = 0; i < k; i += kDepth) {
      for (int64_t v = 0; v < vectors; ++v) {
        Vector block[kDepth];
        const int64_t j = first + v * kLanes;
        read_block(least(kDepth, k - i), least(kLanes, n - j),
                   static_cast<const char*>(b) + (i * row + j * column) * size, row, column, dtype,
                   block);
        for (int64_t r = 0; r < kLanes; ++r) {
          split(block[r], block[r + kLanes], out + v * bytes + r * kLanes * 4, vectors * bytes);
        }
      }
      out += vectors * kParts * bytes;
    }
  });
}
