// Products on packed panels: a tile of kTileRows rows by kPanel vectors stays in registers.

#include "operands.h"

// What one tile prefetches: `step` bytes further with every lane of k.
struct Prefetch {
  const char* from;
  int64_t step;
};

// Work on the rows of an earlier tile, which a tile unit that can do both at once does in small parts
// while it multiplies, and another one before.
struct Work {
  void (*run)(const Work& self, int64_t first, int64_t last) = nullptr;
  int64_t rows = 0, done = 0;

  // Row after row, evenly spread over so many calls of next().
  void begin(int64_t parts) { parts_ = parts, credit_ = 0; }

  void next() {
    credit_ += rows;
    int64_t last = done;
    for (; credit_ >= parts_ && last < rows; credit_ -= parts_) ++last;
    advance(last);
  }

  void all() { advance(rows); }

 private:
  void advance(int64_t last) {
    if (last > done) run(*this, done, last);
    done = last;
  }

  int64_t parts_ = 1, credit_ = 0;
};

// Where a tile waits for its finish; a constant stride saves every tile the sums of its addresses.
constexpr int64_t kTileStride = kPanel * kLanes;

// The order of a product. Of B so many columns at a time (`span`) as the second cache holds while all
// rows pass. And where the rows of a tile are long, only `chunk` elements of them at a time, so that
// they and a panel share the first cache; the span's tiles wait in memory meanwhile.
struct Order {
  static constexpr int64_t kMostPanels = 8;
  static constexpr int64_t kRowBytes = 16 << 10, kMostRowBytes = 24 << 10;  // of a tile's rows

  int64_t parts = 1, chunk, span;
  int64_t rows;  // of a tile

