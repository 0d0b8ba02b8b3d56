// What tile units on AMX share: registers 0 and 1 are C, first rows; 2 and 3 the others; 4 and 5 A,
// first rows and others; 6 and 7 B, first vector and second.

// The compiler does not see what tile loads read and tile stores write.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// What this thread has set up. It stays between begin() and end(): to do it anew takes as long as ten
// products.
struct Setup {
  int64_t sessions = 0, rows = 0;
};

inline Setup& setup() {
  thread_local Setup setup;
  return setup;
}

void begin() { ++setup().sessions; }

inline void release(Setup& setup) {
  if (setup.sessions || !setup.rows) return;
  _tile_release();
  setup.rows = 0;
}

void end() {
  --setup().sessions;
  release(setup());
}

// Without work for 0.4 µs the multiplier falls asleep, and to wake it takes 0.3 µs.
inline void stay_awake() {
  if (setup().rows) _tile_dpbf16ps(0, 4, 6);
}

class Amx {
 protected:
  static constexpr int64_t kSide = 16;  // rows of a tile register, and lanes of one of its rows
  static constexpr int64_t kRowBytes = 64;

  ~Amx() {
    store_last();
    release(setup_);
  }

  // For tiles of so many rows; one configuration serves all of them.
  void configure(int64_t rows) {
    if (rows == rows_) return;
    store_last();
    rows_ = rows;
    if (rows == setup_.rows) return;
    setup_.rows = rows;
    const int64_t upper = least(rows, kSide), lower = rows - upper;
    const int64_t sizes[8] = {upper, upper, lower, lower, upper, lower, kSide, kSide};
    Configuration wanted;
    for (int i = 0; i < 8; ++i) {
      wanted.rows[i] = static_cast<uint8_t>(sizes[i]);
      wanted.row_bytes[i] = sizes[i] ? kRowBytes : 0;
    }
    memory_barrier();
    _tile_loadconfig(&wanted);
  }

  int64_t rows() const { return rows_; }

  // Where C of a tile is or will be.
  struct Place {
    float* data;
    int64_t stride;  // bytes
    int64_t vectors;
  };

  // C = or += A · B of what the registers hold, R times sixteen rows by P vectors: the first product of
  // a tile. Only now C of the tile before goes to memory, each register where the next product needs
  // it: stored together, the multiplier would stand still for as long as for five products.
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

  // What a product of no steps gives.
  void clear(float* c, int64_t c_stride, int64_t vectors) {
    store_last();
    for (int64_t i = 0; i < rows_; ++i) {
      float* const row = c + i * c_stride;
      for (int64_t v = 0; v < vectors; ++v) store(row + v * kLanes, Vector{});
    }
  }

  // C of the last tile to memory.
  void store_last() {
    if (!last_.data) return;
    store_register<0>(last_);
    if (last_.vectors == 2) store_register<1>(last_);
    if (rows_ > kSide) store_register<2>(last_);
    if (rows_ > kSide && last_.vectors == 2) store_register<3>(last_);
    memory_barrier();
    last_.data = nullptr;
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

  template <int Register>
  static float* part_of(const Place& c) {
    return c.data + Register / 2 * kSide * (c.stride / 4) + Register % 2 * kLanes;
  }

  // The intrinsics want a literal for a register.
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

  Setup& setup_ = setup();
  int64_t rows_ = 0;
  Place last_{};
};
