// What tile units on AMX share: registers 0 and 1 are C, first rows; 2 and 3 the others; 4 and 5 A,
// first rows and others; 6 and 7 B, first vector and second.

// The compiler does not see what tile loads read and tile stores write.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

class Amx {
 protected:
  static constexpr int64_t kSide = 16;  // rows of a tile register, and lanes of one of its rows
  static constexpr int64_t kRowBytes = 64;

  ~Amx() { _tile_release(); }

  static __mmask16 lanes_of(int64_t count) {
    return static_cast<__mmask16>(count >= kSide ? 0xffff : (1u << greatest(count, 0)) - 1);
  }

  // For tiles of so many rows; one configuration serves all of them.
  void configure(int64_t rows) {
    if (rows == rows_) return;
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

  int64_t rows() const { return rows_; }

  // C from memory, or zeros; R times sixteen rows by P vectors.
  template <int R, int P>
  static void open(const float* c, int64_t c_stride, bool add) {
    memory_barrier();
    if (!add) {
      _tile_zero(0);
      if (P == 2) _tile_zero(1);
      if (R == 2) _tile_zero(2);
      if (R == 2 && P == 2) _tile_zero(3);
      return;
    }
    const float* const lower = c + kSide * c_stride;
    _tile_loadd(0, c, c_stride * 4);
    if (P == 2) _tile_loadd(1, c + kLanes, c_stride * 4);
    if (R == 2) _tile_loadd(2, lower, c_stride * 4);
    if (R == 2 && P == 2) _tile_loadd(3, lower + kLanes, c_stride * 4);
  }

  template <int R, int P>
  static void close(float* c, int64_t c_stride) {
    float* const lower = c + kSide * c_stride;
    _tile_stored(0, c, c_stride * 4);
    if (P == 2) _tile_stored(1, c + kLanes, c_stride * 4);
    if (R == 2) _tile_stored(2, lower, c_stride * 4);
    if (R == 2 && P == 2) _tile_stored(3, lower + kLanes, c_stride * 4);
    memory_barrier();
  }

  // C += A · B of what the registers hold.
  template <int R, int P>
  static void multiply_registers() {
    _tile_dpbf16ps(0, 4, 6);
    if (P == 2) _tile_dpbf16ps(1, 4, 7);
    if (R == 2) _tile_dpbf16ps(2, 5, 6);
    if (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
  }

  static void fetch(Prefetch& ahead, int64_t lanes) {
    const char* const end = ahead.from + lanes * ahead.step;
    for (; ahead.from < end; ahead.from += kRowBytes) __builtin_prefetch(ahead.from, 0, 2);
  }

 private:
  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  int64_t rows_ = 0;
};
