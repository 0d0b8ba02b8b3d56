// Packs the rhs as 8-bit integers: panel after panel; in a panel, group after group of kPackedGroup rows, lane
// after lane; and at its end the scales of its columns. `scales` holds one for each column of B; B / scale is
// whole, up to rounding.

#include "cpu/gemm/pack_block-inl.h"

// Adjacent rows of a vector of columns, a group in each lane.
inline void store_group(const Integers* rows, char* out) {
  Words lanes{};
#pragma GCC unroll 4
  for (int g = 0; g < kPackedGroup; ++g) {
    lanes |= ((Words)(rows[g] + kPackedZero) & 0xffu) << 8 * g;
  }
  for (int i = 0; i < kLanes; ++i) {
    __builtin_memcpy(out + i * kPackedGroup, &lanes[i], kPackedGroup);
  }
}

void pack(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
          void* packed, const float* scales) {
  const int64_t size = dtype_size(dtype), groups = (k + kPackedGroup - 1) / kPackedGroup;
  auto* out = static_cast<char*>(packed);
  for_each_panel(0, n, [&](int64_t first, int64_t vectors) {
    const int64_t row_bytes = vectors * kLanes;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t j = first + v * kLanes, columns = greatest(least(kLanes, n - j), 0);
      const Vector scale = load_some(scales, j, Dtype::f32, columns);
      const Vector inverse = select(scale == 0.0f, Vector{}, 1 / scale);
      for (int64_t i = 0; i < groups * kPackedGroup; i += kBlock) {
        Vector block[kBlock];
        const auto* from = static_cast<const char*>(b) + (i * row + j * column) * size;
        read_block(greatest(least(kBlock, k - i), 0), columns, from, row, column, dtype, block);
        for (int64_t g = 0; g < kBlock && i + g < groups * kPackedGroup; g += kPackedGroup) {
          Integers rows[kPackedGroup];
          for (int r = 0; r < kPackedGroup; ++r) {
            const Vector bound = broadcast(kMostInteger);
            rows[r] = rounded(maximum(minimum(block[g + r] * inverse, bound), -bound));
          }
          store_group(rows, out + (i + g) * row_bytes + v * kLanes * kPackedGroup);
        }
      }
      store(reinterpret_cast<float*>(out + groups * kPackedGroup * row_bytes) + v * kLanes, scale);
    }
    out += (groups * kPackedGroup + kScaleRows) * row_bytes;
  });
}
