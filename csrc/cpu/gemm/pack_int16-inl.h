// Packs the rhs as 16-bit integers: panel after panel; in a panel, pair after pair of rows, lane after
// lane; and at its end the norms of its columns.

#include "cpu/gemm/pack_block-inl.h"

// The power of two that each of a vector's columns is multiplied by, and the square of its norm then.
struct Columns {
  Vector lift, square;
};

template <typename Read>
inline Vector norm_squares(int64_t k, Vector lift, Read read) {
  Vector squares{};
  for (int64_t i = 0; i < k; i += kBlock) {
    Vector block[kBlock];
    read(i, block);
    for (int64_t r = 0; r < kBlock; ++r) squares += block[r] * lift * (block[r] * lift);
  }
  return squares;
}

template <typename Read>
inline Columns measure_columns(int64_t k, Read read) {
  const Vector one = broadcast(1), square = norm_squares(k, one, read);
  const Integers fine = (square >= kLeastSquare) & (square <= kMostSquare);
  const Vector lift = select(fine, one, select(square > 1, broadcast(1 / kLift), broadcast(kLift)));
  return {lift, norm_squares(k, lift, read)};
}

void pack(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
          void* packed, const float*) {
  const int64_t size = dtype_size(dtype), pairs = (k + 1) / 2;
  auto* out = static_cast<Words*>(packed);
  for_each_panel(0, n, [&](int64_t first, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t j = first + v * kLanes;
      const auto read = [&](int64_t i, Vector* block) {
        read_block(least(kBlock, k - i), least(kLanes, n - j),
                   static_cast<const char*>(b) + (i * row + j * column) * size, row, column, dtype,
                   block);
      };
      const Columns columns = measure_columns(k, read);
      const Vector norm = (Vector)_mm512_sqrt_ps((__m512)columns.square);
      const Vector scale = select(columns.square == 0.0f, Vector{}, kMostInteger / norm);
      for (int64_t i = 0; i < pairs; i += kLanes) {
        Vector block[kBlock];
        read(2 * i, block);
        for (int64_t pair = 0; pair < least(kLanes, pairs - i); ++pair) {
          const auto part = [&](int64_t r) {
            return (Words)rounded(block[2 * pair + r] * columns.lift * scale);
          };
          out[(i + pair) * vectors + v] = (part(0) & 0xffffu) | part(1) << 16;
        }
      }
      out[pairs * vectors + v] = (Words)(norm / columns.lift);
    }
    out += (pairs + 1) * vectors;
  });
}
