// The loops of one product around the micro-kernel: over nc columns, mr rows, kc of k and panels. They
// decide what the micro-kernel prefetches and whether a tile's epilogue is fused or deferred.

inline const char* lhs_row(const Gemm& p, int64_t row) {
  return static_cast<const char*>(p.lhs) + row * p.lhs_stride * kOperandSize;
}

// Row `k` of the packed rhs, in the panel that starts at `column`.
inline const float* packed_row(const Gemm& p, int64_t k, int64_t column, int64_t vectors) {
  const int64_t lanes = column * p.rhs_rows + k * vectors * kLanes;
  return reinterpret_cast<const float*>(static_cast<const char*>(p.rhs) + lanes * kPackedSize);
}

// That panel from row `k` of the product's B on. If k is 0 there may be no rhs.
inline PackedRhs packed_panel(const Gemm& p, int64_t k, int64_t column, int64_t vectors) {
  static constexpr float kNone[kPanelVectors * kLanes] = {};
  const bool scaled = kScaleRows && p.k;
  return {packed_row(p, p.rhs_first + k, column, vectors),
          scaled ? packed_row(p, p.rhs_rows - kScaleRows, column, vectors) : kNone};
}

inline int64_t steps_of(int64_t k) { return (k + kGroup - 1) / kGroup; }

// Gives the micro-kernel the lhs of its next tiles: mr rows from `row` on, kc elements from `k` on.
inline void set_lhs(MicroKernel& kernel, const Gemm& p, const Blocking& blocking, int64_t row,
                    int64_t k) {
  kernel.set_lhs(least(blocking.mr, p.m - row), steps_of(least(blocking.kc, p.k - k)),
                 lhs_row(p, row) + k * kOperandSize, p.lhs_stride * kOperandSize);
}

// The columns during which one piece of memory is prefetched: an nc, or all columns if the second cache
// holds the whole rhs and what follows it.
inline int64_t prefetch_columns(const Gemm& p, const Blocking& blocking) {
  const bool whole = p.rhs_first == 0 && p.k + kKMultiple > p.rhs_rows - kScaleRows;
  return whole && p.rhs_rows * p.n * kPackedSize > kRhsBytes ? blocking.nc : greatest(p.n, 1);
}

// What is needed after the columns before `last`: the next columns of the rhs, or what the caller
// names, up to what the cache has place for. Nothing if the caller names nothing.
inline PrefetchHint needed_after(const Gemm& p, int64_t last, int64_t together) {
  if (!p.prefetch.data) return {};
  if (last < p.n) {
    return {packed_row(p, p.rhs_first, last, kPanelVectors),
            p.rhs_rows * least(together, p.n - last) * kPackedSize};
  }
  PrefetchHint next = p.prefetch;
  if (!next.piece) next.bytes = least(next.bytes, kRhsBytes);
  return next;
}

// Divides what is needed after `together` columns from `first` on over the tiles of these columns.
class PrefetchSchedule {
 public:
  PrefetchSchedule(const Gemm& p, const Blocking& blocking, int64_t first, int64_t together)
      : hint_(needed_after(p, first + together, together)),
        none_{static_cast<const char*>(p.rhs), 0} {
    if (!hint_.bytes || first >= p.n) return;
    const int64_t columns = kPanelVectors * kLanes, k_blocks = blocking.k_blocks;
    const int64_t panels = (least(together, p.n - first) + columns - 1) / columns;
    const int64_t tiles = (p.m + blocking.mr - 1) / blocking.mr * panels;
    share_ = (hint_.bytes + tiles * k_blocks - 1) / (tiles * k_blocks);
    const int64_t steps = greatest(p.k / kPackedGroup / k_blocks, 1);
    step_ = (share_ + steps - 1) / steps;
    if (!hint_.piece) hint_.piece = hint_.bytes;
  }

  Prefetch next() {
    if (done_ >= hint_.bytes) return none_;
    const int64_t piece = done_ / hint_.piece, offset = done_ % hint_.piece;
    done_ += share_;
    return {static_cast<const char*>(hint_.data) + piece * hint_.stride + offset, step_};
  }

 private:
  PrefetchHint hint_;
  Prefetch none_;  // an address that is in cache
  int64_t share_ = 0, step_ = 0, done_ = 0;
};

