// The epilogue of a tile of C: its sums are scaled, biased, activated, added to a residual and stored.
//
// Three ways lead here. A micro-kernel that can applies the epilogue of a full tile in its registers
// (fused). Else the tile goes to memory and its epilogue is deferred: it runs before the next tile, or,
// on AMX, in small parts while the next tile is multiplied. Tiles of other sizes and rare kinds of
// epilogue take the general way, vector column by vector column.

// Work on the rows of an earlier tile. A micro-kernel that multiplies outside the vector units does it
// in small parts in between; the others do all of it first.
struct RowWork {
  void (*run)(const RowWork& self, int64_t first, int64_t last) = nullptr;
  int64_t rows = 0, done = 0;

  // Spreads the rows evenly over this many calls of next().
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

// The stride of tiles in memory. That it is constant saves computing addresses in every tile.
constexpr int64_t kTileStride = kPanelVectors * kLanes;

// The epilogue of a tile of whole vectors, resolved to pointers before its rows are processed. Whatever
// can be decided before is a template parameter: a branch in every row costs as much as a row of C.
struct FullTile {
  const float* tile;
  int64_t vectors;
  char* out;
  int64_t stride;  // bytes
  const char* residual;
  int64_t residual_stride;  // bytes
  const float* scales;
  Vector bias[kPanelVectors];
};

// The epilogue of vector `v` of a row; `scale` and `added` (a residual) are that row's.
template <Activation A, Dtype D, bool scaled, bool residual>
inline Vector apply_epilogue(Vector x, const float* scale, Vector bias, const char* added, int v) {
  if (scaled) x *= *scale;
  x = activate(x + bias, A);
  return residual ? x + load(added, v * kLanes, D) : x;
}

// Rows `first` to `last` of a tile of whole vectors.
template <Activation A, Dtype D, bool scaled, bool residual>
void epilogue_of_full_tile(const FullTile& w, int64_t first, int64_t last) {
  const Vector bias[] = {w.bias[0], w.bias[kPanelVectors - 1]};
  const float* tile = w.tile + first * kTileStride;
  char* out = w.out + first * w.stride;
  const char* added = residual ? w.residual + first * w.residual_stride : nullptr;
  for (int64_t i = first; i < last; ++i) {
    const auto result = [&](int v) {
      const Vector x = load(tile + v * kLanes);
      return apply_epilogue<A, D, scaled, residual>(x, scaled ? w.scales + i : nullptr, bias[v],
                                                    added, v);
    };
    if (w.vectors == 2) {
      store_two(out, 0, D, result(0), result(1));
    } else {
      store(out, 0, D, result(0));
    }
    tile += kTileStride;
    out += w.stride;
    if (residual) added += w.residual_stride;
  }
}

// No tile means that k is 0: its sums are zeros.
inline Vector load_sums(const float* tile, int64_t row) {
  return tile ? load(tile + row * kTileStride) : Vector{};
}

// `rows` rows of one vector column, of which `count` lanes are columns of C.
template <Activation A, Dtype D>
inline void epilogue_of_column(const Epilogue& f, const float* tile, int64_t row, int64_t rows,
                               int64_t column, int64_t count) {
  const Vector bias = f.bias.data ? load_some(f.bias.data, column, f.bias.dtype, count) : Vector{};
  for (int64_t i = 0; i < rows; ++i) {
    Vector x = load_sums(tile, i);
    if (f.sum) x += load(f.sum + (row + i) * f.sum_stride + column);
    if (f.row_scale) x *= f.row_scale[row + i];
    x = activate(x + bias, A);
    if (f.factor.data) {
      x *= load_some(f.factor.data, (row + i) * f.factor.stride + column, f.factor.dtype, count);
    }
    if (f.residual.data) {
      x += load_some(f.residual.data, (row + i) * f.residual.stride + column, f.residual.dtype,
                     count);
    }
    store_some(f.out, (row + i) * f.stride + column, D, x, count);
  }
}

// The same for an epilogue with the activation's derivative.
template <Activation A, Dtype D>
inline void gradient_of_column(const Epilogue& f, const float* tile, int64_t row, int64_t rows,
                               int64_t column, int64_t count) {
  const bool whole = count == kLanes;
  const Vector bias = f.bias.data ? load_some(f.bias.data, column, f.bias.dtype, count) : Vector{};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t out = (row + i) * f.stride + column;
    const int64_t from = (row + i) * f.gradient.stride + column;
    Vector activation_grad;
    const Vector y = activate(load_sums(tile, i) + bias, A, activation_grad);
    if (whole) {
      store(f.out, out, D, activation_grad * load(f.gradient.data, from, D));
      if (f.activated) store(f.activated, out, D, y);
    } else {
      store_some(f.out, out, D, activation_grad * load_some(f.gradient.data, from, D, count),
                 count);
      if (f.activated) store_some(f.activated, out, D, y, count);
    }
  }
}

