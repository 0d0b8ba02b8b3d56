// Products on packed panels: a tile of kTileRows rows by kPanel vectors stays in registers.

#include "operands.h"
#include "finish.h"

// What one tile prefetches: `step` bytes further with every lane of k.
struct Prefetch {
  const char* from;
  int64_t step;
};

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
  if (!p.k) {
    for (int64_t row = 0; row < p.m; row += order.rows) {
      finish_tile<A, D>(f, nullptr, row, least(order.rows, p.m - row), 0, p.n);
    }
    return;
  }
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
      for (int64_t k = 0; k < p.k; k += order.chunk) {
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
