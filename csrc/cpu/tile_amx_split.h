// A tile of C in float32 by AMX. A float is the sum of three bfloat16, of eight bits each, exactly;
// of the nine products of such parts six are computed, and each of the other three is less than what
// rounding a float32 product may lose. AMX does them 2.6 times as fast as AVX-512 multiplies floats.
// Infinity has no parts: what it meets becomes NaN.

constexpr int64_t kParts = 3, kProducts = 6;
constexpr int64_t kRegisterFloats = 256;  // a tile register, in floats' size

// The parts of 32 floats, those of `first` and `second` in pairs, as rows of three registers `apart`
// bytes from each other.
inline void split(Vector first, Vector second, char* out, int64_t apart) {
  const Words upper = Words{} + 0xffff0000u;
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    const Words a = (Words)first & upper, b = (Words)second & upper;
    *reinterpret_cast<Words*>(out + part * apart) = a >> 16 | b;
    first -= (Vector)a;
    second -= (Vector)b;
  }
}

class TileUnit : Amx {
 public:
  static constexpr bool kFinishes = false;  // it stores what it multiplied

  // Splits the rows, closed with zeros up to whole registers: step after step, part after part.
  void hold(int64_t rows, int64_t steps, const char* a, int64_t a_stride) {
    configure(rows);
    steps_ = (steps + kDepth - 1) / kDepth;
    for (int64_t i = 0; i < rows; ++i, a += a_stride) {
      const float* row = reinterpret_cast<const float*>(a);
      char* out = left_ + i * kRowBytes;
      for (int64_t k = 0; k < steps; k += kDepth, out += kParts * kPartBytes) {
        split(some(row + k, steps - k), some(row + k + kLanes, steps - k - kLanes), out, kPartBytes);
      }
    }
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
  static constexpr int64_t kPartBytes = kTileRows * kRowBytes;
  static_assert(Order::kMostRowBytes % (kParts * kPartBytes) == 0 &&
                Order::kRowBytes + kParts * kPartBytes <= Order::kMostRowBytes);

  static Vector some(const float* from, int64_t count) {
    return (Vector)_mm512_maskz_loadu_ps(lanes_of(count), from);
  }

  template <int R>
  static void load_left(const char* a) {
    _tile_loadd(4, a, kRowBytes);
    if (R == 2) _tile_loadd(5, a + kSide * kRowBytes, kRowBytes);
  }

  template <int P>
  static void load_right(const float* b) {
    _tile_loadd(6, b, kRowBytes);
    if (P == 2) _tile_loadd(7, b + kRegisterFloats, kRowBytes);
  }

  // From product to product one side changes. The vector units work between them, since what waits
  // for a register to be multiplied soon fills the core's window of instructions.
  template <int R, int P>
  void run(const float* b, float* c, int64_t c_stride, bool add, Prefetch ahead, Work& meanwhile) {
    constexpr int64_t kRight = P * kRegisterFloats;
    const char* a = left_;
    const auto multiply_held = [&] {
      multiply_registers<R, P>();
      meanwhile.next();
    };
    meanwhile.begin(kProducts * steps_);
    for (int64_t step = 0; step < steps_; ++step) {
      fetch(ahead, kDepth);
      load_left<R>(a);
      load_right<P>(b + 2 * kRight);
      if (step) {
        multiply_registers<R, P>();
      } else {
        multiply_first<R, P>(c, c_stride, add);
      }
      meanwhile.next();
      load_right<P>(b + kRight);
      multiply_held();
      load_left<R>(a + kPartBytes);
      multiply_held();
      load_right<P>(b);
      multiply_held();
      load_left<R>(a + 2 * kPartBytes);
      multiply_held();
      load_left<R>(a);
      multiply_held();
      a += kParts * kPartBytes;
      b += kParts * kRight;
    }
    meanwhile.all();
  }

  int64_t steps_ = 0;
  alignas(64) char left_[Order::kMostRowBytes];
};
