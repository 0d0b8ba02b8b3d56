// Products on packed panels: a tile of kTileRows rows by kPanel vectors stays in registers.

#ifdef ADACOMCAT_BF16_DOT
constexpr int kGroup = 2;
typedef uint32_t Lane;  // two consecutive k
inline Lane read_lane(const void* a) {
  Lane lane;
  __builtin_memcpy(&lane, a, sizeof lane);
  return lane;
}
inline Vector multiply_add(Vector sum, Lane a, Vector b) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
constexpr Dtype kOperand = Dtype::bf16;
constexpr int kOperandSize = 2;
#else
constexpr int kGroup = 1;
inline float read_lane(const void* a) { return *static_cast<const float*>(a); }
inline Vector multiply_add(Vector sum, float a, Vector b) { return sum + a * b; }
constexpr Dtype kOperand = Dtype::f32;
constexpr int kOperandSize = 4;
#endif
constexpr int kStep = kGroup * kOperandSize;  // bytes of one lane of A

// What one tile prefetches: `step` bytes further with every lane of k.
struct Prefetch {
  const char* from;
  int64_t step;
};

// Where a tile waits for its finish; a constant stride saves every tile the sums of its addresses.
constexpr int64_t kTileStride = kPanel * kLanes;

#ifdef ADACOMCAT_AMX
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

// The order of a product. Of B so many columns at a time (`span`) as the second cache holds while all
// rows pass. And where the rows of a tile are long, only `chunk` elements of them at a time, so that
// they and a panel share the first cache; the span's tiles wait in memory meanwhile.
struct Order {
  static constexpr int64_t kMostPanels = 8, kSpanBytes = 1 << 20;
  static constexpr int64_t kRowBytes = 16 << 10, kMostRowBytes = 24 << 10;  // of a tile's rows

  int64_t parts = 1, chunk, span;