// A tile of any size, with any epilogue.
template <Activation A, Dtype D>
inline void epilogue_of_tile(const Epilogue& f, const float* tile, int64_t row, int64_t rows,
                             int64_t column, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t count = least(kLanes, columns - j);
    const float* const from = tile ? tile + j : nullptr;
    if (f.gradient.data) {
      gradient_of_column<A, D>(f, from, row, rows, column + j, count);
    } else {
      epilogue_of_column<A, D>(f, from, row, rows, column + j, count);
    }
  }
}

// The kinds of epilogue that are compiled into the micro-kernel: the most frequent ones.
template <Activation A, Dtype D>
constexpr bool kFused = (A == Activation::none || A == Activation::gelu) && D != Dtype::f16;

// The epilogue of the tile that was computed last.
template <Activation A, Dtype D>
class DeferredEpilogue : public RowWork {
 public:
  explicit DeferredEpilogue(const Epilogue& f) : epilogue_(f) {}
  ~DeferredEpilogue() { all(); }

  // Defers the epilogue of a tile of `count` rows.
  void defer(const float* tile, int64_t row, int64_t count, int64_t column, int64_t columns) {
    tile_ = tile, row_ = row, column_ = column, columns_ = columns;
    rows = count, done = 0;
    if (!has_whole_vectors(columns)) {
      run = &run_any;
      return;
    }
    prepare(tile, row, column, columns);
    run = epilogue_.residual.data ? &run_full<false, true>
          : epilogue_.row_scale   ? &run_full<true, false>
                                  : &run_full<false, false>;
  }

  // The epilogue to fuse with the computation of a tile, if that is possible: the tile fills the
  // registers, and the kind is compiled in. Null otherwise.
  const FullTile* fused(int64_t row, int64_t count, int64_t column, int64_t columns) {
    const bool plain = !epilogue_.row_scale && !epilogue_.residual.data;
    if (!kFused<A, D> || count != kTileRows || columns != kTileStride ||
        !has_whole_vectors(columns) || (A != Activation::none && !plain)) {
      return nullptr;
    }
    all();
    prepare(nullptr, row, column, columns);
    return &full_;
  }

 private:
  bool has_whole_vectors(int64_t columns) const {
    const Epilogue& f = epilogue_;
    return columns % kLanes == 0 && !f.sum && !f.gradient.data && !f.factor.data &&
           !(f.row_scale && f.residual.data) && !(f.residual.data && f.residual.dtype != D);
  }

  void prepare(const float* tile, int64_t row, int64_t column, int64_t columns) {
    const Epilogue& f = epilogue_;
    const bool scaled = f.row_scale, residual = f.residual.data;
    const int64_t size = dtype_size(D), stride = f.stride * size, added = f.residual.stride * size;
    full_ = {tile,
             columns / kLanes,
             static_cast<char*>(f.out) + row * stride + column * size,
             stride,
             residual ? static_cast<const char*>(f.residual.data) + row * added + column * size
                      : nullptr,
             added,
             scaled ? f.row_scale + row : nullptr,
             {}};
    for (int64_t v = 0; f.bias.data && v < full_.vectors; ++v) {
      full_.bias[v] = load(f.bias.data, column + v * kLanes, f.bias.dtype);
    }
  }

  template <bool scaled, bool residual>
  static void run_full(const RowWork& self, int64_t first, int64_t last) {
    epilogue_of_full_tile<A, D, scaled, residual>(static_cast<const DeferredEpilogue&>(self).full_,
                                                  first, last);
  }

  static void run_any(const RowWork& self, int64_t first, int64_t last) {
    const DeferredEpilogue& w = static_cast<const DeferredEpilogue&>(self);
    epilogue_of_tile<A, D>(w.epilogue_, w.tile_ + first * kTileStride, w.row_ + first, last - first,
                           w.column_, w.columns_);
  }

  const Epilogue& epilogue_;
  const float* tile_ = nullptr;
  int64_t row_ = 0, column_ = 0, columns_ = 0;
  FullTile full_;
};
