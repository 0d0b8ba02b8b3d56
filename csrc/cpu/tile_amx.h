// A tile of C by AMX: up to 32 rows by two vectors in four tile registers, 32 columns of A at a time.
// Packed pairs of bfloat16 are what AMX wants of its right side.

class TileUnit : Amx {
 public:
  static constexpr bool kFinishes = false;  // it stores what it multiplied

  void hold(int64_t rows, int64_t steps, const char* a, int64_t a_stride) {
    configure(rows);
    steps_ = steps, a_ = a, a_stride_ = a_stride;
  }

  // As that of tile_registers.h.
  template <int64_t S>
  void multiply(int64_t vectors, Right b, float* c, int64_t c_stride, bool add,
                Prefetch ahead, Work& meanwhile) {
    if (!steps_) {
      if (!add) clear(c, S ? S : c_stride, vectors);
      return meanwhile.all();
    }
    const bool wide = vectors == kPanel;
    // By a pointer, so that each is compiled apart: inlined, tiles with GELU take 13 % longer.
    const auto run = rows() > kSide ? (wide ? &TileUnit::run<2, 2> : &TileUnit::run<2, 1>)
                                    : (wide ? &TileUnit::run<1, 2> : &TileUnit::run<1, 1>);
    (this->*run)(b.rows, c, S ? S : c_stride, add, ahead, meanwhile);
  }

 private:
  template <int R, int P>
  void run(const float* b, float* c, int64_t c_stride, bool add, Prefetch ahead, Work& meanwhile) {
    const char* a = a_;
    const int64_t whole = steps_ / kSide, rest = steps_ % kSide;
    meanwhile.begin(whole);
    for (int64_t step = 0; step < whole; ++step) {
      fetch(ahead, kSide);
      load_sides<R, P>(a, a_stride_, b);
      if (step) {
        multiply_registers<R, P>();
      } else {
        multiply_first<R, P>(c, c_stride, add);
      }
      meanwhile.next();
      a += kSide * kStep;
      b += kSide * P * kLanes;
    }
    if (rest) {
      load_rest<R, P>(rest, a, b);
      if (whole) {
        multiply_registers<R, P>();
      } else {
        multiply_first<R, P>(c, c_stride, add);
      }
    }
    meanwhile.all();
  }

  template <int R, int P>
  static void load_sides(const void* a, int64_t a_stride, const float* b) {
    _tile_loadd(6, b, P * kRowBytes);
    _tile_loadd(4, a, a_stride);
    if (P == 2) _tile_loadd(7, b + kLanes, P * kRowBytes);
    if (R == 2) _tile_loadd(5, static_cast<const char*>(a) + kSide * a_stride, a_stride);
  }

  // Fewer steps than a register holds: of A nothing beyond them is read, B ends in zeros.
  template <int R, int P>
  void load_rest(int64_t steps, const char* a, const float* b) const {
    alignas(64) uint32_t left[R * kSide][kSide];
    for (int64_t i = 0; i < rows(); ++i) {
      _mm512_store_si512(left[i], _mm512_maskz_loadu_epi32(lanes_of(steps), a + i * a_stride_));
    }
    memory_barrier();
    load_sides<R, P>(left, kRowBytes, b);
    memory_barrier();
  }

  int64_t steps_ = 0, a_stride_ = 0;
  const char* a_ = nullptr;
};
