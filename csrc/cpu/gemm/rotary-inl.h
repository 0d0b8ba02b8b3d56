// The rotary embedding of queries or keys: pairs of elements turn by the angles of their row.

// Sines and cosines of one row.
struct RowAngles {
  const Rows& sin;
  const Rows& cos;
  int64_t row;

  Vector sine(int64_t j, int64_t count) const {
    return load_some(sin.data, row * sin.stride + j, sin.dtype, count);
  }
  Vector cosine(int64_t j, int64_t count) const {
    return load_some(cos.data, row * cos.stride + j, cos.dtype, count);
  }
};

// Pairs of columns j and j + n / 2.
inline void rotate_halves(int64_t n, char* x, const RowAngles& angles) {
  const int64_t half = n / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    const int64_t count = least(kLanes, half - j), other = half + j;
    const Vector a = load_some(x, j, kOperand, count), b = load_some(x, other, kOperand, count);
    store_some(x, j, kOperand, a * angles.cosine(j, count) - b * angles.sine(j, count), count);
    store_some(x, other, kOperand, b * angles.cosine(other, count) + a * angles.sine(other, count),
               count);
  }
}

// Pairs of columns 2 j and 2 j + 1.
inline void rotate_neighbours(int64_t n, char* x, const RowAngles& angles) {
  Integers neighbour;
  Vector sign;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) neighbour[i] = i ^ 1, sign[i] = i % 2 ? 1.0f : -1.0f;
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t count = least(kLanes, n - j);
    const Vector a = load_some(x, j, kOperand, count);
    const Vector b = __builtin_shuffle(a, neighbour) * sign;
    store_some(x, j, kOperand, a * angles.cosine(j, count) + b * angles.sine(j, count), count);
  }
}

void rotate_rows(int64_t m, int64_t n, void* x, int64_t stride, Rows sin, Rows cos, bool half) {
  for (int64_t i = 0; i < m; ++i) {
    char* row = static_cast<char*>(x) + i * stride * kOperandSize;
    (half ? rotate_halves : rotate_neighbours)(n, row, {sin, cos, i});
  }
}
