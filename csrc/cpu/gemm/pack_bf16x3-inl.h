// Packs the rhs in three bfloat16 parts: panel after panel; in a panel, 32 rows after 32 rows; in those,
// part after part; in a part, one tile register for each vector.

#include "cpu/gemm/pack_block-inl.h"

void pack(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
          void* packed, const float*) {
  const int64_t size = dtype_size(dtype), bytes = kRegisterFloats * 4;
  char* out = static_cast<char*>(packed);
  for_each_panel(0, n, [&](int64_t first, int64_t vectors) {
    for (int64_t i = 0; i < k; i += kBlock) {
      for (int64_t v = 0; v < vectors; ++v) {
        Vector block[kBlock];
        const int64_t j = first + v * kLanes;
        read_block(least(kBlock, k - i), least(kLanes, n - j),
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
