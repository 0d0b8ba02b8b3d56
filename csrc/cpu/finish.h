// What becomes of the sums of a tile: scaled, biased, activated, added to a residual and stored.

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

// Where there is no tile, as of a product of no steps, its sums are zeros.
inline Vector sums_of(const float* tile, int64_t row) {
  return tile ? load(tile + row * kTileStride) : Vector{};
}

// Some rows of one vector column of a tile, of any kind and size.
template <Activation A, Dtype D>
inline void finish_column(const Finish& f, const float* tile, int64_t row, int64_t rows,
                          int64_t column, int64_t count) {
  const Vector bias = f.bias.data ? load_some(f.bias.data, column, f.bias.dtype, count) : Vector{};
  for (int64_t i = 0; i < rows; ++i) {
    Vector x = sums_of(tile, i);
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
    const Vector y = activate(sums_of(tile, i) + bias, A, slope);
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
    const float* const from = tile ? tile + j : nullptr;
    if (f.gradient.data) {
      differentiate_column<A, D>(f, from, row, rows, column + j, count);
    } else {
      finish_column<A, D>(f, from, row, rows, column + j, count);
    }
  }
}

// The most frequent kinds, which tile units that can finish tiles where they make them do so.
template <Activation A, Dtype D>
constexpr bool kFrequent = (A == Activation::none || A == Activation::gelu) && D != Dtype::f16;

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

  // A tile whose sums are still to come, if a tile unit may finish them where it makes them: of a
  // frequent kind, and of a size that fills its registers.
  const Whole* at_once(int64_t row, int64_t count, int64_t column, int64_t columns) {
    const bool plain = !finish_.row_scale && !finish_.residual.data;
    if (!kFrequent<A, D> || count != kTileRows || columns != kTileStride || !vectors_are_whole(columns) ||
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