  explicit Order(const Product& p) : chunk(p.k) {
    const int64_t row_bytes = kTileRows * p.k * kOperandSize, columns = kPanel * kLanes;
    const int64_t panel_bytes = p.k * columns * kOperandSize + 1;
    int64_t panels = greatest(kSpanBytes / panel_bytes, 1);
    if (row_bytes > kMostRowBytes) {
      constexpr int64_t kUnit = 32;  // elements; whole steps of every tile unit
      parts = (row_bytes + kRowBytes - 1) / kRowBytes;
      chunk = ((p.k + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
      panels = least(panels, kMostPanels);
    }
    span = panels * columns;
  }
};

inline const char* left_of(const Product& p, int64_t row) {
  return static_cast<const char*>(p.a) + row * p.a_stride * kOperandSize;
}

inline const float* right_of(const Product& p, int64_t column, int64_t vectors) {
  const int64_t lanes = column * p.b_rows + p.b_first * vectors * kLanes;
  return reinterpret_cast<const float*>(static_cast<const char*>(p.b) + lanes * kOperandSize);
}

inline int64_t steps_of(int64_t k) { return (k + kGroup - 1) / kGroup; }

// The part of p.ahead that each of a tile's `parts` prefetches, in turn.
class Prefetches {
 public:
  explicit Prefetches(const Product& p, int64_t parts = 1)
      : ahead_(p.ahead), none_{static_cast<const char*>(p.b), 0} {
    if (!ahead_.data) ahead_.bytes = 0;  // nothing known, or gone
    if (!ahead_.bytes) return;
    const int64_t columns = kPanel * kLanes;
    const int64_t tiles = (p.m + kTileRows - 1) / kTileRows * ((p.n + columns - 1) / columns);
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
  Prefetches ahead(p);
  TileUnit unit;
  for (int64_t row = 0; row < p.m; row += kTileRows) {
    for_each_panel(0, p.n, [&](int64_t column, int64_t vectors) {
      unit.multiply<0>(least(kTileRows, p.m - row), vectors, steps_of(p.k), left_of(p, row),
                       p.a_stride * kOperandSize, right_of(p, column, vectors),
                       sum + row * stride + column, stride, add, ahead.next());
    });
  }
}

// A whole vector column of a tile, all its rows. What every row asks anew costs as much as a row of
// the product, so all that is known before is a parameter.
template <Activation A, Dtype D, bool scaled, bool residual>
inline void finish_rows(const float* tile, int64_t rows, Vector bias, const float* scales, char* out,
                        int64_t stride, const char* added, int64_t added_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    Vector x = load(tile);
    if (scaled) x *= scales[i];
    x = activate(x + bias, A);
    if (residual) x += load(added, 0, D);
    store(out, 0, D, x);
    tile += kTileStride;
    out += stride;
    if (residual) added += added_stride;
  }
}

// One vector column of a tile, all its rows: the bias stays in a register.
template <Activation A, Dtype D>
inline void finish_column(const Finish& f, const float* tile, int64_t row, int64_t rows,
                          int64_t column, int64_t count) {
  const Vector bias = f.bias.data ? load_some(f.bias.data, column, f.bias.dtype, count) : Vector{};
  const bool scaled = f.row_scale, residual = f.residual.data;
  if (count == kLanes && !f.sum && !(scaled && residual) && (!residual || f.residual.dtype == D)) {
    const int64_t size = dtype_size(D), stride = f.stride * size;
    char* out = static_cast<char*>(f.out) + row * stride + column * size;
    const int64_t added_stride = f.residual.stride * size;
    const char* added = static_cast<const char*>(f.residual.data);
    if (residual) added += row * added_stride + column * size;
    const float* scales = scaled ? f.row_scale + row : nullptr;
    const auto finish = residual ? &finish_rows<A, D, false, true>
                        : scaled ? &finish_rows<A, D, true, false>
                                 : &finish_rows<A, D, false, false>;
    return finish(tile, rows, bias, scales, out, stride, added, added_stride);
  }
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

// The tiles of some rows and the columns from `first` to `last`, part after part.
template <Activation A, Dtype D>
inline void multiply_span(const Product& p, const Finish& f, const Order& order, TileUnit& unit,
                          Prefetches& ahead, int64_t row, int64_t first, int64_t last) {
  alignas(64) float tiles[Order::kMostPanels * kTileRows * kTileStride];
  const int64_t rows = least(kTileRows, p.m - row);
  for (int64_t k = 0;; k += order.chunk) {
    const int64_t steps = steps_of(least(order.chunk, p.k - k));
    const bool done = k + order.chunk >= p.k;
    float* tile = tiles;
    for_each_panel(first, last, [&](int64_t column, int64_t vectors) {
      const float* right = right_of(p, column, vectors) + k / kGroup * vectors * kLanes;
      unit.template multiply<kTileStride>(
          rows, vectors, steps, left_of(p, row) + k * kOperandSize, p.a_stride * kOperandSize,
          right, tile, kTileStride, k > 0, ahead.next());
      if (done) {
        finish_tile<A, D>(f, tile, row, rows, column, least(vectors * kLanes, p.n - column));
      }
      if (order.parts > 1) tile += kTileRows * kTileStride;
    });
    if (done) return;
  }
}

template <Activation A, Dtype D>
void multiply_with(const Product& p, const Finish& f) {
  const Order order(p);
  Prefetches ahead(p, order.parts);
  TileUnit unit;
  for (int64_t first = 0; first < p.n; first += order.span) {
    for (int64_t row = 0; row < p.m; row += kTileRows) {
      multiply_span<A, D>(p, f, order, unit, ahead, row, first, least(p.n, first + order.span));
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

inline float read_one(const void* p, int64_t i, Dtype dtype) {
  return load_some(p, i, dtype, 1)[0];
}

inline void write_operand(void* out, int64_t i, float x) {
  store_some(out, i, kOperand, broadcast(x), 1);
}

// Panel after panel; in a panel, group after group of rows; in a group, lane after lane.
void pack(int64_t k, int64_t n, const void* b, int64_t row, int64_t column, Dtype dtype,
          void* packed) {
  const int64_t size = dtype_size(dtype), padded = (k + kGroup - 1) / kGroup * kGroup;
  const bool copy = dtype == kOperand;
  int64_t at = 0;
  for (int64_t first = 0; first < n; first += kPanel * kLanes) {
    const int64_t lanes = n - first <= kLanes ? kLanes : kPanel * kLanes;
    const int64_t columns = least(lanes, n - first);
    for (int64_t i = 0; i < padded; i += kGroup) {
      if (copy && row == 1 && i + kGroup <= k) {  // a lane's rows lie side by side
        char* out = static_cast<char*>(packed) + at * kOperandSize;
        const char* from = static_cast<const char*>(b) + (i + first * column) * size;
        for (int64_t j = 0; j < columns; ++j) {
          __builtin_memcpy(out + j * kStep, from + j * column * size, kStep);
        }
        __builtin_memset(out + columns * kStep, 0, (lanes - columns) * kStep);
        at += lanes * kGroup;
        continue;
      }
#ifdef ADACOMCAT_BF16_DOT
      if (copy && column == 1 && i + kGroup <= k && columns == lanes) {  // rows in pairs, whole
        auto* out = reinterpret_cast<uint32_t*>(packed) + at / kGroup;
        const auto* from = static_cast<const uint16_t*>(b) + i * row + first;
        for (int64_t j = 0; j < lanes; ++j) out[j] = from[j] | uint32_t{from[row + j]} << 16;
        at += lanes * kGroup;
        continue;
      }
#endif
      for (int g = 0; g < kGroup; ++g) {
        char* out = static_cast<char*>(packed) + (at + g) * kOperandSize;
        const char* from = static_cast<const char*>(b) + ((i + g) * row + first * column) * size;
        const int64_t filled = i + g < k ? columns : 0;
        if (copy && kGroup == 1 && column == 1) {
          __builtin_memcpy(out, from, filled * kOperandSize);
        } else if (copy) {
          for (int64_t j = 0; j < filled; ++j) {
            __builtin_memcpy(out + j * kStep, from + j * column * size, kOperandSize);
          }
        } else {
          for (int64_t j = 0; j < filled; ++j) {
            write_operand(out + j * kStep, 0, read_one(from, j * column, dtype));
          }
        }
        for (int64_t j = filled; j < lanes; ++j) __builtin_memset(out + j * kStep, 0, kOperandSize);
      }
      at += lanes * kGroup;
    }
  }
}