void accumulate(const Gemm& p, float* sum, int64_t stride, bool add) {
  const Blocking blocking(p);
  PrefetchSchedule prefetches(p, blocking, 0, p.n);
  MicroKernel kernel;
  RowWork none;
  for (int64_t row = 0; row < p.m; row += blocking.mr) {
    for (int64_t k = 0; k == 0 || k < p.k; k += blocking.kc) {
      set_lhs(kernel, p, blocking, row, k);
      for_each_panel(0, p.n, [&](int64_t column, int64_t vectors) {
        kernel.multiply<0>(vectors, packed_panel(p, k, column, vectors),
                           sum + row * stride + column, stride, add || k, prefetches.next(), none);
      });
    }
  }
}

// Computes a tile with its epilogue fused. False if this tile or this micro-kernel does not allow it.
template <Activation A, Dtype D, typename Kernel>
inline bool multiply_fused(const Kernel& kernel, DeferredEpilogue<A, D>& epilogue, PackedRhs rhs,
                           int64_t row, int64_t rows, int64_t column, int64_t columns,
                           PrefetchSchedule& prefetches) {
  if constexpr (Kernel::kFusesEpilogue) {
    const FullTile* full = epilogue.fused(row, rows, column, columns);
    if (full) kernel.template multiply_fused<A, D>(rhs, *full, prefetches.next());
    return full;
  }
  return false;
}

template <Activation A, Dtype D>
void multiply_with(const Gemm& p, const Epilogue& f) {
  const Blocking blocking(p);
  if (!p.k) {
    for (int64_t row = 0; row < p.m; row += blocking.mr) {
      epilogue_of_tile<A, D>(f, nullptr, row, least(blocking.mr, p.m - row), 0, p.n);
    }
    return;
  }
  // Besides those of an nc that are being summed, or the one that is being computed, one tile waits for
  // its deferred epilogue.
  alignas(64) float tiles[(Blocking::kMostPanels + 1) * kTileRows * kTileStride];
  const int64_t places = blocking.k_blocks > 1 ? Blocking::kMostPanels + 1 : 2;
  int64_t place = 0;
  const int64_t together = prefetch_columns(p, blocking);
  PrefetchSchedule prefetches(p, blocking, 0, together);
  DeferredEpilogue<A, D> epilogue(f);
  MicroKernel kernel;  // destroyed before the epilogue: on AMX it then stores its last tile
  for (int64_t first = 0; first < p.n; first += blocking.nc) {
    const int64_t last = least(p.n, first + blocking.nc);
    if (first && first % together == 0) prefetches = PrefetchSchedule(p, blocking, first, together);
    for (int64_t row = 0; row < p.m; row += blocking.mr) {
      const int64_t start = place;
      for (int64_t k = 0; k < p.k; k += blocking.kc) {
        set_lhs(kernel, p, blocking, row, k);
        place = start;
        for_each_panel(first, last, [&](int64_t column, int64_t vectors) {
          const int64_t rows = least(blocking.mr, p.m - row);
          const int64_t columns = least(vectors * kLanes, p.n - column);
          const PackedRhs rhs = packed_panel(p, k, column, vectors);
          if (blocking.k_blocks == 1 &&
              multiply_fused(kernel, epilogue, rhs, row, rows, column, columns, prefetches)) {
            return;
          }
          float* const tile = tiles + place * kTileRows * kTileStride;
          kernel.multiply<kTileStride>(vectors, rhs, tile, kTileStride, k > 0, prefetches.next(),
                                       epilogue);
          if (k + blocking.kc >= p.k) epilogue.defer(tile, row, rows, column, columns);
          place = (place + 1) % places;
        });
      }
    }
  }
}

template <Activation A>
void multiply_to(const Gemm& p, const Epilogue& f) {
  if (f.dtype == Dtype::f32) return multiply_with<A, Dtype::f32>(p, f);
  if (f.dtype == Dtype::bf16) return multiply_with<A, Dtype::bf16>(p, f);
  multiply_with<A, Dtype::f16>(p, f);
}

void multiply(const Gemm& p, const Epilogue& f) {
  switch (f.activation) {
    case Activation::gelu:
      return multiply_to<Activation::gelu>(p, f);
    case Activation::gelu_tanh:
      return multiply_to<Activation::gelu_tanh>(p, f);
    case Activation::silu:
      return multiply_to<Activation::silu>(p, f);
    case Activation::relu:
      return multiply_to<Activation::relu>(p, f);
    case Activation::quick_gelu:
      return multiply_to<Activation::quick_gelu>(p, f);
    case Activation::none:
      return multiply_to<Activation::none>(p, f);
  }
}
