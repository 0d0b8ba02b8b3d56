// A tile of C by AMX: up to 32 rows by two vectors in four tile registers, 32 columns of A at a time.
// Packed pairs of bfloat16 are what AMX wants of its right side.

// The compiler does not see what tile loads read and tile stores write.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

class TileUnit {
 public:
  ~TileUnit() { _tile_release(); }

  // Rows of A where loads are fast: tile after tile. Rows as far apart as those of a matrix share few
  // sets of the first cache. One panel alone would not pay for the copy.
  LeftRows left(const Product& p, int64_t row, int64_t rows) {
    const LeftRows there{left_of(p, row), p.a_stride * kOperandSize, kRowBytes};
    const int64_t steps = steps_of(p);
    if (p.n <= kPanel * kLanes || steps > kMostSteps) return there;
    for (int64_t i = 0; i < rows; ++i) {
      const char* from = there.data + i * there.stride;
      char* to = arranged_ + i * kRowBytes;
      for (int64_t step = 0; step < steps; step += kSide, to += kTileRows * kRowBytes) {
        const auto some = _mm512_maskz_loadu_epi32(first_lanes(steps - step), from + step * kStep);
        _mm512_store_si512(to, some);
      }
    }
    return {arranged_, kRowBytes, kTileRows * kRowBytes};
  }

  // As multiply_tile; a configuration serves all tiles of as many rows.
  template <int64_t S>
  void multiply(int64_t rows, int64_t vectors, int64_t steps, const LeftRows& a, const float* b,
                float* c, int64_t c_stride, bool add, Prefetch ahead) {
    if (rows != rows_) configure(rows);
    const bool wide = vectors == kPanel;
    const auto run = rows > kSide ? (wide ? &TileUnit::run<2, 2> : &TileUnit::run<2, 1>)
                                  : (wide ? &TileUnit::run<1, 2> : &TileUnit::run<1, 1>);
    (this->*run)(steps, a, b, c, S ? S : c_stride, add, ahead);
  }

 private:
  static constexpr int64_t kSide = 16;  // rows of a tile register, and steps of one of A
  static constexpr int64_t kRowBytes = 64;
  static constexpr int64_t kMostSteps = 512;  // of rows that are arranged

  static __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= kSide ? 0xffff : (1u << count) - 1);
  }

  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  // Registers 0 and 1 are C, first rows; 2 and 3 the others; 4 and 5 A; 6 and 7 B.
  void configure(int64_t rows) {
    const int64_t upper = least(rows, kSide), lower = rows - upper;
    const int64_t sizes[8] = {upper, upper, lower, lower, upper, lower, kSide, kSide};
    Configuration wanted;
    for (int i = 0; i < 8; ++i) {
      wanted.rows[i] = static_cast<uint8_t>(sizes[i]);
      wanted.row_bytes[i] = sizes[i] ? kRowBytes : 0;
    }
    memory_barrier();
    _tile_loadconfig(&wanted);
    rows_ = rows;
  }

  template <int R, int P>
  void run(int64_t steps, const LeftRows& left, const float* b, float* c, int64_t c_stride, bool add,
           Prefetch ahead) {
    const char* a = left.data;
    const int64_t c_bytes = c_stride * 4;
    float* const lower = c + kSide * c_stride;
    memory_barrier();
    _tile_zero(0);
    if (P == 2) _tile_zero(1);
    if (R == 2) _tile_zero(2);
    if (R == 2 && P == 2) _tile_zero(3);
    if (add) {
      _tile_loadd(0, c, c_bytes);
      if (P == 2) _tile_loadd(1, c + kLanes, c_bytes);
      if (R == 2) _tile_loadd(2, lower, c_bytes);
      if (R == 2 && P == 2) _tile_loadd(3, lower + kLanes, c_bytes);
    }
    for (; steps >= kSide; steps -= kSide) {
      fetch(ahead);
      add_product<R, P>(a, left.stride, b);
      a += left.step;
      b += kSide * P * kLanes;
    }
    if (steps) add_rest<R, P>(steps, a, left.stride, b);
    _tile_stored(0, c, c_bytes);
    if (P == 2) _tile_stored(1, c + kLanes, c_bytes);
    if (R == 2) _tile_stored(2, lower, c_bytes);
    if (R == 2 && P == 2) _tile_stored(3, lower + kLanes, c_bytes);
    memory_barrier();
  }

  template <int R, int P>
  static void add_product(const void* a, int64_t a_stride, const float* b) {
    _tile_loadd(6, b, P * kRowBytes);
    _tile_loadd(4, a, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (P == 2) {
      _tile_loadd(7, b + kLanes, P * kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, static_cast<const char*>(a) + kSide * a_stride, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      if (P == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }

  // Fewer steps than a register holds, closed with zeros: nothing beyond them is read.
  template <int R, int P>
  void add_rest(int64_t steps, const char* a, int64_t a_stride, const float* b) const {
    alignas(64) uint32_t left[R * kSide][kSide];
    alignas(64) float right[kSide][P * kLanes] = {};
    for (int64_t i = 0; i < rows_; ++i) {
      _mm512_store_si512(left[i], _mm512_maskz_loadu_epi32(first_lanes(steps), a + i * a_stride));
    }
    __builtin_memcpy(right, b, steps * sizeof right[0]);
    memory_barrier();
    add_product<R, P>(left, kRowBytes, &right[0][0]);
  }

  static void fetch(Prefetch& ahead) {
    const char* const end = ahead.from + kSide * ahead.step;
    for (; ahead.from < end; ahead.from += kRowBytes) __builtin_prefetch(ahead.from, 0, 2);
  }

  int64_t rows_ = 0;
  alignas(64) char arranged_[kMostSteps / kSide * kTileRows * kRowBytes];
};