  explicit Order(const Product& p)
      : chunk(greatest(p.k, 1)), rows(even_share(p.m, kTileRows, kRowStep)) {
    const int64_t row_bytes = kTileRows * p.k * kPackedSize, columns = kPanel * kLanes;
    const int64_t panel_bytes = p.k * columns * kPackedSize + 1;
    int64_t panels = greatest(kSpanBytes / panel_bytes, 1);
    if (row_bytes > kMostRowBytes) {
      constexpr int64_t kUnit = 32;  // elements; whole steps of every tile unit
      parts = (row_bytes + kRowBytes - 1) / kRowBytes;
      chunk = ((p.k + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
      panels = least(panels, kMostPanels);
    }
    const int64_t all = (p.n + columns - 1) / columns;
    span = (all <= panels ? all : even_share(all, panels, 1)) * columns;
  }
};

// Packed rows of a panel, and the scales of its columns if the engine has such.
struct Right {
  const float* rows;
  const float* scales;
};

// What is known of whole vectors of a tile before its rows are finished. What every row asks anew
// costs as much as a row of the product, so what can be is a parameter.
struct Whole {
  const float* tile;
  int64_t vectors;
  char* out;
  int64_t stride;  // bytes
  const char* added;
  int64_t added_stride;
  const float* scales;
  Vector bias[kPanel];
};

// Vector `v` of a row's sums, finished; `scale` and `added` are that row's.
template <Activation A, Dtype D, bool scaled, bool residual>
inline Vector finish_vector(Vector x, const float* scale, Vector bias, const char* added, int v) {
  if (scaled) x *= *scale;
  x = activate(x + bias, A);
  return residual ? x + load(added, v * kLanes, D) : x;
}

#ifdef ADACOMCAT_AMX
#include "amx.h"
#endif
#if defined(ADACOMCAT_AMX_SPLIT)
#include "tile_amx_split.h"
#elif defined(ADACOMCAT_AMX)
#include "tile_amx.h"
#else
#include "tile_registers.h"
#endif

// Calls `visit(column, vectors)` for each panel of C from column `first` to `last`. The last of all is
// one vector wide where that is enough.
template <typename Visit>
inline void for_each_panel(int64_t first, int64_t last, Visit visit) {
  for (int64_t column = first; column < last; column += kPanel * kLanes) {
    visit(column, last - column <= kLanes ? 1 : kPanel);
  }
}

inline const char* left_of(const Product& p, int64_t row) {
  return static_cast<const char*>(p.a) + row * p.a_stride * kOperandSize;
}

// Row `k` of packed B in the panel that starts at `column`.
inline const float* packed_row(const Product& p, int64_t k, int64_t column, int64_t vectors) {
  const int64_t lanes = column * p.b_rows + k * vectors * kLanes;
  return reinterpret_cast<const float*>(static_cast<const char*>(p.b) + lanes * kPackedSize);
}

// The same from row `k` of a product's B on. A product of no steps may have no B.
inline Right right_of(const Product& p, int64_t k, int64_t column, int64_t vectors) {
  static constexpr float kNone[kPanel * kLanes] = {};
  const bool scaled = kScaleRows && p.k;
  return {packed_row(p, p.b_first + k, column, vectors),
          scaled ? packed_row(p, p.b_rows - kScaleRows, column, vectors) : kNone};
}

inline int64_t steps_of(int64_t k) { return (k + kGroup - 1) / kGroup; }

// Gives a tile unit the left side of its next tiles: some rows, from element `k` a chunk of them.
inline void hold(TileUnit& unit, const Product& p, const Order& order, int64_t row, int64_t k) {
  unit.hold(least(order.rows, p.m - row), steps_of(least(order.chunk, p.k - k)),
            left_of(p, row) + k * kOperandSize, p.a_stride * kOperandSize);
}

// So many columns are fetched for together: all, where the second cache holds a product's B and what
// follows it.
inline int64_t fetched_together(const Product& p, const Order& order) {
  const bool whole = p.b_first == 0 && p.k + kDepth > p.b_rows - kScaleRows;
  return whole && p.b_rows * p.n * kPackedSize > kSpanBytes ? order.span : greatest(p.n, 1);
}

// What comes after the columns before `last`: the next ones of B, or what follows it. Of that only as
// much as there is place for.
inline Ahead after(const Product& p, int64_t last, int64_t together) {
  if (!p.ahead.data) return {};  // nothing known, or gone
  if (last < p.n) {
    return {packed_row(p, p.b_first, last, kPanel), p.b_rows * least(together, p.n - last) * kPackedSize};
  }
  Ahead next = p.ahead;
  if (!next.piece) next.bytes = least(next.bytes, kSpanBytes);
  return next;
}

// The part of what comes next that each tile of some columns, in `parts`, prefetches in turn.
class Prefetches {
 public:
  Prefetches(const Product& p, const Order& order, int64_t first, int64_t together)
      : ahead_(after(p, first + together, together)), none_{static_cast<const char*>(p.b), 0} {
    if (!ahead_.bytes || first >= p.n) return;
    const int64_t columns = kPanel * kLanes, parts = order.parts;
    const int64_t panels = (least(together, p.n - first) + columns - 1) / columns;
    const int64_t tiles = (p.m + order.rows - 1) / order.rows * panels;
    share_ = (ahead_.bytes + tiles * parts - 1) / (tiles * parts);
    const int64_t steps = greatest(steps_of(p.k) / parts, 1);
    step_ = (share_ + steps - 1) / steps;
    if (!ahead_.piece) ahead_.piece = ahead_.bytes;
  }

  Prefetch next() {
    if (done_ >= ahead_.bytes) return none_;
    const int64_t piece = done_ / ahead_.piece, offset = done_ % ahead_.piece;
    done_ += share_;
    return {static_cast<const char*>(ahead_.data) + piece * ahead_.stride + offset, step_};
  }

 private:
  Ahead ahead_;
  Prefetch none_;  // an address that is in cache
  int64_t share_ = 0, step_ = 0, done_ = 0;
};

void accumulate(const Product& p, float* sum, int64_t stride, bool add) {
  const Order order(p);
  Prefetches ahead(p, order, 0, p.n);
  TileUnit unit;
  Work none;
  for (int64_t row = 0; row < p.m; row += order.rows) {
    for (int64_t k = 0; k == 0 || k < p.k; k += order.chunk) {
      hold(unit, p, order, row, k);
      for_each_panel(0, p.n, [&](int64_t column, int64_t vectors) {
        unit.multiply<0>(vectors, right_of(p, k, column, vectors), sum + row * stride + column,
                         stride, add || k, ahead.next(), none);
      });
    }
  }
}

template <Activation A, Dtype D, bool scaled, bool residual>
void finish_whole(const Whole& w, int64_t first, int64_t last) {
  const Vector bias[] = {w.bias[0], w.bias[kPanel - 1]};
  const float* tile = w.tile + first * kTileStride;
  char* out = w.out + first * w.stride;
  const char* added = residual ? w.added + first * w.added_stride : nullptr;
  for (int64_t i = first; i < last; ++i) {
    const auto finished = [&](int v) {
      const Vector x = load(tile + v * kLanes);
      return finish_vector<A, D, scaled, residual>(x, scaled ? w.scales + i : nullptr, bias[v], added, v);
    };
    if (w.vectors == 2) {
      store_two(out, 0, D, finished(0), finished(1));
    } else {
      store(out, 0, D, finished(0));
    }
    tile += kTileStride;
    out += w.stride;
    if (residual) added += w.added_stride;
  }
}

// Some rows of one vector column of a tile, of any kind and size.
template <Activation A, Dtype D>
inline void finish_column(const Finish& f, const float* tile, int64_t row, int64_t rows,
                          int64_t column, int64_t count) {
  const Vector bias = f.bias.data ? load_some(f.bias.data, column, f.bias.dtype, count) : Vector{};
  for (int64_t i = 0; i < rows; ++i) {
    Vector x = load(tile + i * kTileStride);
    if (f.sum) x += load(f.sum + (row + i) * f.sum_stride + column);
    if (f.row_scale) x *= f.row_scale[row + i];
    x = activate(x + bias, A);
    if (f.residual.data) {
      x += load_some(f.residual.data, (row + i) * f.residual.stride + column, f.residual.dtype,
                     count);
    }
    store_some(f.out, (row + i) * f.stride + column, D, x, count);
  }
}

// The same where the activation's derivative is asked for.
template <Activation A, Dtype D>
inline void differentiate_column(const Finish& f, const float* tile, int64_t row, int64_t rows,
                                 int64_t column, int64_t count) {
  const bool whole = count == kLanes;
  const Vector bias = f.bias.data ? load_some(f.bias.data, column, f.bias.dtype, count) : Vector{};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t out = (row + i) * f.stride + column;
    const int64_t from = (row + i) * f.gradient.stride + column;
    Vector slope;
    const Vector y = activate(load(tile + i * kTileStride) + bias, A, slope);
    if (whole) {
      store(f.out, out, D, slope * load(f.gradient.data, from, D));
      if (f.activated) store(f.activated, out, D, y);
    } else {
      store_some(f.out, out, D, slope * load_some(f.gradient.data, from, D, count), count);
      if (f.activated) store_some(f.activated, out, D, y, count);
    }
  }
}

template <Activation A, Dtype D>
inline void finish_tile(const Finish& f, const float* tile, int64_t row, int64_t rows,
                        int64_t column, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t count = least(kLanes, columns - j);
    if (f.gradient.data) {
      differentiate_column<A, D>(f, tile + j, row, rows, column + j, count);
    } else {
      finish_column<A, D>(f, tile + j, row, rows, column + j, count);
    }
  }
}

