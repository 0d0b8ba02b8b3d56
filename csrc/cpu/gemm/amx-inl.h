// What the AMX micro-kernels share. Of the eight tile registers, 0 and 1 hold the first sixteen rows of
// C (first and second vector), 2 and 3 the other rows; 4 and 5 hold the first and the other rows of the
// lhs; 6 and 7 the first and second vector of the rhs.

// The compiler does not see what tile loads read and tile stores write.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// The configuration of this thread's tile registers, for tiles of `rows` rows. It is kept between begin()
// and end(), since configuring takes as long as ten tile products.
struct TileConfiguration {
  int64_t sessions = 0, rows = 0;
};

inline TileConfiguration& configuration() {
  thread_local TileConfiguration configuration;
  return configuration;
}

void begin() { ++configuration().sessions; }

inline void release(TileConfiguration& configuration) {
  if (configuration.sessions || !configuration.rows) return;
  _tile_release();
  configuration.rows = 0;
}

void end() {
  --configuration().sessions;
  release(configuration());
}

// After 0.4 µs without work the tile multiplier sleeps, and waking it takes 0.3 µs: this gives it work.
inline void stay_awake() {
  if (configuration().rows) _tile_dpbf16ps(0, 4, 6);
}

// The base of a micro-kernel `Kernel` that has a member function run<R, P>() for a tile of R times sixteen
// rows by P vectors, and steps_, the steps of its loop over k.
template <typename Kernel>
class AmxKernel {
 public:
  static constexpr bool kFusesEpilogue = false;  // tile registers are read through memory only

  // c (rows, `vectors` vectors) = lhs · rhs, or += it. The deferred work is done in between.
  template <int64_t S>
  void multiply(int64_t vectors, PackedRhs rhs, float* c, int64_t c_stride, bool add,
                Prefetch prefetch, RowWork& deferred) {
    Kernel& kernel = static_cast<Kernel&>(*this);
    if (!kernel.steps_) {
      if (!add) clear(c, S ? S : c_stride, vectors);
      return deferred.all();
    }
    const bool wide = vectors == kPanelVectors;
    // Called by a pointer, so that each size is compiled apart: inlined, tiles with GELU take 13 % longer.
    const auto run = rows() > kSide
                         ? (wide ? &Kernel::template run<2, 2> : &Kernel::template run<2, 1>)
                         : (wide ? &Kernel::template run<1, 2> : &Kernel::template run<1, 1>);
    (kernel.*run)(rhs.rows, c, S ? S : c_stride, add, prefetch, deferred);
  }

 protected:
  static constexpr int64_t kSide = 16;  // rows of a tile register, and lanes of one of its rows
  static constexpr int64_t kRowBytes = 64;

  ~AmxKernel() {
    store_last();
    release(configuration_);
  }

  // Configures the registers for tiles of `rows` rows.
  void configure(int64_t rows) {
    if (rows == rows_) return;
    store_last();
    rows_ = rows;
    if (rows == configuration_.rows) return;
    configuration_.rows = rows;
    const int64_t upper = least(rows, kSide), lower = rows - upper;
    const int64_t sizes[8] = {upper, upper, lower, lower, upper, lower, kSide, kSide};
    Layout wanted;
    for (int i = 0; i < 8; ++i) {
      wanted.rows[i] = static_cast<uint8_t>(sizes[i]);
      wanted.row_bytes[i] = sizes[i] ? kRowBytes : 0;
    }
    memory_barrier();
    _tile_loadconfig(&wanted);
  }

  int64_t rows() const { return rows_; }

  // Where a tile of C is stored.
  struct Place {
    float* data;
    int64_t stride;  // bytes
    int64_t vectors;
  };

  // The first product of a tile, of R times sixteen rows by P vectors: C = lhs · rhs, or += it. Only now
  // each register of C stores its part of the tile before, right before it is overwritten. Storing all
  // four together would leave the multiplier idle for as long as five products take.
  template <int R, int P>
  void multiply_first(float* c, int64_t c_stride, bool add) {
    if (last_.data && last_.vectors != P) store_last();
    const Place next{c, c_stride * 4, P};
    memory_barrier();
    exchange<0>(next, add);
    _tile_dpbf16ps(0, 4, 6);
    if (P == 2) exchange<1>(next, add);
    if (P == 2) _tile_dpbf16ps(1, 4, 7);
    if (R == 2) exchange<2>(next, add);
    if (R == 2) _tile_dpbf16ps(2, 5, 6);
    if (R == 2 && P == 2) exchange<3>(next, add);
    if (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
    memory_barrier();
    last_ = next;
  }

  template <int R, int P>
  static void multiply_registers() {
    _tile_dpbf16ps(0, 4, 6);
    if (P == 2) _tile_dpbf16ps(1, 4, 7);
    if (R == 2) _tile_dpbf16ps(2, 5, 6);
    if (R == 2 && P == 2) _tile_dpbf16ps(3, 5, 7);
  }

  // C of a product with k = 0.
  void clear(float* c, int64_t c_stride, int64_t vectors) {
    store_last();
    for (int64_t i = 0; i < rows_; ++i) {
      float* const row = c + i * c_stride;
      for (int64_t v = 0; v < vectors; ++v) store(row + v * kLanes, Vector{});
    }
  }

  // Stores C of the last tile.
  void store_last() {
    if (!last_.data) return;
    store_register<0>(last_);
    if (last_.vectors == 2) store_register<1>(last_);
    if (rows_ > kSide) store_register<2>(last_);
    if (rows_ > kSide && last_.vectors == 2) store_register<3>(last_);
    memory_barrier();
    last_.data = nullptr;
  }

  // Issues the prefetches of `lanes` lanes of k.
  static void issue(Prefetch& prefetch, int64_t lanes) {
    const char* const end = prefetch.from + lanes * prefetch.step;
    for (; prefetch.from < end; prefetch.from += kRowBytes) __builtin_prefetch(prefetch.from, 0, 2);
  }

 private:
  // The operand of LDTILECFG.
  struct Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  template <int Register>
  static float* part_of(const Place& c) {
    return c.data + Register / 2 * kSide * (c.stride / 4) + Register % 2 * kLanes;
  }

  // Inline assembly, since the intrinsics take no template parameter for a register.
  template <int Register>
  static void store_register(const Place& c) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Register), "r"(part_of<Register>(c)),
                     "r"(c.stride)
                     : "memory");
  }

  template <int Register>
  void exchange(const Place& next, bool add) const {
    if (last_.data) store_register<Register>(last_);
    if (add) {
      __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Register),
                       "r"(part_of<Register>(next)), "r"(next.stride)
                       : "memory");
    } else {
      __asm__ volatile("tilezero %%tmm%c0" ::"i"(Register));
    }
  }

  TileConfiguration& configuration_ = configuration();
  int64_t rows_ = 0;
  Place last_{};
};
