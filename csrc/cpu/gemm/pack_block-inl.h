// Up to kBlock rows of one vector of columns of B as floats, padded with zeros.

constexpr int64_t kBlock = 2 * kLanes;

inline void read_block(int64_t rows, int64_t columns, const char* b, int64_t row, int64_t column,
                       Dtype dtype, Vector* block) {
  const int64_t size = dtype_size(dtype);
  for (int64_t i = 0; i < kBlock; ++i) block[i] = Vector{};
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