// The tile that was computed last and waits for its finish.
template <Activation A, Dtype D>
class Waiting : public Work {
 public:
  explicit Waiting(const Finish& f) : finish_(f) {}
  ~Waiting() { all(); }

  void take(const float* tile, int64_t row, int64_t count, int64_t column, int64_t columns) {
    tile_ = tile, row_ = row, column_ = column, columns_ = columns;
    rows = count, done = 0;
    if (!vectors_are_whole(columns)) {
      run = &run_any;
      return;
    }
    prepare(tile, row, column, columns);
    run = finish_.residual.data ? &run_whole<false, true>
          : finish_.row_scale   ? &run_whole<true, false>
                                : &run_whole<false, false>;
  }

  // A tile whose sums are still to come, if a tile unit may finish them where it makes them: the most
  // frequent kinds, of a size that fills its registers.
  const Whole* at_once(int64_t row, int64_t count, int64_t column, int64_t columns) {
    constexpr bool frequent = (A == Activation::none || A == Activation::gelu) && D != Dtype::f16;
    const bool plain = !finish_.row_scale && !finish_.residual.data;
    if (!frequent || count != kTileRows || columns != kTileStride || !vectors_are_whole(columns) ||
        (A != Activation::none && !plain)) {
      return nullptr;
    }
    all();
    prepare(nullptr, row, column, columns);
    return &whole_;
  }

 private:
  bool vectors_are_whole(int64_t columns) const {
    const Finish& f = finish_;
    return columns % kLanes == 0 && !f.sum && !f.gradient.data && !(f.row_scale && f.residual.data) &&
           !(f.residual.data && f.residual.dtype != D);
  }

