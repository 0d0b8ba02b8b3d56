// How operands are stored, and how a product is cut for the caches.

#ifdef ADACOMCAT_BF16_OPERANDS
constexpr Dtype kOperand = Dtype::bf16;
constexpr int kOperandSize = 2;
constexpr int kGroup = 2;  // elements of k that one 32-bit lane holds
#else
constexpr Dtype kOperand = Dtype::f32;
constexpr int kOperandSize = 4;
constexpr int kGroup = 1;
#endif
constexpr int kLaneBytes = kGroup * kOperandSize;
constexpr int kPanelVectors = 2;  // vectors of a full panel: nr is kPanelVectors * kLanes

// The packed rhs: bytes of an element, rows that hold scales, and the multiple that k is padded to.
#if defined(ADACOMCAT_BF16X3_PRODUCTS)
constexpr int kPackedSize = 6;  // three bfloat16
constexpr int kScaleRows = 0;
#elif defined(ADACOMCAT_INT16_PRODUCTS)
constexpr int kPackedSize = 2;
constexpr int kScaleRows = 2;  // of 16 bits each: one float for each column
#elif defined(ADACOMCAT_INT8_PRODUCTS)
constexpr int kPackedSize = 1;
constexpr int kScaleRows = 4;  // of 8 bits each
#else
constexpr int kPackedSize = kOperandSize;
constexpr int kScaleRows = 0;
#endif
// Rows of the packed rhs that a lane holds, what is added to its integers, and bytes of an element of the
// lhs in a tile.
#if defined(ADACOMCAT_BYTE_DOT)
constexpr int kPackedGroup = 4, kPackedZero = 128, kLhsSize = 1;
#elif defined(ADACOMCAT_INT8_PRODUCTS)
constexpr int kPackedGroup = 2, kPackedZero = 0, kLhsSize = 2;
#elif defined(ADACOMCAT_INT16_PRODUCTS)
constexpr int kPackedGroup = 2, kPackedZero = 0, kLhsSize = 2;
#else
constexpr int kPackedGroup = kGroup, kPackedZero = 0, kLhsSize = kPackedSize;
#endif
constexpr int kLhsLaneBytes = kLhsSize * kPackedGroup;
#if defined(ADACOMCAT_AMX)
constexpr int kKMultiple = 32;  // rows that a tile register holds
#elif defined(ADACOMCAT_INTEGER_PRODUCTS)
constexpr int kKMultiple = kPackedGroup;
#else
constexpr int kKMultiple = kGroup;
#endif

// Bytes of the packed rhs that stay in the second cache while all rows of the lhs pass (nc). A
// larger nc would spare bf16x3 work, since it splits the lhs anew for every nc. But its rhs shares
// the cache with kBlockRows rows of floats, twice the bytes of AMX's bfloat16 rows.
#ifdef ADACOMCAT_BF16X3_PRODUCTS
constexpr int64_t kRhsBytes = 5 << 17;
#else
constexpr int64_t kRhsBytes = 1 << 20;
#endif
// Rows that an op takes through all its products at a time (mc).
#ifdef ADACOMCAT_AMX
constexpr int64_t kBlockRows = 400;  // fewer would read all weights from the third cache more often
#else
constexpr int64_t kBlockRows =
    264;  // one image of 224 x 224 is one block and reads each weight once
#endif

// mr, nc and kc of one product. kc is less than k only where mr rows of the lhs are longer than the
// first cache allows beside a panel; the tiles of an nc then wait in memory between two kc.
struct Blocking {
  static constexpr int64_t kMostPanels = 8;  // of an nc whose tiles wait
#ifdef ADACOMCAT_INT8_PRODUCTS
  // Rounding the lhs anew for every nc would take longer than reading it from the second cache.
  static constexpr int64_t kMostDepth = 4096, kMostLhsBytes = kTileRows * kMostDepth * kLhsSize;
  static constexpr int64_t kLhsBytes = kMostLhsBytes;
#else
  static constexpr int64_t kLhsBytes = 16 << 10, kMostLhsBytes = 24 << 10;  // of mr rows
#endif

  int64_t k_blocks = 1, kc, nc;
  int64_t mr;

  explicit Blocking(const Gemm& p)
      : kc(greatest(p.k, 1)), mr(even_share(p.m, kTileRows, kRowStep)) {
    const int64_t row_bytes = kTileRows * p.k * kLhsSize, columns = kPanelVectors * kLanes;
    const int64_t panel_bytes = p.k * columns * kPackedSize + 1;
    int64_t panels = greatest(kRhsBytes / panel_bytes, 1);
    if (row_bytes > kMostLhsBytes) {
      k_blocks = (row_bytes + kLhsBytes - 1) / kLhsBytes;
      kc = ((p.k + k_blocks - 1) / k_blocks + kKStep - 1) / kKStep * kKStep;
      panels = least(panels, kMostPanels);
    }
    const int64_t all = (p.n + columns - 1) / columns;
    nc = (all <= panels ? all : even_share(all, panels, 1)) * columns;
  }
};

// Rows of a packed panel of the rhs, and the scales of its columns if the engine has such.
struct PackedRhs {
  const float* rows;
  const float* scales;
};

// What one tile prefetches: one line at `from`, and the next `step` bytes further with every lane of k.
struct Prefetch {
  const char* from;
  int64_t step;
};

// Calls visit(column, vectors) for each panel of C from column `first` to `last`. The last panel is
// one vector wide where that suffices.
template <typename Visit>
inline void for_each_panel(int64_t first, int64_t last, Visit visit) {
  for (int64_t column = first; column < last; column += kPanelVectors * kLanes) {
    visit(column, last - column <= kLanes ? 1 : kPanelVectors);
  }
}
