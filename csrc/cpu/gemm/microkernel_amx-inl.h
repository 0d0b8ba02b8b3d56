// The micro-kernel on AMX: up to 32 rows by two vectors of C in four tile registers, 32 elements of k at
// a time. AMX takes its rhs as pairs of bfloat16, which is how panels are packed.

class MicroKernel : public AmxKernel<MicroKernel> {
  friend AmxKernel;

 public:
  void set_lhs(int64_t rows, int64_t steps, const char* a, int64_t a_stride) {
    configure(rows);
    steps_ = steps, a_ = a, a_stride_ = a_stride;
  }

 private:
  template <int R, int P>
  void run(const float* b, float* c, int64_t c_stride, bool add, Prefetch prefetch,
           RowWork& deferred) {
    const char* a = a_;
    const int64_t whole = steps_ / kSide, rest = steps_ % kSide;
    deferred.begin(whole);
    for (int64_t step = 0; step < whole; ++step) {
      issue(prefetch, kSide);
      load_sides<R, P>(a, a_stride_, b);
      if (step) {
        multiply_registers<R, P>();
      } else {
        multiply_first<R, P>(c, c_stride, add);
      }
      deferred.next();
      a += kSide * kLaneBytes;
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
    deferred.all();
  }

  template <int R, int P>
  static void load_sides(const void* a, int64_t a_stride, const float* b) {
    _tile_loadd(6, b, P * kRowBytes);
    _tile_loadd(4, a, a_stride);
    if (P == 2) _tile_loadd(7, b + kLanes, P * kRowBytes);
    if (R == 2) _tile_loadd(5, static_cast<const char*>(a) + kSide * a_stride, a_stride);
  }

  // The last steps, fewer than a register holds. Beyond them nothing of the lhs is read, and the rhs is
  // padded with zeros.
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