  void prepare(const float* tile, int64_t row, int64_t column, int64_t columns) {
    const Finish& f = finish_;
    const bool scaled = f.row_scale, residual = f.residual.data;
    const int64_t size = dtype_size(D), stride = f.stride * size, added = f.residual.stride * size;
    whole_ = {tile,
              columns / kLanes,
              static_cast<char*>(f.out) + row * stride + column * size,
              stride,
              residual ? static_cast<const char*>(f.residual.data) + row * added + column * size
                       : nullptr,
              added,
              scaled ? f.row_scale + row : nullptr,
              {}};
    for (int64_t v = 0; f.bias.data && v < whole_.vectors; ++v) {
      whole_.bias[v] = load(f.bias.data, column + v * kLanes, f.bias.dtype);
    }
  }

  template <bool scaled, bool residual>
  static void run_whole(const Work& self, int64_t first, int64_t last) {
    finish_whole<A, D, scaled, residual>(static_cast<const Waiting&>(self).whole_, first, last);
  }

  static void run_any(const Work& self, int64_t first, int64_t last) {
    const Waiting& w = static_cast<const Waiting&>(self);
    finish_tile<A, D>(w.finish_, w.tile_ + first * kTileStride, w.row_ + first, last - first,
                      w.column_, w.columns_);
  }

  const Finish& finish_;
  const float* tile_ = nullptr;
  int64_t row_ = 0, column_ = 0, columns_ = 0;
  Whole whole_;
};

// Whether the tile unit made a tile and finished it at once.
template <Activation A, Dtype D, typename Unit>
inline bool finished(const Unit& unit, Waiting<A, D>& waiting, Right right, int64_t row, int64_t rows,
                     int64_t column, int64_t columns, Prefetches& ahead) {
  if constexpr (Unit::kFinishes) {
    const Whole* whole = waiting.at_once(row, rows, column, columns);
    if (whole) unit.template finish<A, D>(right, *whole, ahead.next());
    return whole;
  }
  return false;
}

template <Activation A, Dtype D>
void multiply_with(const Product& p, const Finish& f) {
  const Order order(p);
  // One tile waits while a span's are computed, or the next one.
  alignas(64) float tiles[(Order::kMostPanels + 1) * kTileRows * kTileStride];
  const int64_t places = order.parts > 1 ? Order::kMostPanels + 1 : 2;
  int64_t place = 0;
  const int64_t together = fetched_together(p, order);
  Prefetches ahead(p, order, 0, together);
  Waiting<A, D> waiting(f);
  TileUnit unit;  // goes first, and stores its last tile
  for (int64_t first = 0; first < p.n; first += order.span) {
    const int64_t last = least(p.n, first + order.span);
    if (first && first % together == 0) ahead = Prefetches(p, order, first, together);
    for (int64_t row = 0; row < p.m; row += order.rows) {
      const int64_t start = place;
      for (int64_t k = 0; k == 0 || k < p.k; k += order.chunk) {
        hold(unit, p, order, row, k);
        place = start;
        for_each_panel(first, last, [&](int64_t column, int64_t vectors) {
          const int64_t rows = least(order.rows, p.m - row), columns = least(vectors * kLanes, p.n - column);
          const Right right = right_of(p, k, column, vectors);
          if (order.parts == 1 && finished(unit, waiting, right, row, rows, column, columns, ahead)) return;
          float* const tile = tiles + place * kTileRows * kTileStride;
          unit.multiply<kTileStride>(vectors, right, tile, kTileStride, k > 0, ahead.next(), waiting);
          if (k + order.chunk >= p.k) waiting.take(tile, row, rows, column, columns);
          place = (place + 1) % places;
        });
      }
    }
  }
}

template <Activation A>
void multiply_to(const Product& p, const Finish& f) {
  if (f.dtype == Dtype::f32) return multiply_with<A, Dtype::f32>(p, f);
  if (f.dtype == Dtype::bf16) return multiply_with<A, Dtype::bf16>(p, f);
  multiply_with<A, Dtype::f16>(p, f);
}

void multiply(const Product& p, const Finish& f) {
  switch (f.activation) {
    case Activation::gelu:
      return multiply_to<Activation::gelu>(p, f);
    case Activation::gelu_tanh:
      return multiply_to<Activation::gelu_tanh>(p, f);
    case Activation::silu:
      return multiply_to<Activation::silu>(p, f);
    case Activation::relu:
      return multiply_to<Activation::relu>(p, f);
    case Activation::none:
      return multiply_to<Activation::none>(p, f);
  }
}
